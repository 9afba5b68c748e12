"""Laws of fire: what ends a process ends its whole job, and the same command goes on to the bits of a clean run."""

from pathlib import Path

import numpy as np
import pytest
from fault_runs import STEPS, Job, Result, assert_nothing_runs, assert_same_bits

from launch.attempts import list_attempts, newest_checkpoint
from t5pegasus.checkpoint import verify_checkpoint
from t5pegasus.train.metrics import read_metrics


@pytest.fixture(scope="module")
def clean(examples_path, tmp_path_factory):
    job = Job(tmp_path_factory.mktemp("clean"), examples_path)
    assert job.run() == 0
    return job.result()


@pytest.fixture
def job(examples_path, tmp_path) -> Job:
    return Job(tmp_path, examples_path)


def finish(job: Job, clean: Result) -> None:
    assert_nothing_runs(job)
    assert job.run() == 0
    assert_same_bits(job.result(), clean)


def test_terminated_killed_damaged_and_failed_it_goes_on_to_the_same_bits(job, clean, capfd):
    assert job.run("term@step:2@1") == 42
    assert {(record["ended"]["how"], record["ended"]["saved"]) for record in job.records().values()} == {
        ("preempted", True)
    }
    assert job.run("kill@device:17@0") == 137
    assert_nothing_runs(job)
    damaged = job.flip_a_bit()
    capfd.readouterr()
    assert job.run("raise@data:25@1") == 1
    ended = {process: record["ended"] for process, record in job.records().items()}
    assert (ended[1]["how"], ended[1]["code"], ended[1]["blamed"]) == ("failed", 1, 1)
    assert "InjectedError: injected into process 1" in ended[1]["traceback"]
    assert (ended[0]["how"], ended[0]["code"], ended[0]["blamed"]) == ("consequence", 1, 1)
    error = capfd.readouterr().err
    assert f"checkpoint {damaged}: " in error, error
    assert "going back to the one before" in error
    assert error.endswith("process 1 of 2 ended with exit code 1: InjectedError: injected into process 1\n")
    finish(job, clean)


@pytest.mark.slow
def test_terminated_before_the_first_new_step_it_ends_with_42_and_the_checkpoint_it_had(job, clean):
    assert job.run("kill@save:16") == 137
    before = newest_checkpoint(job.run_path)
    for place in ("import@0", "after+0.5@1", "restore", "restore+0.02@1", "compile", "compile+0.2@0"):
        assert job.run(f"term@{place}") == 42, place
        assert newest_checkpoint(job.run_path) == before
    finish(job, clean)


@pytest.mark.slow
def test_terminated_anywhere_later_it_saves_a_common_step(job, clean):
    for place in ("step:1@1", "save:8@0", "evaluate:15", "data:19", "save+0.05:24@1"):
        before = newest_checkpoint(job.run_path) or 0
        assert job.run(f"term@{place}") == 42, place
        assert {(each["ended"]["how"], each["ended"]["saved"]) for each in job.records().values()} == {
            ("preempted", True)
        }
        assert newest_checkpoint(job.run_path) > before
    finish(job, clean)


@pytest.mark.slow
def test_a_second_signal_or_the_end_of_its_grace_ends_it_where_it_stands(job, clean, capfd):
    assert job.run("term-twice@data:6;sleep@data:8@1") == 143
    assert "ended by a second signal; the last checkpoint is that of step 4" in capfd.readouterr().err
    assert job.run("term@data:10;sleep@data:11@1", "--watch.grace-seconds", "3") == 143
    assert "did not stop within 3 s (--watch.grace-seconds); the last checkpoint is that of step 8" in (
        capfd.readouterr().err
    )
    finish(job, clean)


@pytest.mark.slow
def test_killed_at_any_write_of_a_checkpoint_it_loses_nothing_before(job, clean):
    for number, write in enumerate((1, 2, 3, 5, 8, 13, 21, 34)):
        before = newest_checkpoint(job.run_path) or 0
        assert job.run(f"kill@write:{write}" + ("", "@0", "@1")[number % 3]) in (137, 0)
        assert (newest_checkpoint(job.run_path) or 0) >= before
    finish(job, clean)


@pytest.mark.slow
def test_a_failure_of_one_is_the_end_of_all_and_that_one_is_blamed(job, clean, capfd):
    for place, whose in (("step:2", 0), ("save:4", 1), ("step:8", 1), ("evaluate:10", 0), ("data:16", 0)):
        assert job.run(f"raise@{place}@{whose}") == 1  # right behind a save, that is still being written
        assert f"process {whose} of 2 ended with exit code 1: InjectedError" in capfd.readouterr().err
        assert {process: each["ended"]["blamed"] for process, each in job.records().items()} == {0: whose, 1: whose}
        assert_nothing_runs(job)
    finish(job, clean)


@pytest.mark.slow
def test_a_stuck_process_is_named_with_its_stack(job, clean, capfd):
    for fault, whose in (("sleep@data:6", 0), ("sleep@data:10", 1), ("block@step:14", 1)):
        assert job.run(f"{fault}@{whose}", "--watch.step-seconds", "5") == 134
        assert f"process {whose} of 2 ended with exit code 134: process {whose} of 2" in capfd.readouterr().err
        ended = job.records()[whose]["ended"]
        assert (ended["how"], ended["blamed"]) == ("stuck", whose)
        folder = job.run_path / "attempts" / str(list_attempts(job.run_path)[-1])
        assert "in injure" in (folder / f"process-{whose}.stacks.txt").read_text()
    assert job.run("stop@step:18@1", "--watch.heartbeat-seconds", "5") == 134
    error = capfd.readouterr().err
    assert "process 1 of 2 ended with exit code 134: process 1 of 2" in error
    assert "has given no sign of life" in error
    assert "it is stopped by a signal (SIGSTOP" in error
    assert job.run("hold@step:18@1", "--watch.heartbeat-seconds", "8") == 134
    error = capfd.readouterr().err
    assert "process 1 of 2 ended with exit code 134: process 1 of 2" in error
    assert "[p1]   File" in error  # Python's lock is not needed to show a stack
    assert "in injure" in error
    finish(job, clean)


@pytest.mark.slow
def test_a_finished_run_whose_last_checkpoint_is_damaged_makes_it_again(job, clean):
    assert job.run() == 0
    damaged = job.flip_a_bit()
    finish(job, clean)
    verify_checkpoint(damaged)


@pytest.mark.slow
def test_a_slow_process_is_named_and_goes_on(job, capfd):
    assert job.run("slow@data:*@1", "--train.steps", "80") == 0
    assert "process 1 (on" in capfd.readouterr().err
    lines = read_metrics(job.run_path / "metrics.jsonl")
    assert [1] in [line.get("slow_processes") for line in lines]


@pytest.mark.slow
def test_a_full_disk_ends_all_with_its_exit_code(job, clean, capfd):
    assert job.run("full@data:10@1") == 46
    error = capfd.readouterr().err
    assert "No space left on device; free some space" in error
    assert newest_checkpoint(job.run_path) in (4, 8)  # that of 8 was perhaps still on its way
    finish(job, clean)


@pytest.mark.slow
def test_a_rollback_goes_to_the_checkpoint_that_is_still_being_written(examples_path, tmp_path):
    flags = {"train.on-divergence": "rollback", "train.steps": 12}
    jobs = [Job(tmp_path / name, examples_path, **flags) for name in ("fast", "slow")]
    assert jobs[0].run("nan@row:100") == 0
    assert jobs[1].run("nan@row:100;lag@save:8") == 0
    arrays = [job.result().arrays for job in jobs]
    for job in jobs:
        found = [line for line in read_metrics(job.run_path / "metrics.jsonl") if line["kind"] == "divergence"]
        assert [(line["at_step"], line["step"], line["skipped_rows"]) for line in found] == [(9, 8, [96, 108])]
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(arrays[1][name], array, err_msg=name)


@pytest.mark.slow
def test_one_or_two_of_four_are_killed(examples_path, tmp_path):
    jobs = [Job(tmp_path / name, examples_path) for name in ("clean", "killed")]
    assert jobs[0].run(processes=4) == 0
    assert jobs[1].run("kill@step:6@2", processes=4) == 137
    assert jobs[1].run("kill@step:9@1;kill@step:9@3", processes=4) == 137
    assert_nothing_runs(jobs[1])
    assert jobs[1].run(processes=4) == 0
    assert_same_bits(jobs[1].result(), jobs[0].result())


@pytest.mark.slow
def test_processes_that_differ_are_refused_with_the_difference(job, capfd):
    assert job.run("flags@import@1") == 2
    assert "process 1 has optimizer.learning_rate 0.5, process 0 has 0.002" in capfd.readouterr().err


@pytest.mark.slow
def test_processes_that_do_not_share_the_run_folder_are_refused(examples_path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    job = Job(Path(), examples_path)
    assert job.run("apart@import@1") == 2
    said = "process 1 has run path run, where what process 0 wrote is not to be seen, process 0 has run: the run folder"
    assert said in capfd.readouterr().err
    assert not (job.run_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_missing_process_is_named(job, capfd):
    assert job.run("sleep@import@1", "--watch.join-seconds", "8") == 134
    assert "waited 8 s for all 2 processes (--watch.join-seconds); missing: 1" in capfd.readouterr().err


@pytest.mark.slow
def test_the_number_of_processes_may_change_and_the_rows_do_not(job, clean):
    assert job.run("kill@save+0.3:4") == 137
    assert job.run("term@step:7", processes=1) == 42
    assert job.run(processes=3) == 0
    ours = job.result()
    assert ours.ledger == clean.ledger
    assert len(ours.ledger) == STEPS
    for (step, got), (wanted_step, wanted) in zip(ours.losses, clean.losses, strict=True):
        assert step == wanted_step
        assert float.fromhex(got) == pytest.approx(float.fromhex(wanted), abs=2e-5)


@pytest.mark.slow
def test_a_model_that_grows_in_two_processes_is_killed_on_both_sides_of_it(examples_path, tmp_path):
    grows = {"growth": "step=6:d_ff=32,num_decoder_layers=2", "train.save-every-steps": 3}
    jobs = [Job(tmp_path / name, examples_path, **grows) for name in ("clean", "killed", "alone")]
    assert jobs[0].run() == 0
    assert jobs[1].run("kill@event@1") == 137
    assert jobs[1].run("kill@step:7@0") == 137
    assert jobs[1].run() == 0
    assert_same_bits(jobs[1].result(), jobs[0].result())
    assert jobs[2].run(processes=1) == 0
    alone, together = jobs[2].result(), jobs[0].result()
    assert alone.ledger == together.ledger
    for name, array in alone.arrays.items():
        assert together.arrays[name] == pytest.approx(array, abs=2e-5), name
