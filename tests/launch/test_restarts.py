import pytest

from launch.backends.local import JobEnding
from launch.exit_codes import Terminated
from launch.restarts import Restarts, run_again
from t5pegasus.errors import UsageError

QUICK = Restarts(preemption=3, infra=2, failure=1, pause_seconds=0.0)


def job(tmp_path, *endings):
    """A job that ends so each time it is run, and the times it was; (code, step) also leaves a checkpoint."""
    left, times = list(endings), []

    def run():
        times.append(1)
        ending = left.pop(0)
        code, step = ending if isinstance(ending, tuple) else (ending, None)
        if step is not None:
            (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
            (tmp_path / "checkpoints" / str(step) / "manifest.json").write_text("{}")
        return JobEnding(code)

    return run, times


@pytest.mark.parametrize(
    ("endings", "code", "times"),
    [
        ([0], 0, 1),
        ([42, 42, 42, 0], 0, 4),
        ([42, 42, 42, 42], 42, 4),  # the budget is 3
        ([(137, 1), (134, 2), (143, 3)], 143, 3),
        ([(1, 1), (1, 2)], 1, 2),
        ([(46, 1), 0], 0, 2),
        ([(137, 1), (1, 2), 42, (137, 3), 0], 0, 5),  # budgets do not share
        ([2], 2, 1),
        ([44], 44, 1),
        ([45], 45, 1),
        ([130], 130, 1),
    ],
)
def test_each_kind_of_end_has_its_budget(tmp_path, endings, code, times):
    run, ran = job(tmp_path, *endings)
    assert (run_again(run, QUICK, tmp_path), len(ran)) == (code, times)


def test_two_failures_in_a_row_at_one_checkpoint_end_the_job(tmp_path, capfd):
    run, ran = job(tmp_path, (137, 8), 137, 137, 0)
    assert (run_again(run, Restarts(infra=100, pause_seconds=0.0), tmp_path), len(ran)) == (137, 3)
    assert "two attempts in a row failed behind its checkpoint of step 8, without a newer one" in capfd.readouterr().err


def test_a_preemption_between_them_is_no_failure(tmp_path):
    run, ran = job(tmp_path, 137, 42, 137, 42, 0)
    assert (run_again(run, QUICK, tmp_path), len(ran)) == (0, 5)


def test_a_job_that_was_told_to_stop_is_not_started_again(tmp_path):
    assert run_again(lambda: JobEnding(42, asked=True), QUICK, tmp_path) == 42


def test_told_to_stop_between_two_attempts_it_may_be_started_again(tmp_path, monkeypatch):
    def stop(seconds):
        raise Terminated

    monkeypatch.setattr("launch.restarts.time.sleep", stop)
    run, ran = job(tmp_path, (137, 1), 0)
    assert (run_again(run, Restarts(), tmp_path), len(ran)) == (42, 1)


def test_negative_budgets_are_refused():
    with pytest.raises(UsageError, match=r"restarts\.infra=-1"):
        Restarts(infra=-1)
