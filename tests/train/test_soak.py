import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_under_a_random_schedule_of_faults_and_meshes_all_bits_are_those_of_the_clean_run(tmp_path):
    command = [sys.executable, SOAK, "--folder", tmp_path, "--steps", "60", "--faults", "8", "--segment", "20"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "DIFFERENT" not in ended.stdout
