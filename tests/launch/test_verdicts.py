"""Laws of blame: who must end, why, and whose fault it is."""

import pytest

from launch.attempts import find_cause
from launch.liveness import State
from launch.verdicts import Peer, find_stragglers, judge
from launch.watch_config import WatchConfig
from t5pegasus.errors import UsageError

LIMITS = WatchConfig(step_seconds=60, evaluate_seconds=0, save_seconds=65, heartbeat_seconds=30, grace_seconds=100)


def record(process, activity="device", step=5, since=1.0, ended=None, pace=None):
    return {
        "process": process, "num_processes": 3, "pid": 100 + process, "host": f"h{process}", "identity": None,
        "beat": {"count": 1, "activity": activity, "step": step, "since": since, "time": 0.0},
        "ended": ended, "pace": pace,
    }  # fmt: skip


def ended(code, how="failed", time=1.0, blamed=1, message="why", saved=False):
    return {"code": code, "how": how, "time": time, "blamed": blamed, "message": message, "saved": saved}


def peer(record, silent=0.0, since_end=0.0, state=State.ALIVE):
    return Peer(record, silent, since_end, state)


def test_nobody_ends_while_all_is_well():
    assert judge(record(0), {1: peer(record(1)), 2: peer(record(2, ended=ended(0)))}, LIMITS) is None


@pytest.mark.parametrize("code", [1, 2, 42, 44, 45, 46, 130])
def test_the_end_of_one_is_the_end_of_all_with_its_code(code):
    verdict = judge(record(0), {1: peer(record(1, ended=ended(code)))}, LIMITS)
    assert (verdict.code, verdict.how, verdict.blamed) == (code, "consequence", 1)


def test_a_consequence_blames_whom_it_was_a_consequence_of():
    later = ended(44, "consequence", time=0.5, blamed=2)
    first = judge(record(0), {1: peer(record(1, ended=later))}, LIMITS)
    assert (first.code, first.blamed) == (44, 2)
    both = {1: peer(record(1, ended=later)), 2: peer(record(2, ended=ended(45, time=0.7, blamed=2, message="torn")))}
    verdict = judge(record(0), both, LIMITS)
    assert (verdict.code, verdict.blamed) == (45, 2)
    assert "torn" in verdict.message


def test_who_stops_behind_a_common_checkpoint_lets_the_others_finish_it():
    saved = ended(42, "preempted", saved=True)
    assert judge(record(0), {1: peer(record(1, ended=saved), since_end=99.0)}, LIMITS) is None
    verdict = judge(record(0), {1: peer(record(1, ended=saved), since_end=101.0)}, LIMITS)
    assert (verdict.code, verdict.how) == (143, "killed")


def test_a_process_that_is_gone_or_silent_is_named():
    gone = judge(record(0), {2: peer(record(2), state=State.GONE)}, LIMITS)
    assert (gone.code, gone.blamed) == (134, 2)
    assert "process 2 of 3 (pid 102 on h2) is gone" in gone.message
    assert judge(record(0), {2: peer(record(2), silent=29.0, state=State.UNKNOWN)}, LIMITS) is None
    silent = judge(record(0), {2: peer(record(2, "save", 4), silent=31.0, state=State.STOPPED)}, LIMITS)
    assert silent.blamed == 2
    assert "no sign of life for 31 s: it is stopped by a signal" in silent.message
    assert "saving a checkpoint" in silent.message


@pytest.mark.parametrize(
    ("own", "other", "blamed", "how"),
    [
        (("data", 5), ("device", 6), 0, "stuck"),
        (("device", 6), ("data", 5), 1, "consequence"),
        (("device", 6), ("step", 5), 1, "consequence"),
        (("step", 5), ("data", 5), 1, "consequence"),
        (("device", 6), ("device", 6), 0, "stuck"),
        (("device", 6), ("device", 5), 1, "consequence"),
        (("device", 6), ("save", 5), 1, "consequence"),
    ],
)
def test_stuck_is_who_has_come_least_far(own, other, blamed, how):
    verdict = judge(record(0, *own, since=66.0), {1: peer(record(1, *other, since=66.0))}, LIMITS)
    assert (verdict.code, verdict.how, verdict.blamed, verdict.has_stacks) == (134, how, blamed, True)


def test_who_is_still_within_its_own_limit_is_waited_for():
    waiting = record(0, "device", 6, since=66.0)
    for activity, since in (("sample", 900.0), ("evaluate", 900.0), ("save", 64.0), ("data", 59.0)):
        assert judge(waiting, {1: peer(record(1, activity, 5, since=since))}, LIMITS) is None, activity


def test_time_limits_are_per_activity_and_zero_is_none():
    assert judge(record(0, "step", since=59.0), {}, LIMITS) is None
    assert judge(record(0, "device", since=64.0), {}, LIMITS) is None
    assert judge(record(0, "evaluate", since=1e9), {}, LIMITS) is None
    assert "--watch.step-seconds 60" in judge(record(0, "step", since=61.0), {}, LIMITS).message
    with pytest.raises(UsageError, match="step_seconds=-1"):
        WatchConfig(step_seconds=-1)


def test_a_straggler_is_twice_as_slow_as_the_others_and_by_enough():
    def paces(*own, step=1.0):
        return {
            i: record(i, pace={"seconds_per_step": step, "host_seconds_per_step": seconds})
            for i, seconds in enumerate(own)
        }

    assert find_stragglers(paces(0.1, 0.6, 0.1)) == {1: 0.6}
    assert find_stragglers(paces(0.1, 0.6)) == {1: 0.6}
    assert find_stragglers(paces(0.1, 0.19, 0.1)) == {}
    assert find_stragglers(paces(0.001, 0.01, 0.001)) == {}
    assert find_stragglers(paces(0.6)) == {}
    assert find_stragglers({0: record(0), 1: record(1)}) == {}


def test_the_cause_is_the_earliest_end_that_is_no_consequence():
    assert find_cause({0: record(0), 1: record(1, ended=ended(0))}) is None
    records = {
        0: record(0, ended=ended(44, "consequence", time=1.0, blamed=2)),
        1: record(1, ended=ended(1, time=3.0, blamed=1)),
        2: record(2, ended=ended(44, time=2.0, blamed=2)),
    }
    assert find_cause(records)[0] == 2
    killed = {0: record(0, ended=ended(134, "consequence", blamed=1)), 1: record(1)}
    assert find_cause(killed)[0] == 1
