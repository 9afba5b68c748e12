"""Growth of a state that lies on a mesh, for growing inside a running job.

A device computes its part of each grown array from its part of the source's, without talking to the others, because
maps are made so that every share of an axis grows from the same share (`growth.index_map.spread`). Only the statistics
that random and created entries take, a few numbers for each array, are gathered across devices beforehand.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from growth.blocks import Constants, LeafGrowth, View, compute_block
from growth.leaves import begin_statistics, plan_leaf
from growth.moments import grow_records
from growth.statistics import Gathering, LeafStatistics
from growth.t5 import ModelGrowth
from t5pegasus.axes import AxisMultiplier, ParamSpec
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.state import TrainState, state_shardings

logger = logging.getLogger(__name__)


def grow_on_mesh(state: TrainState, growth: ModelGrowth, mesh: Mesh) -> TrainState:
    """The state of the grown model, on the same mesh, array by array; the state that is given is consumed.

    The same plan gives the same bits as on the host, but for what hangs on sums over a whole array (the spread of
    random entries, the means that created ones begin as), whose order of addition is the mesh's.

    Args:
        state: of the source model, laid out by `t5pegasus.train.state.state_shardings`.
        growth: where to.
        mesh: the mesh it lies on.

    Raises:
        UsageError: if the mesh does not divide a size of the grown model, or the plan has learned maps.
    """
    if growth.plan.choices.learned is not None:
        raise UsageError(
            "the plan has learned maps, which are trained on batches: growth.learned.learn_growth takes them"
        )
    shardings = state_shardings(declare_parameters(growth.target), mesh, growth.optimizer, with_ema=bool(state.ema))
    grown: dict[str, dict[str, jax.Array]] = {}
    moving: set[str] = set()
    for group, arrays in growth.split_state(state._asdict()).items():
        grown[group] = {}
        specs, power = growth.parts[group]
        for name, array in arrays.items():
            statistics = _measure(group, specs[name], array, growth, mesh)
            leaf = plan_leaf(group, name, specs[name], growth.plan, statistics, array.dtype, power=power)
            sharding = getattr(shardings, group)[name]
            if not is_local(leaf, sharding):
                moving.add(name)
            grown[group][name] = grow_array(array, leaf, sharding)
            array.delete()  # so that no more than one array lies there twice
    if moving:
        logger.warning(
            "growing %s moved entries between devices, because their maps are not the same in every share of the mesh "
            "(%s); layout 'spread' and sizes that the mesh divides avoid that",
            ", ".join(sorted(moving)),
            dict(mesh.shape),
        )  # fmt: skip
    everywhere = NamedSharding(mesh, PartitionSpec())
    records = {axis: AxisMultiplier(*map(np.asarray, each)) for axis, each in state.multipliers.items()}
    multipliers = jax.device_put(grow_records(records, growth.plan.maps, growth.plan.born), everywhere)
    return state._replace(**grown, multipliers=multipliers)


def grow_array(array: jax.Array, leaf: LeafGrowth, sharding: NamedSharding) -> jax.Array:
    """One array of the grown model.

    Args:
        array: the source's, split along the same mesh axes as the result is to be.
        leaf: how it grows.
        sharding: of the result.
    """
    program, arguments = prepare(array, leaf, sharding)
    return program(*arguments)


def prepare(array: jax.Array, leaf: LeafGrowth, sharding: NamedSharding) -> tuple[Any, tuple[Any, ...]]:
    """The jitted program that grows an array, and its arguments; arrays of equal kind share a program."""
    mesh = sharding.mesh
    specs = _mesh_axes(leaf, sharding)
    local = is_local(leaf, sharding)
    place = specs if local else (None,) * len(specs)
    views, view_specs = [], []
    for view, size, spec in zip(leaf.views, leaf.source_shape, place):
        parts = 1 if spec is None else mesh.shape[spec]
        offsets = np.repeat(np.arange(parts) * (size // parts), len(view.positions) // parts)
        sources = view.source_positions - offsets
        identity = len(view.positions) == size and np.array_equal(sources, np.tile(np.arange(size // parts), parts))
        relative = view._replace(sources=None if identity else sources)
        views.append(View(*(None if vector is None else _narrow(vector) for vector in relative)))
        flat = PartitionSpec(spec)
        wide = PartitionSpec(None, spec)
        view_specs.append(
            View(*(None if vector is None else wide if np.ndim(vector) == 2 else flat for vector in view))
        )
    constants = jax.tree.map(_narrow, leaf.constants)
    program = _program(mesh, sharding, PartitionSpec(*place), tuple(view_specs), leaf.layers, local)
    return program, (array, tuple(views), constants)


@functools.lru_cache(maxsize=256)
def _program(
    mesh: Mesh, sharding: NamedSharding, place: PartitionSpec, view_specs: tuple[View, ...], layers: int | None,
    local: bool,
) -> Any:  # fmt: skip
    def compute(array: jax.Array, views: tuple[View, ...], constants: Constants) -> jax.Array:
        return compute_block(array, views, constants, layers)

    if local:
        compute = jax.shard_map(
            compute, mesh=mesh, in_specs=(place, view_specs, PartitionSpec()), out_specs=place, check_vma=False
        )
    return jax.jit(compute, out_shardings=sharding)


def is_local(leaf: LeafGrowth, sharding: NamedSharding) -> bool:
    """Whether every device makes its part of an array from its part of the source's."""

    def same_share(view: View, source_size: int, parts: int) -> bool:
        if source_size % parts or len(view.positions) % parts:
            return False
        owners = np.repeat(np.arange(parts), len(view.positions) // parts)
        return np.array_equal(view.source_positions // (source_size // parts), owners)

    return all(
        axis is None or same_share(view, size, sharding.mesh.shape[axis])
        for view, size, axis in zip(leaf.views, leaf.source_shape, _mesh_axes(leaf, sharding))
    )


def _mesh_axes(leaf: LeafGrowth, sharding: NamedSharding) -> tuple[str | None, ...]:
    return (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))


def _narrow(vector: Any) -> Any:
    """Host vectors in the width that JAX works in."""
    array = np.asarray(vector)
    return array if array.dtype == np.uint32 else array.astype(jax.dtypes.canonicalize_dtype(array.dtype))


def _measure(group: str, spec: ParamSpec, array: jax.Array, growth: ModelGrowth, mesh: Mesh) -> LeafStatistics | None:
    """What growing an array takes beside its entries, summed across devices."""
    gathering = begin_statistics(group, spec, growth.plan)
    if gathering is None:
        return None
    everywhere = NamedSharding(mesh, PartitionSpec())
    sums = jax.jit(functools.partial(_sums, layers=gathering.layers), out_shardings=everywhere)(array)
    rows = None
    if gathering.mixed is not None:
        rows = jax.jit(functools.partial(_mix_rows, gathering=gathering), out_shardings=everywhere)(array)
        rows = np.asarray(rows, np.float64)
    square, mean, marginals = jax.tree.map(lambda each: np.asarray(each, np.float64), sums)
    return LeafStatistics(np.sqrt(square), mean, tuple(marginals), rows)


def _sums(array: jax.Array, layers: int | None) -> tuple[jax.Array, jax.Array, list[jax.Array | None]]:
    inner = tuple(place for place in range(array.ndim) if place != layers)

    def margin(place: int) -> jax.Array | None:
        if place == layers:
            return None
        mean = jnp.mean(array, axis=tuple(each for each in inner if each != place))
        return mean.T if layers is not None and place < layers else mean

    marginals = [margin(place) for place in range(array.ndim)]
    return jnp.mean(jnp.square(array), axis=inner), jnp.mean(array, axis=inner), marginals


def _mix_rows(array: jax.Array, gathering: Gathering) -> jax.Array:
    assert gathering.mixed is not None
    dimension, mixtures = gathering.mixed
    rows = jnp.moveaxis(array, dimension, 0)
    longest = max(1 if each is None else len(each) for each in mixtures)
    pieces = np.zeros((len(mixtures), longest), np.int32)
    shares = np.zeros((len(mixtures), longest))
    for place, each in enumerate(mixtures):
        if each is not None:
            pieces[place, : len(each)], shares[place, : len(each)] = each, 1 / len(each)

    def spread(shares: np.ndarray) -> jax.Array:
        return jnp.asarray(shares, rows.dtype).reshape(-1, *[1] * (rows.ndim - 1))

    mixed = sum(rows[pieces[:, place]] * spread(shares[:, place]) for place in range(longest))
    whole = np.array([each is None for each in mixtures])
    return jnp.where(whole.reshape(-1, *[1] * (rows.ndim - 1)), jnp.mean(rows, axis=0)[None], mixed)
