import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "soak.py"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "schedule",
    [
        {"steps": 20, "faults": 2, "segment": 20, "seed": 164},  # a SIGTERM, then a SIGKILL
        pytest.param({"steps": 60, "faults": 8, "segment": 20}, marks=pytest.mark.slow),
    ],
)
def test_under_a_random_schedule_of_faults_and_meshes_all_bits_are_those_of_the_clean_run(tmp_path, schedule):
    flags = [part for name, value in schedule.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, SOAK, "--folder", tmp_path, *flags]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "DIFFERENT" not in ended.stdout
