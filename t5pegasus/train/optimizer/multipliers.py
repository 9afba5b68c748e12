"""Growth's per-axis record as arrays of a parameter's shape: multipliers (s, r), and weights of the first model."""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.axes import AxisMultiplier, Multipliers, ParamSpec, dual_multipliers

Arrays = Mapping[str, jax.Array]


def init_multipliers(specs: Mapping[str, ParamSpec]) -> dict[str, AxisMultiplier]:
    """The record of a model that never grew: ones for every axis."""
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    return {
        axis: AxisMultiplier(*(jnp.ones(size) for _ in range(4)), born=jnp.full(size, -1, jnp.int32))
        for axis, size in sorted(sizes.items())
    }


def leaf_multipliers(spec: ParamSpec, multipliers: Multipliers) -> tuple[jax.Array, jax.Array]:
    """(s, r) of one parameter, of its shape: how growth multiplied its weights and, by duality, its gradients."""
    s, r = jnp.ones(spec.shape), jnp.ones(spec.shape)
    for position, axis in enumerate(spec.axes):
        forward, backward = dual_multipliers(axis, spec, multipliers[axis])
        along = along_axis(position, spec)
        s, r = s * forward.reshape(along), r * backward.reshape(along)
    return s, r


def weighted_norm(gradients: Arrays, specs: Mapping[str, ParamSpec], multipliers: Multipliers) -> jax.Array:
    """√Σ (s/r)·g²: the gradients' global norm as the model before growth would have measured it."""
    total = jnp.zeros(())
    for name, gradient in sorted(gradients.items()):
        spec, weighted = specs[name], jnp.square(gradient)
        for position, axis in enumerate(spec.axes):  # one by one: s/r of all entries would be as large as the gradient
            s, r = dual_multipliers(axis, spec, multipliers[axis])
            weighted *= (s / r).reshape(along_axis(position, spec))
        total += jnp.sum(weighted)
    return jnp.sqrt(total)


class Weights:
    """By what each entry of a parameter counts in a mean that shall be the one of the model before growth.

    The copies of an entry have s·r = written·read ∏ along the axes, which sums to 1 over them: weighted so, a mean
    over copies of anything that they share is the mean over what they are copies of. An entry that growth created
    counts 1, but in means over created entries alone.
    """

    def __init__(self, spec: ParamSpec, multipliers: Multipliers, axes: Collection[str]):
        """For means over these axes of the parameter."""
        self.dimensions = tuple(dimension for dimension, axis in enumerate(spec.axes) if axis in axes)
        records = [(dimension, multipliers[spec.axes[dimension]]) for dimension in self.dimensions]

        def outer(values: Callable[[AxisMultiplier], Any]) -> tuple[Any, Any]:
            """The product of per-axis vectors, broadcasting to the parameter, and its sum."""
            vectors = [(dimension, values(record)) for dimension, record in records]
            arrays = [vector.reshape(along_axis(dimension, spec)) for dimension, vector in vectors]
            return math.prod(arrays), math.prod(jnp.sum(vector) for _, vector in vectors)

        self.inherited, _ = outer(lambda record: record.inherited)
        """1 where an entry is, or copies, one of the first model along all of these axes, else 0."""
        self._old, self._num_old = outer(lambda record: record.written * record.read * record.inherited)
        self._all, self._num_all = outer(lambda record: record.written * record.read)

    def mean(self, array: jax.Array) -> jax.Array:
        """The mean over inherited entries, the axes kept with size 1."""
        return jnp.sum(self._old * array, self.dimensions, keepdims=True) / self._num_old

    def mean_created(self, array: jax.Array) -> jax.Array:
        """The mean over created entries, the axes kept with size 1; 0 where there are none."""
        total = jnp.sum((1 - self.inherited) * self._all * array, self.dimensions, keepdims=True)
        number = self._num_all - self._num_old
        return jnp.where(number > 0, total / jnp.where(number > 0, number, 1), 0)


def along_axis(position: int, spec: ParamSpec) -> list[int]:
    """The shape in which a vector along one axis of a parameter broadcasts to it."""
    return [-1 if dimension == position else 1 for dimension in range(len(spec.shape))]
