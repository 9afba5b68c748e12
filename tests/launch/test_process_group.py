import pytest

from launch.process_group import ProcessGroup, find_process_group, is_tpu_vm
from t5pegasus.errors import UsageError

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[007-008,012]",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
SLURM_SHARED = SLURM | {"SLURM_NTASKS": "6", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
OPEN_MPI_PORT = 61440 + (1531576320 // 4096) % 4096
GKE = {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc"}
TWO_SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "job-a-0.svc:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("environment", "group"),
    [
        ({}, None),
        (EXPLICIT, ProcessGroup("10.0.0.1:1234", 4, 3)),
        (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ProcessGroup("10.0.0.1:1234", 4, 3, (0, 1))),
        (
            EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "job-0", "JAX_COORDINATOR_PORT": "99"},
            ProcessGroup("job-0:99", 4, 3),
        ),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        (EXPLICIT | SLURM, ProcessGroup("10.0.0.1:1234", 4, 3)),
        (SLURM, ProcessGroup("node007:61441", 3, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, ProcessGroup("gpu-a:61441", 3, 2)),
        (SLURM | {"SLURM_STEP_NODELIST": "node[3,7-9],x"}, ProcessGroup("node3:61441", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_PORT": "5000"}, ProcessGroup("node007:5000", 3, 2)),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "ib-7:5001"}, ProcessGroup("ib-7:5001", 3, 2)),
        (SLURM_SHARED, ProcessGroup("node007:61441", 6, 5, (1,))),
        (SLURM_SHARED | {"CUDA_VISIBLE_DEVICES": "3"}, ProcessGroup("node007:61441", 6, 5)),
        (SLURM_SHARED | {"CUDA_VISIBLE_DEVICES": "2,3"}, ProcessGroup("node007:61441", 6, 5, (1,))),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, ProcessGroup(f"10.96.0.1:{OPEN_MPI_PORT}", 2, 1, (1,))),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ProcessGroup(f"10.96.0.1:{OPEN_MPI_PORT}", 2, 1)),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::1,fe80::2]:43370"},
            ProcessGroup("[fe80::1]:61441", 2, 1, (1,)),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        (GKE, ProcessGroup("job-0.svc:8482", 2, 1)),
        (GKE | {"TPU_PROCESS_ADDRESSES": "a:8476,b:8476,c:8476"}, ProcessGroup("a:8482", 3, 1)),
        (TWO_SLICES, ProcessGroup("job-a-0.svc:8482", 4, 3)),
        ({"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ],
)
def test_every_launcher_becomes_explicit_arguments(environment, group):
    assert find_process_group(environment) == group


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "4"}, "JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID is not set"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES='four' must be a whole number"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, r"process id 4 must lie in \[0, 4\)"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "has no port"),
        (EXPLICIT | {"JAX_LOCAL_DEVICE_IDS": "a"}, "JAX_LOCAL_DEVICE_IDS='a'"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "-x JAX_COORDINATOR_ADDRESS"),
        (GKE | {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "0"}, "MEGASCALE_COORDINATOR_ADDRESS"),
    ],
)
def test_an_incomplete_description_says_what_is_missing(environment, message):
    with pytest.raises(UsageError, match=message):
        find_process_group(environment)


def test_a_machine_without_chips_is_no_tpu_vm():
    assert not is_tpu_vm({"TPU_SKIP_MDS_QUERY": "1"})
    assert not is_tpu_vm({"JAX_PLATFORMS": "cpu"})
