"""Where a run's weights come from, decided in one place, and the checks at that border."""

import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    find_last_good,
    find_together,
    has_ema,
    has_optimizer_state,
    list_arrays,
    load_checkpoint_info,
    load_parameters,
    load_together,
    verify_structure,
)
from t5pegasus.config import RunConfig
from t5pegasus.data.mixture import Changes, change_weights
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.course import Course, read_course
from t5pegasus.train.data_sources import GivenExamples, follow_mixture
from t5pegasus.train.divergence import init_recent, spike_window
from t5pegasus.train.early_stopping import forget_best
from t5pegasus.train.metrics import count_flops
from t5pegasus.train.optimizer import Moments, declare_moments
from t5pegasus.train.phases import Event, check_events_kept, config_after
from t5pegasus.train.state import (
    TrainState,
    arrays_to_state,
    check_multipliers,
    init_state,
    start_state,
    state_shardings,
    state_to_arrays,
)

logger = logging.getLogger(__name__)


class Origin(NamedTuple):
    """Where a run's state comes from, and what it inherits."""

    step: int
    """Updates that it has made."""
    rows: int
    """Rows that it has consumed."""
    load: Callable[[], TrainState]
    """Puts it on the devices, which nothing before has touched."""
    resumed: bool
    """From a checkpoint of this very run."""
    course: Course
    lineage: tuple[dict[str, Any], ...]
    config: RunConfig
    """To train on with: the run's, after the events that this state has behind it."""
    path: Path | None
    """The checkpoint; None for fresh parameters."""
    mixture: Changes
    """Weights of the sources, each from the row on from which they hold."""


def find_origin(
    config: RunConfig,
    run_path: Path,
    start_from: Path | None,
    mesh: Mesh,
    examples: GivenExamples,
    *,
    keep_state: bool,
    reset_rows: bool,
    events: Sequence[Event] = (),
    recorded_events: Sequence[Mapping[str, Any]] = (),
    damaged: Collection[Path] = (),
) -> Origin:
    """The one place that decides where weights come from.

    1. the run's own last good checkpoint;
    2. the `start_from` checkpoint: a trained, grown or converted one;
    3. fresh ones.

    `recorded_events` are those in the run's config.json, `damaged` are checkpoints that could not be loaded; for the
    rest see `train_run`. Of the checkpoint the arrays are not read here: the state's `load` verifies what it reads of
    them, and so may raise a DamagedError, in every process alike.

    Raises:
        UsageError: if the checkpoint and the config or the examples do not belong together.
        ArtifactError: if the checkpoint is damaged.
    """
    own = find_together(run_path, lambda others: find_last_good(run_path, verify_structure, {*damaged, *others}))
    if own is not None:
        lineage = load_checkpoint_info(own).lineage
        check_events_kept(run_path, recorded_events, events, lineage)
        config = config_after(config, events, lineage)
        return _restore(own, config, mesh, examples, reset_rows=False)._replace(resumed=True)
    if start_from is not None:
        path = find_checkpoint(start_from, verify_structure, damaged)
        if keep_state and has_optimizer_state(path):
            origin = _restore(path, config, mesh, examples, reset_rows=reset_rows)
            # What that run was in the middle of is not for this one to end.
            course = Course(history=forget_best(origin.course.history), flops=origin.course.flops)
            return origin._replace(course=course)
        return _restore_parameters(path, config, mesh, examples)

    def init() -> TrainState:
        return init_state(config.model, config.train.seed, mesh, config.optimizer, **_kept(config))

    return Origin(
        step=0,
        rows=0,
        load=init,
        resumed=False,
        course=Course(),
        lineage=(),
        config=config,
        path=None,
        mixture=change_weights((), 0, examples.weights),
    )


def _restore(
    path: Path,
    config: RunConfig,
    mesh: Mesh,
    examples: GivenExamples,
    *,
    reset_rows: bool,
) -> Origin:
    info = load_checkpoint_info(path)
    _check_model(path, info, config)
    _check_optimizer(path, info, config)
    if config.train.compute_dtype == "auto":
        way_out = f"keep it by --train.compute-dtype {info.compute_dtype}, or name the other one"
        _check_same("compute dtype", path, info.compute_dtype, str(resolve_compute_dtype(config)), way_out)
    _check_tokenizer_of(path, info, examples)
    begins_rows = reset_rows or info.rows == 0
    mixture = change_weights((), 0, examples.weights) if begins_rows else follow_mixture(path, info, examples, config)
    specs, stored_ema = declare_parameters(config.model), has_ema(path)
    if stored_ema and not _keeps_ema(config):
        logger.warning("%s: its moving average is left behind, because train.ema_decay is 0", path)

    window = spike_window(config.train)
    stored_window = spike_window(info.config.train) == window and "recent.count" in list_arrays(path)

    def load() -> TrainState:
        kept = {"with_ema": stored_ema and _keeps_ema(config), "window": window * stored_window}
        shardings = state_shardings(specs, mesh, config.optimizer, **kept)
        state = arrays_to_state(load_together(path, state_to_arrays(shardings)))
        if window and not stored_window:  # spikes are known by what comes from here on
            state = state._replace(recent=jax.device_put(jax.tree.map(np.asarray, init_recent(window)), shardings.step))
        if _keeps_ema(config) and not stored_ema:  # it begins here, at the parameters
            state = state._replace(ema={name: jnp.copy(array) for name, array in state.parameters.items()})
        if reset_rows:
            state = state._replace(rows=jax.device_put(jnp.zeros((), jnp.uint32), shardings.rows))
        return state

    rows = 0 if reset_rows else info.rows
    course = read_course(info, _flops_spent(path, info))
    return Origin(info.step, rows, load, False, course, info.lineage, config, path, mixture)


def _restore_parameters(path: Path, config: RunConfig, mesh: Mesh, examples: GivenExamples) -> Origin:
    info = load_checkpoint_info(path)
    _check_model(path, info, config)
    _check_tokenizer_of(path, info, examples)
    specs = declare_parameters(config.model)

    def load() -> TrainState:
        shardings = state_shardings(specs, mesh, config.optimizer, **_kept(config))
        parameters = load_parameters(path, shardings=shardings.parameters)

        def start(values: dict[str, jax.Array]) -> TrainState:
            return start_state(values, specs, config.optimizer, **_kept(config))

        return jax.jit(start, out_shardings=shardings)(parameters)

    course, mixture = Course(flops=_flops_spent(path, info)), change_weights((), 0, examples.weights)
    return Origin(0, 0, load, False, course, info.lineage, config, path, mixture)


def _flops_spent(path: Path, info: CheckpointInfo) -> int:
    """FLOPs of the training behind a checkpoint; where it does not say, as if its model had read all of its rows."""
    if info.flops is not None:
        return info.flops
    if info.lineage:
        logger.warning(
            "%s does not say what its training took; FLOPs are counted as if it had always been this large", path
        )
    return count_flops(info.config, info.rows)


def _keeps_ema(config: RunConfig) -> bool:
    return config.train.ema_decay > 0


def _kept(config: RunConfig) -> dict[str, Any]:
    """What a state of this config holds beside parameters and moments."""
    return {"with_ema": _keeps_ema(config), "window": spike_window(config.train)}


def _check_model(path: Path, info: CheckpointInfo, config: RunConfig) -> None:
    stored, wanted = dataclasses.asdict(info.config.model), dataclasses.asdict(config.model)
    for field, value in wanted.items():
        if field != "dropout_rate" and stored[field] != value:
            raise UsageError(
                f"checkpoint {path} has model.{field}={stored[field]!r}, got {value!r}; leave the model flags out, "
                "or make a larger checkpoint of it first with: t5pegasus grow"
            )


def _check_optimizer(path: Path, info: CheckpointInfo, config: RunConfig) -> None:
    """The state must be what this optimizer keeps, array by array."""
    names = list_arrays(path)
    check_multipliers(names)
    way_out = f"continue with the same, or take the parameters alone: t5pegasus finetune {path}"
    stored, wanted = info.config.optimizer, config.optimizer
    _check_same("optimizer.name", path, stored.name, wanted.name, way_out)
    _check_same("optimizer.moment_dtype", path, stored.moment_dtype, wanted.moment_dtype, way_out)
    before, now = (declare_moments(each, declare_parameters(config.model)) for each in (stored, wanted))
    if before != now:
        _check_same("optimizer.beta1", path, stored.momentum, wanted.momentum, way_out)
        sizes = stored.min_dim_size_to_factor, wanted.min_dim_size_to_factor
        _check_same("optimizer.min_dim_size_to_factor", path, *sizes, way_out)
    expected = {f"{kind}.{name}" for kind, group in now.items() for name in group}
    kept = {name for name in names if name.partition(".")[0] in Moments._fields}
    if expected != kept:
        raise ArtifactError(
            f"optimizer state of checkpoint {path} {'has' if kept - expected else 'lacks'} {min(expected ^ kept)}; "
            f"take its parameters alone: t5pegasus finetune {path}"
        )


def _check_tokenizer_of(path: Path, info: CheckpointInfo, examples: GivenExamples) -> None:
    got, wanted = examples.manifest["tokenizer_fingerprint"], info.tokenizer_fingerprint
    if got != wanted:
        raise UsageError(
            f"the examples {examples.path} have another tokenizer than checkpoint {path}: {got[:12]}…, {wanted[:12]}… "
            f"was wanted; build them with the checkpoint's: --tokenizer-path {path / 'tokenizer'}"
        )


def _check_same(what: str, path: Path, stored: Any, got: Any, way_out: str) -> None:
    if stored != got:
        raise UsageError(f"{what} of checkpoint {path} is {stored}, got {got}; {way_out}")
