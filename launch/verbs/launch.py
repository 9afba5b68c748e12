"""`t5pegasus launch`: run a verb as several processes on this machine, or on Cloud TPU VMs."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from launch.backends.tpu_vm import TpuVms, run_on_tpu_vm, show_tpu_vm_plan
from launch.cli import find_verb
from launch.job import JobSpec
from launch.restarts import Restarts, run_again
from t5pegasus.storage import open_path


@dataclasses.dataclass(frozen=True)
class Local:
    """Run a verb as several JAX processes on the CPUs of this machine, over one mesh.

    For example: t5pegasus launch local --processes 2 -- pretrain --help

    Process 0 prints its results; everything on stderr comes behind [p0], [p1], … Ctrl-C reaches all
    processes. When one fails the others are ended, and its exit code is the exit code of the job.
    """

    processes: int = 2
    """How many processes, as many as a pod has hosts."""
    devices_per_process: int = 1
    """CPU devices of each process, as a host has chips."""
    restart: bool = False
    """Start the job again when it ends before it is done, as often as --restarts allows."""
    restarts: Restarts = dataclasses.field(default_factory=Restarts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVm(TpuVms):
    """Run a verb on new Cloud TPU VMs (queued resources: TPU v2 to v6e) with the code of this folder.

    For example: t5pegasus launch tpu-vm --dry-run --name zh-base --project my-project --zone us-west4-a
    --accelerator v5litepod-16 -- pretrain --help

    The code is what git tracks here, and new files it does not ignore. Without --dry-run the commands are
    run: the exit code is that of the job, and the TPU is kept, because the run lies on its disks, unless
    --delete-after.
    """

    name: str
    """Names the TPU, its VMs and the folder there."""
    delete_after: bool = False
    """Delete the TPU and its disks as soon as the job has ended."""
    dry_run: bool = False
    """Only print the commands."""


def main(argv: list[str]) -> int:
    """Run `t5pegasus launch local|tpu-vm [flags] -- VERB [arguments]`; the exit code is the job's."""
    split = argv.index("--") if "--" in argv else len(argv)
    where = tyro.cli(
        Annotated[Local, tyro.conf.subcommand("local")] | Annotated[TpuVm, tyro.conf.subcommand("tpu-vm")],  # pyright: ignore[reportArgumentType]
        prog="t5pegasus launch",
        description="Run a verb as several processes; the verb and its arguments follow `--`.",
        args=argv[:split],
    )
    command = tuple(argv[split + 1 :])
    return _run_here(where, command) if isinstance(where, Local) else _run_on_tpu_vm(where, command)


def _run_here(where: Local, command: tuple[str, ...]) -> int:
    from launch.backends.local import JobEnding, run_locally

    JobSpec(command).require_parallel(where.processes)
    # -P: a file in the user's folder must not shadow a library.
    argv = [sys.executable, "-P", "-m", "launch.cli", *command]
    saves, run_path = find_verb(command[0]).saves, _find_run_path(command)

    def run() -> JobEnding:
        return run_locally(argv, where.processes, where.devices_per_process, run_path=run_path, saves=saves)

    return run_again(run, where.restarts, run_path) if where.restart else run().code


def _find_run_path(command: tuple[str, ...]) -> Path | None:
    """Where a verb that trains leaves records of how it ended."""
    if not find_verb(command[0]).saves:
        return None
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    flags.add_argument("--run-path", "--run_path", type=open_path)
    return flags.parse_known_args(command[1:])[0].run_path


def _run_on_tpu_vm(where: TpuVm, command: tuple[str, ...]) -> int:
    job = JobSpec(command, where.name)
    if where.dry_run:
        print(show_tpu_vm_plan(job, where, Path.cwd()))
        return 0
    return run_on_tpu_vm(job, where, Path.cwd(), delete_after=where.delete_after)
