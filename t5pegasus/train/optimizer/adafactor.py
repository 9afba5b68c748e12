"""Adafactor (Shazeer & Stern 2018) as T5 trained with it, whose statistics growth leaves as they were.

For a parameter with rows i (the stream) and columns j (all its other axes but layers, jointly):

    R_i ← β₂·R_i + (1 − β₂)·mean_j(g² + ε₁)      C_j ← β₂·C_j + (1 − β₂)·mean_i(g² + ε₁)      β₂ = 1 − t^−0.8
    u = g / √(R·C / mean(R)),   û = u / max(1, RMS(u) / clipping_threshold),   Δθ = −lr·max(ε₂, RMS(θ))·û

each layer of a stack by itself, as if it were a parameter of its own. Parameters without rows or columns, or with too
small ones, keep the second moment of each entry in place of R and C.

Growth. Let θ' = s·θ, g' = r·g with r = a_i·b_j. Every mean above is taken over g'/r and θ'/s with the weights s·r of
inherited entries (`Weights`), which makes it the mean of the model before growth, with even, uneven and fractional
copies alike. R' is kept in units of gradients, so that

    R'_i = a_i²·R_source(i),   C'_j = b_j²·C_source(j),   V̂' = R'·C' / mean(R'/a²) = r²·V̂,   v' = r²·v

is the growth of the state, and is preserved by each update: û' = û, and every entry moves by s·Δθ. RMS(θ'/s) is that
of before growth, so the rate needs no correction for zeros that padding adds.

Created entries count in no mean over inherited ones, so they change neither R and C of the old block, nor its clipping,
nor its scale. Their own R'_i (a new row) and C'_j (a new column) are the means of what old columns and rows give; they
must not start at 0 late in training, where β₂ is almost 1: seed them by the mean of the old ones along the axis that
grew, a new layer's by a neighbour layer's; first moments begin at 0. They are clipped by an RMS of their own, and take
the scale of the parameter's old block (`parameter_scale`).

If an axis grows past `min_dim_size_to_factor`, v becomes R'_i = a_i²·mean_j(v), C'_j = b_j²·mean_i(v), exact only where
v is of rank one; the other way round v = R·C / mean(R) is exact.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5pegasus.axes import Multipliers, ParamSpec, factored_axes, logical_axis
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.multipliers import Weights, leaf_multipliers
from t5pegasus.train.optimizer.parameter_scale import parameter_scale

DECAY_EXPONENT = 0.8
"""β₂ of update t is 1 − t^−0.8."""
EPSILON1 = 1e-30
"""Added to squared gradients."""


def adafactor_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The direction of one parameter's update, its scale included, and its new moments.

    With beta1 the direction is the running mean of û·scale, without bias correction. The learning rate multiplies that
    mean, as it does in AdamW; T5X has it within, which is the same as long as the rate does not change.

    Args:
        config: `momentum`, `clipping_threshold`, `scale_by_parameter` and `min_dim_size_to_factor`.
        spec: its declaration.
        multipliers: growth's per-axis record.
        parameter: the values before the update, for their RMS.
        gradient: already clipped.
        moments: `row_moment` and `column_moment`, or `second_moment`; `first_moment` if beta1 is not 0.
        count: of this update, from 1.
    """
    _, r = leaf_multipliers(spec, multipliers)
    weights = Weights(spec, multipliers, [axis for axis in spec.axes if logical_axis(axis) != "layers"])
    kept = 1 - count**-DECAY_EXPONENT
    natural = gradient / r
    squares = jnp.square(natural) + EPSILON1
    updated: dict[str, jax.Array] = {}
    factored = factored_axes(spec, config.min_dim_size_to_factor)
    if factored is None:
        v = kept * moments["second_moment"] + (1 - kept) * jnp.square(r) * squares
        updated["second_moment"] = v
        direction = gradient * jax.lax.rsqrt(v)
    else:
        rows, columns = (Weights(spec, multipliers, axes) for axes in factored)
        means = {}
        for kind, over in (("row_moment", columns), ("column_moment", rows)):
            own = spec.restrict([axis for dimension, axis in enumerate(spec.axes) if dimension not in over.dimensions])
            own_r = jnp.square(leaf_multipliers(own, multipliers)[1])
            fresh = jnp.squeeze(over.mean(squares), over.dimensions)
            updated[kind] = kept * moments[kind] + (1 - kept) * own_r * fresh
            means[kind] = jnp.expand_dims(updated[kind] / own_r, over.dimensions)
        share = means["row_moment"] / rows.mean(means["row_moment"])
        direction = natural * jax.lax.rsqrt(share) * jax.lax.rsqrt(means["column_moment"])
    direction = direction / _excess(config, weights, direction)
    if config.scale_by_parameter:
        direction = direction * parameter_scale(spec, multipliers, parameter)
    if config.momentum > 0:
        direction = config.momentum * moments["first_moment"] + (1 - config.momentum) * direction
        updated["first_moment"] = direction
    return direction, updated


def _excess(config: OptimizerConfig, weights: Weights, direction: jax.Array) -> jax.Array:
    """max(1, RMS(u) / clipping_threshold), of inherited and of created entries apart."""
    squares = jnp.square(direction)
    old, created = (
        jnp.maximum(1.0, jnp.sqrt(mean) / config.clipping_threshold)
        for mean in (weights.mean(squares), weights.mean_created(squares))
    )
    return jnp.where(weights.inherited > 0, old, created)
