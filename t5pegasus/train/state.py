"""What a run carries from update to update, and its flat form on disk."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5pegasus.axes import AxisMultiplier, ParamSpec
from t5pegasus.config import ModelConfig, OptimizerConfig
from t5pegasus.errors import ArtifactError
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.sharding import param_shardings
from t5pegasus.train.divergence import init_recent
from t5pegasus.train.optimizer import Moments, declare_moments, init_moments, init_multipliers

_ADAMW = OptimizerConfig()


class TrainState(NamedTuple):
    """Parameters, optimizer state, growth multipliers and the position in the data."""

    step: Any
    """int32 scalar: updates made."""
    rows: Any
    """uint32 scalar: rows of the packed stream consumed, which is the whole data position."""
    parameters: dict[str, Any]
    first_moment: dict[str, Any]
    """This and the three other moments hold what the optimizer keeps of each parameter: `declare_moments`."""
    second_moment: dict[str, Any]
    multipliers: dict[str, AxisMultiplier]
    ema: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Exponential moving average of the parameters, by the same names; empty where the run keeps none."""
    row_moment: dict[str, Any] = {}  # noqa: RUF012 - never written to
    column_moment: dict[str, Any] = {}  # noqa: RUF012 - never written to
    recent: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """Losses and gradient norms of the last updates, by which a spike is known (`divergence`); or empty."""

    @property
    def moments(self) -> Moments:
        """The optimizer's part of the state."""
        return Moments(*(getattr(self, kind) for kind in Moments._fields))


def evaluated_parameters(state: TrainState) -> dict[str, Any]:
    """The weights to evaluate a state with: the moving average where there is one, else the trained ones.

    `checkpoint.load_parameters` decides the same for a state on disk.
    """
    return state.ema or state.parameters


def start_state(
    parameters: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    optimizer: OptimizerConfig = _ADAMW,
    *,
    with_ema: bool = False,
    window: int = 0,
) -> TrainState:
    """The state before the first update of these parameters by this optimizer; `window` is that of `init_recent`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        rows=jnp.zeros((), jnp.uint32),
        parameters=dict(parameters),
        **init_moments(optimizer, specs, parameters)._asdict(),
        multipliers=init_multipliers(specs),
        ema={name: jnp.copy(value) for name, value in parameters.items()} if with_ema else {},
        recent=init_recent(window),
    )


def init_state(
    config: ModelConfig,
    seed: int,
    mesh: Mesh,
    optimizer: OptimizerConfig = _ADAMW,
    *,
    with_ema: bool = False,
    window: int = 0,
) -> TrainState:
    """A fresh state, created in place on the mesh: no device ever holds more than its shards.

    The numbers depend on the seed alone, not on the mesh.
    """
    specs = declare_parameters(config)

    def create(seed: jax.Array) -> TrainState:
        return start_state(init_parameters(config, seed), specs, optimizer, with_ema=with_ema, window=window)

    shardings = state_shardings(specs, mesh, optimizer, with_ema=with_ema, window=window)
    return jax.jit(create, out_shardings=shardings)(np.uint32(seed))


def state_shardings(
    specs: Mapping[str, ParamSpec],
    mesh: Mesh,
    optimizer: OptimizerConfig = _ADAMW,
    *,
    with_ema: bool = False,
    window: int = 0,
) -> TrainState:
    """A TrainState of shardings: moments and averages are split as their parameters; the rest is on every device."""
    of_parameters = param_shardings(specs, mesh)
    of_moments = {
        kind: param_shardings({name: moment.spec for name, moment in group.items()}, mesh)
        for kind, group in declare_moments(optimizer, specs).items()
    }
    everywhere = NamedSharding(mesh, PartitionSpec())
    axes = {axis for spec in specs.values() for axis in spec.axes}
    return TrainState(
        step=everywhere,
        rows=everywhere,
        parameters=of_parameters,
        **of_moments,
        multipliers={axis: AxisMultiplier(*(everywhere for _ in AxisMultiplier._fields)) for axis in sorted(axes)},
        ema=dict(of_parameters) if with_ema else {},
        recent=dict.fromkeys(init_recent(window), everywhere),
    )


def state_to_arrays(state: TrainState) -> dict[str, Any]:
    """Flat dotted names → leaves, the form checkpoints store; works on states of arrays or of shardings."""
    arrays = {"step": state.step, "rows": state.rows}
    for group in ("parameters", *Moments._fields, "ema", "recent"):
        arrays |= {f"{group}.{name}": leaf for name, leaf in getattr(state, group).items()}
    for axis, multiplier in state.multipliers.items():
        arrays |= {f"multipliers.{axis}.{field}": array for field, array in multiplier._asdict().items()}
    return arrays


def arrays_to_state(arrays: Mapping[str, Any]) -> TrainState:
    """The inverse of `state_to_arrays`.

    Raises:
        ArtifactError: if growth's record of an axis is not whole.
    """

    def group(prefix: str) -> dict[str, Any]:
        return {name.removeprefix(prefix): leaf for name, leaf in arrays.items() if name.startswith(prefix)}

    multipliers = group("multipliers.")
    axes = {name.rpartition(".")[0] for name in multipliers}
    check_multipliers(arrays)
    return TrainState(
        step=arrays["step"],
        rows=arrays["rows"],
        parameters=group("parameters."),
        **{kind: group(f"{kind}.") for kind in Moments._fields},
        multipliers={
            axis: AxisMultiplier(*(multipliers[f"{axis}.{field}"] for field in AxisMultiplier._fields))
            for axis in sorted(axes)
        },
        ema=group("ema."),
        recent=group("recent."),
    )


def check_multipliers(names: Collection[str]) -> None:
    """Refuse a state whose record of growth lacks fields.

    Args:
        names: of all of its arrays.

    Raises:
        ArtifactError: naming the first array that is absent.
    """
    axes = {name.rpartition(".")[0] for name in names if name.startswith("multipliers.")}
    for axis in sorted(axes):
        for field in AxisMultiplier._fields:
            if f"{axis}.{field}" not in names:
                raise ArtifactError(
                    f"the checkpoint has no array {axis}.{field}: an earlier version wrote it, which recorded less of "
                    "growth; continue it with that version, or take its parameters alone: t5pegasus finetune"
                )
