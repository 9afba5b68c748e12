"""Laws of failing disks and killed processes: whichever file operation of a save it is, no checkpoint is ever bad."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.conftest import save_step
from tests.checkpoint.faulty_saves import ENDED, KILLED, RAISED

REPOSITORY = Path(__file__).resolve().parents[2]


def save_with_fault(root: Path, kind: str, every: int) -> list[int]:
    """How the saves ended, the last one unharmed; the laws are checked there."""
    save_step(root / "run", 1)
    command = [sys.executable, "-m", "tests.checkpoint.faulty_saves", str(root), kind, str(every)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=250, cwd=REPOSITORY, env=environment
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return [int(line.split()[1]) for line in done.stdout.splitlines()]


def test_killed_at_any_file_operation_the_last_checkpoint_is_good(tmp_path):
    *ends, last = save_with_fault(tmp_path, "kill", 1)
    assert len(ends) > 50
    assert set(ends) == {KILLED}
    assert last == ENDED


@pytest.mark.parametrize("kind", ["ENOSPC", "EIO", "EROFS"])
def test_a_failing_disk_leaves_older_checkpoints_as_they_were(kind, tmp_path):
    *ends, last = save_with_fault(tmp_path, kind, 7)
    assert len(ends) > 7
    assert set(ends) == {RAISED}
    assert last == ENDED
