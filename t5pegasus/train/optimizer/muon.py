"""Muon (Jordan et al. 2024): momentum, made nearly orthogonal by Newton–Schulz, each layer's matrix by itself.

    m ← μ·m + (1 − μ)·g,    M = μ·m + (1 − μ)·g (Nesterov),    direction = 0.2·√max(rows, columns)·NS(M)

Rows are the stream, columns all other axes jointly (`orthogonalised_axes`). NS replaces the singular values of M by
numbers between about 0.7 and 1.2: X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ, five times, from X = M / ‖M‖. The factor is
that of Moonlight (Liu et al. 2025): entries of an update have a root mean square of about 0.2, AdamW's usual one, so
that one learning rate serves both. Gains, the relative bias, the token embedding and the head are AdamW's.

Growth. Let θ' = s·θ and g' = r·g. Along each axis s·r = written·read = w, which sums to 1 over the copies of an entry.
So M' = √(s/r)·m' = √(s·r)·m has the entries √w_i·m_σ(i)τ(j)·√w_j, that is M' = P·M·Qᵀ with P_iσ(i) = √w_i, whose
columns are orthonormal, and Q alike. NS, an odd polynomial, turns P·M·Qᵀ into P·NS(M)·Qᵀ, and its norm is that of M.
Divided by √(s·r) every entry is the one of before growth, with even, uneven and fractional copies alike; rows and
columns are counted by Σ w, which copies leave as it was.

Entries that growth created are rows and columns of their own (w = 1). They take part in the orthogonalisation, which
makes old entries move in other ways than before growth: after padding, and there alone, training is not the image of
the source's. A created layer is a matrix of its own and disturbs nothing.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from t5pegasus.axes import Multipliers, ParamSpec, orthogonalised_axes
from t5pegasus.config import OptimizerConfig
from t5pegasus.sharding import RULES
from t5pegasus.train.optimizer.adamw import adamw_direction
from t5pegasus.train.optimizer.multipliers import leaf_multipliers

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of an iteration."""
NUM_ITERATIONS = 5
CONSISTENT_RMS = 0.2
"""The root mean square that entries of an update have, about."""
_SMALLEST_NORM = 1e-7
"""Added to the norm, so that a matrix of zeros stays one."""


def muon_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The direction of one parameter's update, and its new moments.

    Args:
        config: `muon_momentum`, and for parameters that are AdamW's its settings.
        spec: its declaration.
        multipliers: growth's per-axis record.
        parameter: its values before the update.
        gradient: already clipped.
        moments: `first_moment`; AdamW's where that is the optimizer.
        count: of this update, from 1.
    """
    axes = orthogonalised_axes(spec)
    if axes is None:
        return adamw_direction(config, spec, multipliers, parameter, gradient, moments, count)
    s, r = leaf_multipliers(spec, multipliers)
    mu = config.muon_momentum
    m = mu * moments["first_moment"] + (1 - mu) * gradient
    ahead = mu * m + (1 - mu) * gradient
    rows, columns = axes
    sizes = (
        math.prod(jnp.sum(multipliers[axis].written * multipliers[axis].read) for axis in part)
        for part in (rows, columns)
    )
    scale = CONSISTENT_RMS * jnp.sqrt(jnp.maximum(*sizes))
    orthogonal = _orthogonalise_parameter(jnp.sqrt(s / r) * ahead, spec, rows, columns)
    return scale * orthogonal / jnp.sqrt(s * r), {"first_moment": m}


def orthogonalise(matrices: jax.Array) -> jax.Array:
    """Newton–Schulz on matrices [..., rows, columns], each by itself.

    The products are taken over the longer side, and in the precision in which the device multiplies by default.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT
    a, b, c = COEFFICIENTS
    x = matrices / (jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True) + _SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


def _orthogonalise_parameter(
    array: jax.Array, spec: ParamSpec, rows: tuple[str, ...], columns: tuple[str, ...]
) -> jax.Array:
    """`orthogonalise` of a parameter's matrices, which stand along its axes in any order."""
    layers = [axis for axis in spec.axes if axis not in (*rows, *columns)]
    order = [spec.axes.index(axis) for axis in (*layers, *rows, *columns)]
    ordered = jnp.transpose(array, order)
    num_rows = math.prod(ordered.shape[len(layers) : len(layers) + len(rows)])
    num_layers = math.prod(ordered.shape[: len(layers)])
    found = _orthogonalise_apart(ordered.reshape(num_layers, num_rows, -1))
    inverse = [order.index(dimension) for dimension in range(len(order))]
    return jnp.transpose(found.reshape(ordered.shape), inverse)


def _orthogonalise_apart(matrices: jax.Array) -> jax.Array:
    """`orthogonalise` of [layers, rows, columns] with whole layers on each device.

    Over split rows and columns each iteration would gather the matrices. Layers are moved instead, once there and once
    back, one mesh axis after the other, since that is an exchange between devices, and more at once is a copy of all on
    each. Zeros make up for layers that do not divide; they stay zeros. Where they would be most of what replicas
    exchange, each replica computes all layers itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return orthogonalise(matrices)
    num_layers, splits_rows, splits_columns = len(matrices), str(RULES["embed"]), str(RULES["mlp"])
    stations = [
        PartitionSpec(None, splits_rows, splits_columns),
        PartitionSpec(splits_rows, None, splits_columns),
        PartitionSpec((splits_rows, splits_columns), None, None),
    ]
    num_parts = mesh.shape[splits_rows] * mesh.shape[splits_columns]
    if _round_up(num_layers, mesh.size) <= 2 * _round_up(num_layers, num_parts):
        stations.append(PartitionSpec((splits_rows, splits_columns, "data"), None, None))
        num_parts = mesh.size
    matrices = jnp.pad(matrices, ((0, -num_layers % num_parts), (0, 0), (0, 0)))
    for station in stations:
        matrices = jax.lax.with_sharding_constraint(matrices, station)
    matrices = orthogonalise(matrices)
    for station in reversed(stations):
        matrices = jax.lax.with_sharding_constraint(matrices, station)
    return matrices[:num_layers]


def _round_up(number: int, unit: int) -> int:
    return -(-number // unit) * unit
