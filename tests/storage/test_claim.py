"""Laws of who writes a run: of all jobs that were started in its folder, the last that began to train."""

from pathlib import Path
from typing import Any

import pytest

from t5pegasus.storage import Claim, TakenOverError, list_files
from t5pegasus.storage import claim as module


@pytest.fixture(params=["disk", "store"])
def run_path(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("tmp_path" if request.param == "disk" else "remote") / "run"


def test_a_run_is_the_last_jobs_and_the_others_are_told_whose(run_path: Path):
    first = Claim(run_path).take()
    first.require()
    first.take()
    second = Claim(run_path).take()
    for look in (first.require, first.take):
        with pytest.raises(TakenOverError, match=f"{run_path} was taken over by process .* of host "):
            look()
    second.require()
    Claim(run_path).take()
    with pytest.raises(TakenOverError):
        first.require()


def test_jobs_that_begin_at_once_get_different_numbers(run_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "list_files", lambda _: {})  # each began to look before any other had come
    claims = [Claim(run_path).take() for _ in range(4)]
    assert sorted(list_files(run_path / "writers")) == [f"{number:06d}.json" for number in (1, 2, 3, 4)]
    assert [_is_ours(claim) for claim in claims] == [False, False, False, True]


def _is_ours(claim: Claim) -> bool:
    try:
        claim.require()
    except TakenOverError:
        return False
    return True


def test_a_job_that_was_refused_gives_the_run_back(run_path: Path):
    fresh = Claim(run_path).take()
    fresh.withdraw()
    assert list_files(run_path) == {}
    first = Claim(run_path).take()
    refused = Claim(run_path).take()
    refused.withdraw()
    first.require()
    second = Claim(run_path).take()
    second.require()
    with pytest.raises(TakenOverError):
        first.require()


def test_a_claim_that_is_just_being_written_counts(tmp_path: Path):
    claim = Claim(tmp_path).take()
    (tmp_path / "writers" / "000002.json").touch()
    with pytest.raises(TakenOverError, match="by another job"):
        claim.require()


def test_a_claim_that_could_not_be_written_takes_nothing_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = Claim(tmp_path).take()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            Claim(tmp_path).take()
    first.require()
