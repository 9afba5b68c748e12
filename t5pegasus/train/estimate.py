"""What a run will take, said before it takes it: memory from shapes and from the compiled update, time from FLOPs."""

import dataclasses
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig, TrainConfig
from t5pegasus.model.flops import training_flops_per_row
from t5pegasus.model.t5 import count_parameters, declare_parameters
from t5pegasus.progress import format_count, format_seconds
from t5pegasus.sharding import batch_shardings
from t5pegasus.train.divergence import spike_window
from t5pegasus.train.groups import count_trained, learning_rate_factors
from t5pegasus.train.metrics import peak_flops
from t5pegasus.train.on_mesh import OnMesh
from t5pegasus.train.state import TrainState, start_state, state_shardings

logger = logging.getLogger(__name__)

GUESSED_UTILISATION = 0.3
"""Share of the peak that training is guessed to reach, before there is anything to measure."""


_STATE_WAY_OUT = "split it: --mesh.fsdp, or a smaller model"


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device that holds most."""

    state_bytes: int
    """Parameters, moments, moving average and multipliers: exact, from shapes and shardings."""
    step_bytes: int | None
    """The state and a batch, with the gradients and activations of an update, as XLA planned them; None where it does
    not say."""
    device_bytes: int | None
    """What the device has for programs; None where it does not say (a CPU)."""


def prepare_step(
    config: RunConfig,
    mesh: Mesh,
    train_step: OnMesh,
    steps_done: int,
    last_step: int | None = None,
    *,
    tells: bool = True,
) -> tuple[jax.stages.Compiled, MemoryEstimate]:
    """Compile the update before any weight is on a device, and log what the run will take.

    Warns if the state, or an update, needs more memory than a device has. The time is that of the updates behind
    `steps_done` up to `last_step`, or to the end of the run; that of evaluations, samples and checkpoints is not in it.
    Where `tells` is false, what was said of the run before is not said again.
    """
    specs = declare_parameters(config.model)
    shown = logging.INFO if jax.process_index() == 0 and tells else logging.DEBUG
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    state_bytes = sum(bytes_per_device(leaf) for leaf in jax.tree.leaves(state))
    device = jax.local_devices()[0]
    device_bytes = _read_device_bytes(device)
    train, data = config.train, config.data
    num_updates = (last_step or train.steps) - steps_done
    positions = num_updates * train.batch_size * (data.max_source_tokens + data.max_target_tokens)
    trained = count_trained(learning_rate_factors(config.optimizer, specs), specs)
    total = count_parameters(config.model)
    logger.log(
        shown, "%s parameters%s; %s updates of %d rows of %d + %d tokens, %s positions",
        f"{total:,}", "" if trained == total else f", {trained:,} of them trained", f"{num_updates:,}",
        train.batch_size, data.max_source_tokens, data.max_target_tokens, format_count(positions),
    )  # fmt: skip
    _warn_if_over(device_bytes, state_bytes, "the training state takes", _STATE_WAY_OUT)
    compiled = train_step.compile(state, batch)
    memory = MemoryEstimate(state_bytes, planned_bytes(compiled), device_bytes)
    logger.log(
        shown, "memory per device: %s of state%s%s",
        _format_bytes(state_bytes),
        "" if memory.step_bytes is None else f", {_format_bytes(memory.step_bytes)} in all as XLA planned an update",
        "" if device_bytes is None else f"; the device has {_format_bytes(device_bytes)}",
    )  # fmt: skip
    way_out = "raise --train.accumulation-steps, lower --train.batch-size, shorten --data.max-source-tokens"
    _warn_if_over(device_bytes, memory.step_bytes, "an update takes", way_out)
    flops = num_updates * train.batch_size * training_flops_per_row(
        config.model, data.max_source_tokens, data.max_target_tokens
    )  # fmt: skip
    peak, source = peak_flops(device)
    seconds = flops / (GUESSED_UTILISATION * peak * mesh.size)
    logger.log(
        shown, "time: about %s for %sFLOP at %d %% of the peak, a guess (%sFLOP/s per device, %s)%s; what is left is "
        "measured as it goes", format_seconds(seconds), _format_flops(flops), 100 * GUESSED_UTILISATION,
        _format_flops(peak), source, _describe_rest(train),
    )  # fmt: skip
    return compiled, memory


def _describe_rest(train: TrainConfig) -> str:
    """What a run does beside its updates, of which the estimate knows nothing."""
    beside = [
        f"{what} every {every:,} updates"
        for what, every in (
            ("evaluating", train.evaluate_every_steps),
            ("sampling", train.sample_every_steps),
            ("saving", train.save_every_steps),
        )
        if every
    ]
    return f", without compiling and {', '.join(beside)}" if beside else ", without compiling"


def abstract_state(config: RunConfig, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a run's state."""
    specs = declare_parameters(config.model)
    kept: dict[str, Any] = {"with_ema": config.train.ema_decay > 0, "window": spike_window(config.train)}
    parameters = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    shapes = jax.eval_shape(lambda values: start_state(values, specs, config.optimizer, **kept), parameters)
    return jax.tree.map(_placed, shapes, state_shardings(specs, mesh, config.optimizer, **kept))


def check_state_fits(state: TrainState, subject: str) -> None:
    """Warn if an abstract state needs more memory than a device has; `subject` begins the sentence."""
    state_bytes = sum(bytes_per_device(leaf) for leaf in jax.tree.leaves(state))
    _warn_if_over(_read_device_bytes(jax.local_devices()[0]), state_bytes, subject, _STATE_WAY_OUT)


def abstract_batch(config: RunConfig, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a run's batches."""
    size, data = config.train.batch_size, config.data
    source = jax.ShapeDtypeStruct((size, data.max_source_tokens), jnp.int32)
    target = jax.ShapeDtypeStruct((size, data.max_target_tokens), jnp.int32)
    shapes = Batch(
        encoder_input_tokens=source,
        encoder_segment_ids=source,
        encoder_positions=source,
        decoder_input_tokens=target,
        decoder_target_tokens=target,
        decoder_loss_weights=jax.ShapeDtypeStruct(target.shape, jnp.float32),
        decoder_segment_ids=target,
        decoder_positions=target,
        row_ids=jax.ShapeDtypeStruct((size,), jnp.uint32),
        source_ids=jax.ShapeDtypeStruct((size,), jnp.int32),
        num_bad_examples=jax.ShapeDtypeStruct((size,), jnp.int32),
    )
    return jax.tree.map(_placed, shapes, batch_shardings(mesh))


def _placed(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _read_device_bytes(device: Any) -> int | None:
    return (device.memory_stats() or {}).get("bytes_limit")


def bytes_per_device(leaf: jax.ShapeDtypeStruct) -> int:
    """What one device holds of an abstract array with a sharding."""
    shape = leaf.sharding.shard_shape(leaf.shape)  # pyright: ignore[reportOptionalMemberAccess]
    return math.prod(shape) * np.dtype(leaf.dtype).itemsize


def planned_bytes(compiled: Any) -> int | None:
    """What a compiled step needs on a device, as XLA planned it; None where it does not say."""
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    # What is donated is counted among arguments and outputs, but is there once.
    return plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes


def _warn_if_over(limit: int | None, wanted: int | None, what: str, way_out: str) -> None:
    if limit is not None and wanted is not None and wanted > limit:
        logger.warning("%s %s, a device has %s: %s", what, _format_bytes(wanted), _format_bytes(limit), way_out)


def _format_bytes(number: int) -> str:
    for divisor, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= divisor:
            return f"{number / divisor:.2f} {unit}"
    return f"{number / 1e3:.2f} kB"


def _format_flops(number: float) -> str:
    for divisor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T")):
        if number >= divisor:
            return f"{number / divisor:.1f} {prefix}"
    return f"{number / 1e9:.1f} G"
