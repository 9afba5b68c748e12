"""The job of several JAX processes that this one belongs to, as its launcher describes it in the environment.

JAX detects some launchers by itself, but not the `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` that Kubeflow and
others set, and under Slurm it shows each process a single GPU even when it is alone on its machine. Every
environment is therefore turned into explicit arguments here; only a Cloud TPU VM, whose facts lie in a
metadata server, is left to JAX.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

from t5pegasus.errors import UsageError

TPU_COORDINATOR_PORT = 8482
"""The port JAX itself uses on TPU hosts, which firewalls there are known to let through."""

_SLURM_KEYS = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """Arguments of `jax.distributed.initialize` for this process."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """The accelerators of this machine that belong to this process; `None` means all of them."""

    def __post_init__(self) -> None:
        if not 0 <= self.process_id < self.num_processes:
            raise UsageError(
                f"process id {self.process_id} must lie in [0, {self.num_processes}), the number of processes"
            )


def find_process_group(environment: Mapping[str, str]) -> ProcessGroup | None:
    """What `environment` says about the job this process belongs to; `None` for a process alone.

    The first that applies: explicit `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`; a Slurm
    job step (`srun`); Open MPI (`mpirun`); TPU hosts in Google Kubernetes Engine. In the last three
    `JAX_COORDINATOR_ADDRESS`, or `JAX_COORDINATOR_PORT` alone, decides over the derived address, and
    `JAX_LOCAL_DEVICE_IDS` over the derived devices.

    Raises:
        UsageError: a part of the description is missing or is not a number.
    """
    for read in (_read_explicit, _read_slurm, _read_open_mpi, _read_gke_tpu):
        group = read(environment)
        if group is not None:
            return group if group.num_processes > 1 else None
    return None


def is_tpu_vm(environment: Mapping[str, str]) -> bool:
    """Whether this machine is a Cloud TPU VM whose metadata server JAX can ask about its peers."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if "TPU_SKIP_MDS_QUERY" in environment or (platforms and "tpu" not in platforms):
        return False
    has_chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None


def _read_explicit(environment: Mapping[str, str]) -> ProcessGroup | None:
    needed = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not any(key in environment for key in needed[1:]):
        return None
    if environment.get("JAX_NUM_PROCESSES") == "1":
        return ProcessGroup(environment.get("JAX_COORDINATOR_ADDRESS", ""), 1, 0)
    missing = [key for key in needed if not environment.get(key)]
    if missing:
        raise UsageError(f"a job of several processes needs {', '.join(needed)}; {', '.join(missing)} is not set")
    return ProcessGroup(
        _with_port(environment["JAX_COORDINATOR_ADDRESS"], environment),
        _read_number(environment, "JAX_NUM_PROCESSES"),
        _read_number(environment, "JAX_PROCESS_ID"),
        _read_local_device_ids(environment),
    )


def _read_slurm(environment: Mapping[str, str]) -> ProcessGroup | None:
    # A shell inside an allocation has only some of these: it is not a task of a job step, and runs alone.
    if not all(key in environment for key in _SLURM_KEYS):
        return None
    job_id, num_tasks = _read_number(environment, "SLURM_JOB_ID"), _read_number(environment, "SLURM_NTASKS")
    shares_machine = num_tasks != int(environment.get("SLURM_STEP_NUM_NODES", "0"))
    host = re.sub(r"^([^,\[]+)(?:\[(\d+))?.*$", r"\1\2", environment["SLURM_STEP_NODELIST"])
    return ProcessGroup(
        environment.get("JAX_COORDINATOR_ADDRESS") or _with_job_port(host, job_id, environment),
        num_tasks,
        _read_number(environment, "SLURM_PROCID"),
        _choose_local_devices(environment, "SLURM_LOCALID" if shares_machine else None),
    )


def _read_open_mpi(environment: Mapping[str, str]) -> ProcessGroup | None:
    if "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    num_processes = _read_number(environment, "OMPI_COMM_WORLD_SIZE")
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if not address and num_processes > 1:
        # `1531576320.0;tcp://10.96.0.1,10.148.0.1:34911`; Open MPI 5 no longer publishes it.
        uri = re.match(
            r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", environment.get("OMPI_MCA_orte_hnp_uri", "")
        )
        if uri is None:
            raise UsageError(
                "Open MPI does not say where process 0 runs (OMPI_MCA_orte_hnp_uri); "
                "pass it with `mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT`"
            )
        # Open MPI's job ids are multiples of 4096.
        host = uri[2] or f"[{uri[3]}]"
        address = _with_job_port(host, int(uri[1]) // 4096, environment)
    shares_machine = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") != "1"
    return ProcessGroup(
        address or "",
        num_processes,
        _read_number(environment, "OMPI_COMM_WORLD_RANK"),
        _choose_local_devices(environment, "OMPI_COMM_WORLD_LOCAL_RANK" if shares_machine else None),
    )


def _read_gke_tpu(environment: Mapping[str, str]) -> ProcessGroup | None:
    hosts = (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or "").split(",")
    if not hosts[0] or "TPU_WORKER_ID" not in environment:
        return None
    # Several slices: processes are numbered slice after slice, and the first slice's first host coordinates.
    num_slices = int(environment.get("MEGASCALE_NUM_SLICES") or 1)
    slice_id = _read_number(environment, "MEGASCALE_SLICE_ID") if num_slices > 1 else 0
    if num_slices > 1 and not environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        raise UsageError(f"a job of {num_slices} slices needs MEGASCALE_COORDINATOR_ADDRESS, which is not set")
    coordinator = environment.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
    port = environment.get("JAX_COORDINATOR_PORT", str(TPU_COORDINATOR_PORT))
    return ProcessGroup(
        environment.get("JAX_COORDINATOR_ADDRESS") or f"{coordinator.split(':')[0]}:{port}",
        num_slices * len(hosts),
        slice_id * len(hosts) + _read_number(environment, "TPU_WORKER_ID"),
        _read_local_device_ids(environment),
    )


def _read_number(environment: Mapping[str, str], key: str) -> int:
    value = environment.get(key, "")
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"{key}={value!r} must be a whole number")
    return int(value)


def _read_local_device_ids(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    value = environment.get("JAX_LOCAL_DEVICE_IDS")
    if not value:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise UsageError(f"JAX_LOCAL_DEVICE_IDS={value!r} must be whole numbers separated by commas")
    return tuple(int(item) for item in value.split(","))


def _choose_local_devices(environment: Mapping[str, str], local_rank_key: str | None) -> tuple[int, ...] | None:
    """One device per process where several share a machine, unless they are divided already."""
    chosen = _read_local_device_ids(environment)
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if chosen is not None or local_rank_key is None or (visible and "," not in visible):
        return chosen
    return (_read_number(environment, local_rank_key),)


def _with_port(address: str, environment: Mapping[str, str]) -> str:
    if re.search(r":\d+$", address):
        return address
    if "JAX_COORDINATOR_PORT" not in environment:
        raise UsageError(
            f"JAX_COORDINATOR_ADDRESS={address!r} has no port; write HOST:PORT or set JAX_COORDINATOR_PORT"
        )
    return f"{address}:{_read_number(environment, 'JAX_COORDINATOR_PORT')}"


def _with_job_port(host: str, job_id: int, environment: Mapping[str, str]) -> str:
    """A port that all processes of a job derive alike and two jobs rarely share (JAX's own rule)."""
    port = environment.get("JAX_COORDINATOR_PORT", str(65535 - 4096 + 1 + job_id % 4096))
    return f"{host}:{port}"
