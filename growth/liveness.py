"""Whether what growth added takes part in training: two updates of the grown state by its own optimizer, in float64."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growth.gradients import grown_gradients
from growth.index_map import IndexMap
from growth.operators import KINDS
from growth.receipt import Liveness
from growth.t5 import ModelGrowth
from t5pegasus.axes import logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig, OptimizerConfig
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.optimizer import apply_optimizer
from t5pegasus.train.state import TrainState, start_state

NUM_UPDATES = 2
_PARTED = 1e-9
"""Of a copy's way in the updates, the share by which it must differ from the way of what it is a copy of."""


def check_liveness(
    growth: ModelGrowth, model: ModelConfig, optimizer: OptimizerConfig, state: TrainState, batch: Batch
) -> dict[str, Liveness]:
    """Update twice and see which created entries have had a gradient, and which copies went ways of their own.

    The learning rate is the optimizer's peak, whatever its schedule says now, and nothing is frozen; dropout, which
    would part any copies, is off. Rows of tables, which live by the data that hit them, are left out.

    Args:
        growth: what was planned.
        model: the grown one.
        optimizer: of the grown state.
        state: the grown one, of arrays; without moments and records the optimizer begins with fresh ones.
        batch: to train on.
    """
    before = state.parameters
    state = jax.tree.map(_widen, state._replace(ema={}))  # which takes no part
    if not state.multipliers:
        state = start_state(state.parameters, declare_parameters(model), optimizer)
    ever: dict[str, Any] = {}
    for update in range(NUM_UPDATES + 1):
        gradients = grown_gradients(model, state.parameters, batch)[0]
        ever = {name: ever.get(name, False) | (np.asarray(each) != 0) for name, each in gradients.items()}
        if update < NUM_UPDATES:
            state = _update(model, optimizer, state, gradients)
        del gradients  # before the next ones are computed
    ways = {name: np.asarray(array) - before[name] for name, array in state.parameters.items()}
    return {
        axis: _look_at(axis, growth, ever, ways)
        for axis in growth.plan.maps
        if KINDS[logical_axis(axis)] in ("stream", "units", "layers")
    }


def _widen(array: Any) -> jax.Array:
    array = np.asarray(array)
    return jax.device_put(array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array)


def _look_at(axis: str, growth: ModelGrowth, ever: Mapping[str, Any], ways: Mapping[str, Any]) -> Liveness:
    entry = growth.plan.maps[axis]
    created = np.flatnonzero(entry.created)
    alive, silent = np.ones(len(created), bool), []
    copies, earlier = _pair_copies(entry)
    parted = np.zeros(len(copies), bool)
    kind = KINDS[logical_axis(axis)]
    for name, spec in growth.specs.items():
        if axis not in spec.axes:
            continue
        place = spec.axes.index(axis)
        reached = ever[name].any(axis=tuple(each for each in range(ever[name].ndim) if each != place))[created]
        alive &= reached
        if len(created) and not reached.any():
            silent.append(name)
        if len(copies) and kind != "layers" and axis not in spec.contracted and not spec.gain:
            way = np.moveaxis(ways[name], place, 0).reshape(entry.size, -1)
            way = way / entry.written[:, None]
            size = np.linalg.norm(way, axis=1)
            for pair, (copy, other) in enumerate(zip(copies, earlier)):
                parted[pair] |= np.linalg.norm(way[copy] - way[other]) > _PARTED * size[other]
    stacked = kind == "layers"  # copies of layers stand at other places: nothing holds them together
    copied = {*copies} if not stacked else set()
    alike = {*copies[~parted], *earlier[~parted]}
    return Liveness(
        created=len(created),
        alive=int(alive.sum()),
        silent_parameters=tuple(silent),
        copied=len(copied),
        parted=len(copied - alike),
    )


def _pair_copies(entry: IndexMap) -> tuple[np.ndarray, np.ndarray]:
    """Each copy with every earlier entry that is the same source entry."""
    pairs = [
        (copy, other)
        for copy in np.flatnonzero(entry.copied)
        for other in np.flatnonzero((entry.sources[:copy] == entry.sources[copy]) & ~entry.created[:copy])
    ]
    copies, earlier = np.array(pairs, int).reshape(-1, 2).T
    return copies, earlier


@functools.partial(
    jax.jit,
    static_argnums=(0, 1),
    donate_argnums=2,
    compiler_options={"xla_backend_optimization_level": 0},
)
def _update(
    model: ModelConfig, optimizer: OptimizerConfig, state: TrainState, gradients: Mapping[str, Any]
) -> TrainState:
    parameters, moments = apply_optimizer(
        optimizer,
        declare_parameters(model),
        state.multipliers,
        state.parameters,
        gradients,
        state.moments,
        state.step,
        jnp.float64(optimizer.learning_rate),
    )
    return state._replace(step=state.step + 1, parameters=parameters, **moments._asdict())
