"""Cloud TPU VMs through queued resources: a pure plan of `gcloud` commands, and its execution.

This API serves TPU v2 to v6e; Google offers newer ones through Compute Engine and GKE only. Everything that
reaches a remote shell is an argument list quoted by `shlex.join`.
"""

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Literal, NamedTuple, NoReturn, TextIO

from launch.bundle import write_bundle
from launch.job import JobSpec
from t5pegasus.errors import T5PegasusError, UsageError

RUNTIME_VERSIONS = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
"""The VM image of each TPU generation this API serves."""

_LARGEST_SINGLE_HOST = 8
_PYTHON = "3.12"
_STATES_OF_NO_RETURN = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_MAX_FAILED_POLLS = 5


@dataclasses.dataclass(frozen=True)
class TpuVms:
    """Which TPU VMs a job asks for.

    Raises:
        UsageError: this API does not serve the accelerator, or a number is below 1.
    """

    project: str
    """Google Cloud project that pays."""
    zone: str
    """For example us-west4-a."""
    accelerator: str
    """Generation and size as Google names them: v5litepod-16, v6e-8, v4-32."""
    slices: int = 1
    """How many such TPUs, joined by the data-centre network."""
    capacity: Literal["spot", "reserved", "on-demand"] = "spot"
    """Spot is cheap and can be taken away at any time."""
    max_wait_hours: int = 6
    """Give up when there is no capacity for so long."""

    def __post_init__(self) -> None:
        generation, _, size = self.accelerator.partition("-")
        if generation not in RUNTIME_VERSIONS or not re.fullmatch(r"[1-9]\d*", size):
            raise UsageError(
                f"accelerator={self.accelerator!r} must be one of {', '.join(RUNTIME_VERSIONS)}, "
                "a hyphen and a size, for example v5litepod-16"
            )
        for name in ("slices", "max_wait_hours"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')}={getattr(self, name)} must be at least 1")

    @property
    def runtime_version(self) -> str:
        """The VM image for the accelerator."""
        return RUNTIME_VERSIONS[self.accelerator.partition("-")[0]]

    @property
    def several_hosts(self) -> bool:
        """Whether the job has several processes: a VM holds at most 8 chips or, before v5litepod, 8 cores."""
        return self.slices > 1 or int(self.accelerator.partition("-")[2]) > _LARGEST_SINGLE_HOST


class TpuVmPlan(NamedTuple):
    """The commands of one job, in the order in which they run."""

    create: list[str]
    describe: list[str]
    copy: list[str]
    setup: list[str]
    run: list[str]
    delete: list[str]


def plan_tpu_vm(job: JobSpec, vms: TpuVms, bundle_path: str, bundle_sha256: str) -> TpuVmPlan:
    """All commands that run `job` on `vms` with the code in `bundle_path`.

    Raises:
        UsageError: the verb works in one process and `vms` has several hosts.
    """
    job.require_parallel(2 if vms.several_hosts else 1)
    place = [f"--project={vms.project}", f"--zone={vms.zone}"]
    # The default batch is 64 workers; the first 64 would wait for peers that are not started before they end.
    everywhere = ["--node=all", "--worker=all", "--batch-size=all"]

    def gcloud(verb: str, *arguments: str) -> list[str]:
        return ["gcloud", "compute", "tpus", "queued-resources", verb, *arguments, *place, "--quiet"]

    nodes = [f"--node-id={job.name}"]
    if vms.slices > 1:
        nodes = [f"--node-count={vms.slices}", f"--node-prefix={job.name}"]
    return TpuVmPlan(
        create=gcloud(
            "create",
            job.name,
            f"--accelerator-type={vms.accelerator}",
            f"--runtime-version={vms.runtime_version}",
            *nodes,
            *([] if vms.capacity == "on-demand" else [f"--{vms.capacity}"]),
            f"--valid-until-duration={vms.max_wait_hours}h",
            f"--labels=run={job.name}",
            "--async",
        ),
        describe=gcloud("describe", job.name, "--format=json"),
        copy=gcloud("scp", bundle_path, f"{job.name}:", *everywhere),
        setup=gcloud("ssh", job.name, *everywhere, f"--command={_setup_command(job, bundle_path, bundle_sha256)}"),
        run=gcloud("ssh", job.name, *everywhere, f"--command={_run_command(job)}"),
        delete=gcloud("delete", job.name, "--force", "--async"),
    )


def _setup_command(job: JobSpec, bundle_path: str, bundle_sha256: str) -> str:
    """Check the bundle, unpack it, and install it with its own Python: these images have an older one."""
    bundle = Path(bundle_path).name
    line = shlex.join(["echo", f"{bundle_sha256}  {bundle}"])
    check = f"{line} | {shlex.join(['sha256sum', '--check', '--quiet'])}"
    steps = [
        ["mkdir", "-p", job.name],
        ["tar", "-xf", bundle, "-C", job.name],
        ["cd", job.name],
        ["python3", "-m", "pip", "install", "--quiet", "--user", "uv"],
        ["python3", "-m", "uv", "venv", "--quiet", "--python", _PYTHON, ".venv"],
        ["python3", "-m", "uv", "pip", "install", "--quiet", "--python", ".venv/bin/python", ".[tpu]"],
    ]
    return " && ".join([check, *map(shlex.join, steps)])


def _run_command(job: JobSpec) -> str:
    return " && ".join([shlex.join(["cd", job.name]), shlex.join(["exec", ".venv/bin/t5pegasus", *job.command])])


def show_tpu_vm_plan(job: JobSpec, vms: TpuVms, root: Path) -> str:
    """The commands `run_on_tpu_vm` would run for the code below `root`, as a shell script."""
    plan = plan_tpu_vm(job, vms, f"{job.name}.tar", write_bundle(root, io.BytesIO()))
    explained = {
        "ask for the TPU": plan.create,
        'repeat until state.state is "ACTIVE"': plan.describe,
        "send the code, a tar file made from what git lists here, to every host": plan.copy,
        "install it on every host": plan.setup,
        "run the job on every host": plan.run,
        "delete the TPU, which is billed until then": plan.delete,
    }
    return "\n".join(f"# {why}\n{shlex.join(argv)}" for why, argv in explained.items())


def run_on_tpu_vm(
    job: JobSpec, vms: TpuVms, root: Path, *, delete_after: bool = False, poll_seconds: float = 30.0
) -> int:
    """Run `job` on new TPU VMs with the code below `root` and return its exit code.

    What fails before the job starts deletes the TPU. Afterwards it is kept, as the run lies on its disks,
    unless `delete_after`; what to type is printed.

    Raises:
        UsageError: `gcloud` is not installed, or cannot create the TPU.
        T5PegasusError: there was no capacity, or the hosts could not be set up.
    """
    if shutil.which("gcloud") is None:
        raise UsageError("gcloud is not on the PATH; install it from https://cloud.google.com/sdk or use --dry-run")
    with tempfile.TemporaryDirectory() as folder, _sigterm_as_exit():
        bundle_path = Path(folder) / f"{job.name}.tar"
        with bundle_path.open("wb") as sink:
            bundle_sha256 = write_bundle(root, sink)
        plan = plan_tpu_vm(job, vms, str(bundle_path), bundle_sha256)
        if _call(plan.create) != 0:
            raise UsageError(f"gcloud did not create {job.name!r}; its own message is above")
        try:
            _wait_until_active(job.name, plan.describe, poll_seconds)
            for what, argv in (("copied to", plan.copy), ("installed on", plan.setup)):
                if _call(argv) != 0:
                    raise T5PegasusError(f"the code could not be {what} every host of {job.name!r}; deleting it")
        except BaseException:
            _call(plan.delete)
            raise
        try:
            return _call(plan.run, results=sys.stdout)
        finally:
            if delete_after:
                _call(plan.delete)
            else:
                print(
                    f"{job.name} keeps the run on its disks and is billed until you delete it:\n"
                    f"  {shlex.join(plan.delete)}",
                    file=sys.stderr,
                )


def _wait_until_active(name: str, describe: Sequence[str], poll_seconds: float) -> None:
    last_state = None
    failed_polls = 0
    while True:
        found = subprocess.run(describe, stdout=subprocess.PIPE, check=False)
        if found.returncode != 0:
            failed_polls += 1
            if failed_polls == _MAX_FAILED_POLLS:
                raise T5PegasusError(f"gcloud could not describe {name!r} {failed_polls} times in a row; deleting it")
        else:
            failed_polls = 0
            state = json.loads(found.stdout)["state"]["state"]
            if state != last_state:
                print(f"{name}: {state}", file=sys.stderr)
            if state == "ACTIVE":
                return
            if state in _STATES_OF_NO_RETURN:
                raise T5PegasusError(
                    f"{name!r} became {state} before the job started; deleting it. Try again, or elsewhere"
                )
            last_state = state
        time.sleep(poll_seconds)


def _call(argv: Sequence[str], results: TextIO | None = None) -> int:
    """Run a command; what it prints goes to stderr unless these are the results of the job."""
    print(f"+ {shlex.join(argv)}", file=sys.stderr)
    return subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=results or sys.stderr, check=False).returncode


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let a terminated launcher still delete what is billed."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
