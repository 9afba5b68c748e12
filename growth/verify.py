"""Measure a finished growth, in a process of its own whose memory is its own.

The process computes on the CPU, whatever accelerators there are: its sums come in the same order each time, so that
equal growths get equal receipts, float64 is at hand, and the caller keeps its devices.
"""

import dataclasses
import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from growth.gradients import check_gradients, same_function
from growth.liveness import check_liveness
from growth.logits import NUM_PERMUTATIONS, Losses, compare_logits
from growth.receipt import LEVELS, AxisSummary, LogitDifference, Receipt
from growth.stored_arrays import check_arrays
from growth.t5 import ModelGrowth
from t5pegasus.arrays import load_arrays, open_arrays
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import count_parameters, declare_parameters
from t5pegasus.progress import Progress
from t5pegasus.train.state import TrainState, arrays_to_state, start_state

_XLA_FLAGS = "--xla_allow_excess_precision=false"  # else fused bfloat16 is wider than it says


class Request(NamedTuple):
    """What is to be measured."""

    checkpoint_path: Path
    grown_path: Path
    """With or without its manifest."""
    growth: ModelGrowth
    batches: Sequence[Batch]
    evidence: str
    """What the batches are."""
    level: str
    """How much to measure, one of LEVELS."""


class Measured(NamedTuple):
    """A receipt, and what it took."""

    receipt: Receipt
    peak_bytes: int | None
    seconds: float


def measure_growth(request: Request) -> Receipt:
    """Compare grown and source checkpoint here and now (`measure_apart` does it in a process of its own).

    Raises:
        UsageError: if the level is none.
    """
    if request.level not in LEVELS:
        raise UsageError(f"receipt={request.level!r} must be one of {', '.join(LEVELS)}")
    growth = request.growth
    with Progress("receipt", total={"full": 5, "logits": 3, "arrays": 1}[request.level], unit="checks") as progress:
        arrays = check_arrays(request.checkpoint_path, request.grown_path, growth)
        progress.advance()
        receipt = Receipt(
            plan_hash=growth.hash,
            promise=growth.plan.promise,
            level=request.level,
            evidence=request.evidence,
            source_parameters=count_parameters(growth.source),
            grown_parameters=count_parameters(growth.target),
            grown_bytes=sum(_count_bytes(array) for array in open_arrays(request.grown_path).values()),
            axes=tuple(
                AxisSummary(
                    each.axis,
                    each.source,
                    each.target,
                    each.describe(),
                    each.promise,
                    each.breaker(growth.plan.choices),
                )
                for each in growth.plan.axes
            ),
            arrays=arrays,
            keeps_logits=growth.plan.choices.learned is None
            and all(each.operator["operator"] != "stack" for each in growth.plan.axes),
            exact_dynamics=growth.plan.choices.dynamics == "exact",
        )
        if request.level == "arrays" or arrays.structure:
            return receipt
        receipt = _add_logits(receipt, request, progress)
        return receipt if request.level == "logits" else _add_training(receipt, request, progress)


def _add_logits(receipt: Receipt, request: Request, progress: Progress) -> Receipt:
    growth = _as_stored(request)
    source, grown = (
        jax.device_put(_load_group(path, "parameters")) for path in (request.checkpoint_path, request.grown_path)
    )
    losses, seed = Losses(growth), growth.plan.choices.seed
    logits: dict[str, LogitDifference] = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        logits[jnp.dtype(dtype).name] = compare_logits(
            growth, source, grown, request.batches, seed, dtype, losses if dtype == jnp.float32 else None
        )
        progress.advance()
    return dataclasses.replace(
        receipt,
        num_target_tokens=int(losses.num_tokens),
        num_permutations=NUM_PERMUTATIONS,
        source_nll=losses.source_nll,
        nll_difference=losses.difference,
        logits=logits,
        new_tokens=losses.new_tokens(),
    )


def _add_training(receipt: Receipt, request: Request, progress: Progress) -> Receipt:
    growth, batch = _as_stored(request), request.batches[0]
    gradients, logits = None, dict(receipt.logits)
    with jax.enable_x64(True):
        if receipt.keeps_logits:
            gradients, logits["float64"] = check_gradients(
                growth,
                growth.target,
                _load_group(request.checkpoint_path, "parameters"),
                batch,
                growth.plan.choices.seed,
            )
        progress.advance()
        optimizer = load_checkpoint_info(request.grown_path).config.optimizer
        model = same_function(growth.source, growth.target)
        liveness = check_liveness(growth, model, optimizer, _load_state(request.grown_path, growth, optimizer), batch)
        progress.advance()
    return dataclasses.replace(receipt, gradients=gradients, logits=logits, liveness=liveness)


def _load_state(path: Path, growth: ModelGrowth, optimizer: OptimizerConfig) -> TrainState:
    """The grown state without its moving average."""
    groups = open_arrays(path).keys()
    arrays = load_arrays(path, tuple(name for name in groups if not name.startswith("ema.")))
    if "step" in arrays:
        return arrays_to_state(arrays)
    # A converted checkpoint, of parameters only: training begins with a fresh state.
    return start_state(_load_group(path, "parameters"), declare_parameters(growth.target), optimizer)


def _as_stored(request: Request) -> ModelGrowth:
    """The growth with the config that the grown checkpoint says it has."""
    return dataclasses.replace(request.growth, target=load_checkpoint_info(request.grown_path).config.model)


def _load_group(path: Path, group: str) -> dict[str, Any]:
    return {name.removeprefix(f"{group}."): array for name, array in load_arrays(path, (f"{group}.",)).items()}


def _count_bytes(array: Any) -> int:
    size = array.dtype.itemsize
    for each in array.shape:
        size *= each
    return size


def measure_apart(request: Request) -> Measured:
    """`measure_growth` in a process of its own, with its largest resident memory.

    Raises:
        OSError: if the process was killed, as systems do that run out of memory.
        T5PegasusError: whatever `measure_growth` raises.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} {_XLA_FLAGS}".strip()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        # What is freed goes back to the system at once: phases follow one another that hold arrays of other sizes.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, "-P", "-c", "from growth.verify import serve; serve()"]
    start = time.monotonic()
    done = subprocess.run(command, input=pickle.dumps(request), stdout=subprocess.PIPE, env=environment, check=False)
    if done.returncode in (-signal.SIGKILL, -signal.SIGABRT):  # by the system, or by XLA when it is refused memory
        raise _out_of_memory("was killed, most likely for want of memory")
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures the receipt ended with code {done.returncode}")
    outcome, peak_bytes = pickle.loads(done.stdout)
    if isinstance(outcome, MemoryError):
        raise _out_of_memory("had too little memory")
    if isinstance(outcome, Exception):
        raise outcome
    return Measured(outcome, peak_bytes, time.monotonic() - start)


def _out_of_memory(what: str) -> OSError:
    return OSError(
        errno.ENOMEM,
        f"the process that measures the receipt {what}; what was grown is kept: give the same command with --receipt "
        "logits or --receipt arrays, which take less",
    )


def serve() -> None:
    """The process itself: a request on its standard input, the receipt and its memory on its standard output."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever a library prints is no part of the answer
    request = pickle.load(sys.stdin.buffer)
    try:
        outcome: Any = measure_growth(request)
    except (ArtifactError, UsageError, MemoryError) as error:
        outcome = error
    with output:
        output.write(pickle.dumps((outcome, peak_memory())))


def peak_memory() -> int | None:
    """The largest resident memory of this process so far, in bytes; None where the system does not tell.

    (`getrusage` would count the parent's, too, since a process begins as its copy.)
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
