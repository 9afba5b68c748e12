"""Laws of real processes: kill -9 loses nothing, and two processes train as one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t5pegasus.checkpoint import find_checkpoint, load_arrays, load_checkpoint_info

STEPS = 6
KILLED_WHILE_SAVING = """
import os, signal, sys
import t5pegasus.manifest as manifest
write_json = manifest.write_json
def kill_at_second_manifest(path, value):
    if path.parent.name == "4.unfinished" and path.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    write_json(path, value)
manifest.write_json = kill_at_second_manifest
from launch.cli import main
sys.exit(main(sys.argv[1:]))
"""
WITH_SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
COMMAND = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"


def start(script: str, *argv: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    line = [sys.executable, "-c", script, *map(str, argv)]
    return subprocess.run(line, check=False, capture_output=True, text=True, timeout=280, env=environment)


@pytest.fixture(scope="module")
def pretrain(examples_path) -> list[object]:
    flags = {
        "train.steps": STEPS, "train.batch-size": 8, "train.save-every-steps": 2, "train.log-every-steps": 1,
        "data.max-source-tokens": 24, "data.max-target-tokens": 8, "optimizer.warmup-steps": 4,
        "model.dropout-rate": 0.1,
    }  # fmt: skip
    return ["pretrain", "tiny", "--examples-path", examples_path, *(p for k, v in flags.items() for p in (f"--{k}", v))]


@pytest.fixture(scope="module")
def uninterrupted(pretrain, tmp_path_factory) -> Path:
    run_path = tmp_path_factory.mktemp("uninterrupted") / "run"
    done = start(COMMAND, *pretrain, "--run-path", run_path)
    assert done.returncode == 0, done.stderr
    assert str(run_path / "checkpoints" / str(STEPS)) in done.stdout
    return run_path


def test_killed_while_saving_it_continues_bit_for_bit(pretrain, uninterrupted, tmp_path):
    run_path = tmp_path / "run"
    killed = start(KILLED_WHILE_SAVING, *pretrain, "--run-path", run_path)
    assert killed.returncode == -9, killed.stderr
    assert load_checkpoint_info(find_checkpoint(run_path)).step == 2
    done = start(COMMAND, *pretrain, "--run-path", run_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = load_arrays(find_checkpoint(run_path)), load_arrays(find_checkpoint(uninterrupted))
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def test_a_disk_that_is_too_small_ends_the_run_with_its_exit_code(pretrain, tmp_path):
    ended = start(WITH_SMALL_FILES + COMMAND, *pretrain, "--run-path", tmp_path / "run")
    assert ended.returncode == 46, ended.stderr
    assert f"{tmp_path}/run/checkpoints/2 could not be saved: " in ended.stderr, ended.stderr
    assert f"t5pegasus pretrain: {tmp_path}/run/checkpoints/4: File too large" in ended.stderr, ended.stderr


def test_two_processes_continue_what_one_began(pretrain, uninterrupted, tmp_path):
    run_path = tmp_path / "run"
    assert start(KILLED_WHILE_SAVING, *pretrain, "--run-path", run_path).returncode == -9
    launch = ["launch", "local", "--processes", 2, "--", *pretrain, "--run-path", run_path]
    done = start(COMMAND, *launch)
    assert done.returncode == 0, done.stderr
    ours, theirs = find_checkpoint(run_path), find_checkpoint(uninterrupted)
    assert load_checkpoint_info(ours).rows == load_checkpoint_info(theirs).rows == STEPS * 8
    arrays = load_arrays(ours)
    for name, array in load_arrays(theirs).items():
        np.testing.assert_allclose(arrays[name], array, rtol=0, atol=2e-5, err_msg=name)
