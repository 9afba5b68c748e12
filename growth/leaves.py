"""Which arrays of a grown state are made how: parameters, their moving average and their moments, by name."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from growth.blocks import LeafGrowth, whole
from growth.operators import KINDS, grow_moment, grow_parameter, needs_statistics
from growth.plan import GrowthPlan
from growth.statistics import Gathering, LeafStatistics
from t5pegasus.axes import ParamSpec, logical_axis

WEIGHTS = ("parameters", "ema")
MOMENTS = ("first_moment", "second_moment", "row_moment", "column_moment")
GROUPS = (*WEIGHTS, *MOMENTS)
"""The parts of a state that have arrays by parameter name."""


def begin_statistics(
    group: str, spec: ParamSpec, plan: GrowthPlan, kinds: Mapping[str, str] = KINDS
) -> Gathering | None:
    """What has to be gathered from the source's array before it can grow; None: nothing."""
    if group == "first_moment" or (group == "second_moment" and plan.choices.state == "reset"):
        return None
    noise = plan.choices.noise if group in WEIGHTS else 0.0
    if not needs_statistics(spec, plan.maps, noise=noise, kinds=kinds):
        return None
    layers = next((place for place, axis in enumerate(spec.axes) if kinds.get(logical_axis(axis)) == "layers"), None)
    rows = next(
        ((place, plan.maps[axis].mixtures) for place, axis in enumerate(spec.axes)
         if axis in plan.maps and plan.maps[axis].mixtures),
        None,
    )  # fmt: skip
    return Gathering(spec.shape, layers, rows)


def plan_leaf(
    group: str,
    name: str,
    spec: ParamSpec,
    plan: GrowthPlan,
    statistics: LeafStatistics | None,
    dtype: Any = np.float32,
    kinds: Mapping[str, str] = KINDS,
    power: int | None = None,
) -> LeafGrowth:
    """How one array of the state grows.

    Args:
        group: which part of the state, one of GROUPS.
        name: of the parameter; with the plan's seed it decides the random numbers.
        spec: declaration of the source's array: the parameter's, or what `ParamSpec.restrict` leaves of it.
        plan: what to do.
        statistics: what `begin_statistics` gathered.
        dtype: of the array.
        kinds: kind of each logical axis.
        power: of the gradients' multipliers in a moment; None: 1 in a first moment, 2 in the others.
    """
    choices = plan.choices
    if group in WEIGHTS:
        return grow_parameter(
            name, spec, plan.maps, statistics, seed=choices.seed, noise=choices.noise, dtype=dtype, kinds=kinds
        )
    if power is None:
        power = 1 if group == "first_moment" else 2
    return grow_moment(name, spec, plan.maps, statistics, power=power, state=choices.state, dtype=dtype, kinds=kinds)


def grow_arrays(
    group: str,
    arrays: Mapping[str, Any],
    specs: Mapping[str, ParamSpec],
    plan: GrowthPlan,
    kinds: Mapping[str, str] = KINDS,
    power: int | None = None,
) -> dict[str, np.ndarray]:
    """One part of a state, grown in the host's memory.

    Args:
        group: which part, one of GROUPS.
        arrays: by parameter name.
        specs: declarations of the source's arrays.
        plan: what to do.
        kinds: kind of each logical axis.
        power: see `plan_leaf`.

    Returns:
        NumPy arrays of the target's sizes, in the precision of the given ones.
    """
    grown = {}
    for name, array in arrays.items():
        host, spec = np.asarray(array), specs[name]
        gathering = begin_statistics(group, spec, plan, kinds)
        if gathering is not None:
            gathering.add(host, whole(host.shape))
        leaf = plan_leaf(group, name, spec, plan, gathering and gathering.finish(), host.dtype, kinds, power)
        grown[name] = leaf.compute(host, whole(leaf.shape))
    return grown
