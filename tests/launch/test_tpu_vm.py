import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch.backends.tpu_vm import TpuVms, plan_tpu_vm, run_on_tpu_vm, show_tpu_vm_plan
from launch.job import JobSpec
from t5pegasus.errors import T5PegasusError, UsageError

PLACE = "--project=p --zone=us-west4-a --quiet"
EVERYWHERE = f"--node=all --worker=all --batch-size=all {PLACE}"
SETUP = (
    "echo 'SHA  zh-base.tar' | sha256sum --check --quiet && mkdir -p zh-base && tar -xf zh-base.tar -C zh-base"
    " && cd zh-base && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.12 .venv"
    " && python3 -m uv pip install --quiet --python .venv/bin/python '.[tpu]'"
)


def make_plan(command=("pretrain", "base", "--run-path", "runs/中文 1"), **changes):
    vms = TpuVms(**{"project": "p", "zone": "us-west4-a", "accelerator": "v5litepod-16"} | changes)
    return plan_tpu_vm(JobSpec(tuple(command), "zh-base"), vms, "/somewhere/zh-base.tar", "SHA")


def command_of(argv):
    (command,) = (item.removeprefix("--command=") for item in argv if item.startswith("--command="))
    return command


def test_the_plan_is_these_commands():
    plan = make_plan()
    assert shlex.join(plan.create) == (
        "gcloud compute tpus queued-resources create zh-base --accelerator-type=v5litepod-16"
        " --runtime-version=v2-alpha-tpuv5-lite --node-id=zh-base --spot --valid-until-duration=6h"
        f" --labels=run=zh-base --async {PLACE}"
    )
    assert shlex.join(plan.describe) == (f"gcloud compute tpus queued-resources describe zh-base --format=json {PLACE}")
    assert shlex.join(plan.copy) == (
        f"gcloud compute tpus queued-resources scp /somewhere/zh-base.tar zh-base: {EVERYWHERE}"
    )
    ssh = ["gcloud", "compute", "tpus", "queued-resources", "ssh", "zh-base", *EVERYWHERE.split()]
    assert [item for item in plan.setup if not item.startswith("--command=")] == ssh
    assert command_of(plan.setup) == SETUP
    assert [item for item in plan.run if not item.startswith("--command=")] == ssh
    assert command_of(plan.run) == ("cd zh-base && exec .venv/bin/t5pegasus pretrain base --run-path 'runs/中文 1'")
    assert shlex.join(plan.delete) == (f"gcloud compute tpus queued-resources delete zh-base --force --async {PLACE}")


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"slices": 2}, {"--node-count=2", "--node-prefix=zh-base", "--spot"}),
        ({"capacity": "reserved"}, {"--node-id=zh-base", "--reserved"}),
        ({"capacity": "on-demand"}, {"--node-id=zh-base"}),
    ],
)
def test_slices_and_capacity_choose_the_flags_of_create(changes, flags):
    choices = ("--node-id", "--node-count", "--node-prefix", "--spot", "--reserved")
    assert {item for item in make_plan(**changes).create if item.startswith(choices)} == flags


@pytest.mark.parametrize(
    ("accelerator", "runtime_version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_has_its_image(accelerator, runtime_version):
    assert f"--runtime-version={runtime_version}" in make_plan(accelerator=accelerator).create


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accelerator": "tpu7x-16"}, "accelerator='tpu7x-16' must be one of v2, "),
        ({"accelerator": "v6e"}, "a hyphen and a size"),
        ({"slices": 0}, "slices=0 must be at least 1"),
        ({"command": ("convert", "x")}, "'convert' works in one process"),
        ({"command": ("launch", "local")}, "`launch` cannot launch itself"),
        ({"command": ("pretrane",)}, "perhaps you meant 'pretrain'"),
        ({"command": ()}, "after `--`"),
    ],
)
def test_what_cannot_run_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        make_plan(**changes)


@pytest.mark.parametrize("name", ["", "A", "1a", "a_b", "a-", "a" * 41, "a;b"])
def test_a_name_that_cannot_name_hosts_is_refused(name):
    with pytest.raises(UsageError, match="name="):
        JobSpec(("pretrain",), name)


def test_one_host_runs_any_verb():
    assert command_of(make_plan(accelerator="v6e-8", command=("grow", "x")).run).endswith("t5pegasus grow x")


AWKWARD = ["", " ", "a b", "'", '"', "$HOME", "`id`", "; rm -rf x", "a\nb", "\\", "*", "中文　", "--flag=v", "&&", "#"]


def test_every_argument_survives_the_remote_shell(tmp_path):
    program = tmp_path / "zh-base" / ".venv" / "bin" / "t5pegasus"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('\\0'.join(sys.argv[1:]), end='')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    plan = make_plan(command=("pretrain", *AWKWARD))
    ended = subprocess.run(["sh", "-c", command_of(plan.run)], cwd=tmp_path, capture_output=True, check=True)
    assert ended.stdout.decode().split("\0") == ["pretrain", *AWKWARD]


FAKE_GCLOUD = """#!{python}
import json, pathlib, subprocess, sys
folder = pathlib.Path({folder!r})
verb, arguments = sys.argv[4], sys.argv[5:]
with (folder / "calls").open("a") as calls:
    print(verb, file=calls)
states = json.loads((folder / "states").read_text())
if verb == "create":
    sys.exit(0 if states else 1)
if verb == "describe":
    state = states.pop(0) if len(states) > 1 else states[0]
    (folder / "states").write_text(json.dumps(states))
    if state == "unavailable":
        sys.exit(1)
    print(json.dumps({{"state": {{"state": state}}}}))
if verb == "scp":
    (folder / "host" / "zh-base.tar").write_bytes(pathlib.Path(arguments[0]).read_bytes())
if verb == "ssh":
    (command,) = (a.removeprefix("--command=") for a in arguments if a.startswith("--command="))
    command = command.split(" && cd ")[0] if "tar -xf" in command else command
    sys.exit(subprocess.run(["sh", "-c", command], cwd=folder / "host").returncode)
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """A `gcloud` whose TPU is a folder; returns a function that runs a job there and says what was called."""
    folder = tmp_path / "cloud"
    (folder / "host").mkdir(parents=True)
    program = folder / "gcloud"
    program.write_text(FAKE_GCLOUD.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    root = make_repository(tmp_path / "repository")

    def run(states, **options):

        (folder / "states").write_text(json.dumps(states))
        job = JobSpec(("pretrain", "7"), "zh-base")
        vms = TpuVms("p", "z", "v5litepod-16")
        try:
            outcome = run_on_tpu_vm(job, vms, root, poll_seconds=0.0, **options)
        except T5PegasusError as error:
            outcome = str(error)
        return outcome, (folder / "calls").read_text().split()

    return run


def make_repository(root: Path) -> Path:
    program = root / ".venv" / "bin" / "t5pegasus"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "ran $@"\nexit $2\n')
    program.chmod(0o755)
    (root / "pyproject.toml").write_text("[project]\n")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


def test_a_run_waits_copies_installs_runs_and_keeps_the_tpu(cloud, capfd):
    states = ["ACCEPTED", "unavailable", "PROVISIONING", "ACTIVE"]
    assert cloud(states) == (7, ["create", *["describe"] * 4, "scp", "ssh", "ssh"])
    captured = capfd.readouterr()
    assert captured.out == "ran pretrain 7\n"
    assert "zh-base: PROVISIONING\n" in captured.err
    assert captured.err.endswith("queued-resources delete zh-base --force --async --project=p --zone=z --quiet\n")


def test_the_tpu_is_deleted_afterwards_when_asked(cloud):
    assert cloud(["ACTIVE"], delete_after=True) == (7, ["create", "describe", "scp", "ssh", "ssh", "delete"])


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_tpu_that_never_comes_is_deleted(cloud, state):
    outcome, calls = cloud(["ACCEPTED", state])
    assert outcome.startswith(f"'zh-base' became {state} before the job started")
    assert calls == ["create", "describe", "describe", "delete"]


def test_a_cloud_that_does_not_answer_is_given_up(cloud):
    outcome, calls = cloud(["unavailable"])
    assert "5 times in a row" in outcome
    assert calls == ["create", *["describe"] * 5, "delete"]


def test_a_tpu_that_exists_already_is_left_alone(cloud):
    outcome, calls = cloud([])
    assert "did not create 'zh-base'" in outcome
    assert calls == ["create"]


def test_without_gcloud_the_error_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="gcloud is not on the PATH"):
        run_on_tpu_vm(JobSpec(("pretrain",)), TpuVms("p", "z", "v6e-8"), tmp_path)


def test_a_dry_run_shows_the_whole_plan_and_writes_nothing(tmp_path):
    root = make_repository(tmp_path)
    before = sorted(root.rglob("*"))
    shown = show_tpu_vm_plan(JobSpec(("pretrain",), "zh-base"), TpuVms("p", "z", "v6e-8"), root)
    commands = [shlex.split(line) for line in shown.split("\n") if not line.startswith("#")]
    assert [command[4] for command in commands] == ["create", "describe", "scp", "ssh", "ssh", "delete"]
    assert sorted(root.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="the real gcloud, which knows its flags, is not installed")
@pytest.mark.parametrize("changes", [{}, {"slices": 2, "capacity": "reserved"}], ids=["one slice", "two slices"])
def test_the_real_gcloud_accepts_every_flag(tmp_path, changes):
    offline = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false"}
    for argv in make_plan(**changes):
        ended = subprocess.run(argv, env=offline, capture_output=True, text=True, check=False)
        # A wrong flag ends with 2; right ones get as far as the missing login.
        assert ended.returncode == 1
        assert "You do not currently have an active account" in ended.stderr
