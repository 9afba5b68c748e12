"""Where a run's weights come from, decided in one place, and the checks at that border."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    find_last_good,
    has_optimizer_state,
    load_arrays,
    load_checkpoint_info,
)
from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.state import (
    TrainState,
    arrays_to_state,
    init_state,
    start_state,
    state_shardings,
    state_to_arrays,
)
from t5pegasus.train.step import resolve_compute_dtype


class Origin(NamedTuple):
    """Where a run's state comes from, and what it inherits."""

    state: TrainState
    resumed: bool
    """From a checkpoint of this very run."""
    history: tuple[dict[str, Any], ...]
    lineage: tuple[dict[str, Any], ...]


def find_origin(
    config: RunConfig,
    run_path: Path,
    start_from: Path | None,
    mesh: Mesh,
    manifest: dict[str, Any],
    *,
    keep_state: bool,
    reset_rows: bool,
) -> Origin:
    """The one place that decides where weights come from.

    1. the run's own last good checkpoint;
    2. the `start_from` checkpoint: a trained, grown or converted one;
    3. fresh ones.

    `manifest` is that of the examples; for the rest see `train_run`.

    Raises:
        UsageError: if the checkpoint and the config or the examples do not belong together.
        ArtifactError: if the checkpoint is damaged.
    """
    own = find_last_good(run_path)
    if own is not None:
        return _restore(own, config, mesh, manifest, reset_rows=False)._replace(resumed=True)
    if start_from is not None:
        path = find_checkpoint(start_from)
        if keep_state and has_optimizer_state(path):
            return _restore(path, config, mesh, manifest, reset_rows=reset_rows)
        return _restore_parameters(path, config, mesh, manifest)
    return Origin(init_state(config.model, config.train.seed, mesh), False, (), ())


def _restore(path: Path, config: RunConfig, mesh: Mesh, manifest: dict[str, Any], *, reset_rows: bool) -> Origin:
    info = load_checkpoint_info(path)
    _check_model(path, info, config)
    if config.train.compute_dtype == "auto":
        way_out = f"keep it by --train.compute-dtype {info.compute_dtype}, or name the other one"
        _check_same("compute dtype", path, info.compute_dtype, str(resolve_compute_dtype(config)), way_out)
    _check_tokenizer_of(path, info, manifest)
    if not reset_rows and info.rows > 0:
        way_out = (
            "give the examples and data lengths it was trained on, or begin a new run on the others at their first "
            f"row: --run-path NEW --start-from {path} --reset-rows"
        )
        _check_same("examples", path, info.examples_fingerprint, manifest["fingerprint"], way_out)
        _check_same("data config", path, info.config.data, config.data, way_out)
    shardings = state_shardings(declare_parameters(config.model), mesh)
    state = arrays_to_state(load_arrays(path, shardings=state_to_arrays(shardings)))
    if reset_rows:
        state = state._replace(rows=jax.device_put(jnp.zeros((), jnp.uint32), shardings.rows))
    return Origin(state, False, info.history, info.lineage)


def _restore_parameters(path: Path, config: RunConfig, mesh: Mesh, manifest: dict[str, Any]) -> Origin:
    info = load_checkpoint_info(path)
    _check_model(path, info, config)
    _check_tokenizer_of(path, info, manifest)
    specs = declare_parameters(config.model)
    shardings = state_shardings(specs, mesh)
    named = {f"parameters.{name}": sharding for name, sharding in shardings.parameters.items()}
    loaded = load_arrays(path, ("parameters.",), shardings=named)
    parameters = {name.removeprefix("parameters."): array for name, array in loaded.items()}
    state = jax.jit(lambda values: start_state(values, specs), out_shardings=shardings)(parameters)
    return Origin(state, False, (), info.lineage)


def _check_model(path: Path, info: CheckpointInfo, config: RunConfig) -> None:
    stored, wanted = dataclasses.asdict(info.config.model), dataclasses.asdict(config.model)
    for field, value in wanted.items():
        if field != "dropout_rate" and stored[field] != value:
            raise UsageError(
                f"checkpoint {path} has model.{field}={stored[field]!r}, got {value!r}; leave the model flags out, "
                "or make a larger checkpoint of it first with: t5pegasus grow"
            )


def _check_tokenizer_of(path: Path, info: CheckpointInfo, manifest: dict[str, Any]) -> None:
    way_out = f"build the examples with the checkpoint's tokenizer: --tokenizer-path {path / 'tokenizer'}"
    _check_same("tokenizer", path, info.tokenizer_fingerprint, manifest["tokenizer_fingerprint"], way_out)


def _check_same(what: str, path: Path, stored: Any, got: Any, way_out: str) -> None:
    if stored != got:
        raise UsageError(f"{what} of checkpoint {path} is {stored}, got {got}; {way_out}")
