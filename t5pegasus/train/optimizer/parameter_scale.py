"""The scale of a parameter, to which Adafactor and scaled AdamW hold their learning rates: max(ε₂, RMS(θ)) of a layer.

Growth. With θ' = s·θ the mean is taken over θ'/s with the weights s·r of inherited entries (`Weights`), which makes it
the RMS of the model before growth, with even, uneven and fractional copies alike. Created entries do not count and take
the scale of the parameter's old block; so does a layer that growth created, as long as its own RMS is smaller (an
output projection that begins at 0 would else start from ε₂ = 1e-3).
"""

import jax
import jax.numpy as jnp

from t5pegasus.axes import Multipliers, ParamSpec, logical_axis
from t5pegasus.train.optimizer.multipliers import Weights, along_axis, leaf_multipliers

EPSILON2 = 1e-3
"""The least scale of a parameter (Shazeer & Stern 2018)."""


def parameter_scale(spec: ParamSpec, multipliers: Multipliers, parameter: jax.Array) -> jax.Array:
    """max(ε₂, RMS(θ)) of each layer; a created layer's is at least that of the inherited ones together.

    Args:
        spec: the parameter's declaration.
        multipliers: growth's per-axis record.
        parameter: its values.

    Returns:
        An array that broadcasts to the parameter.
    """
    s, _ = leaf_multipliers(spec, multipliers)
    weights = Weights(spec, multipliers, [axis for axis in spec.axes if logical_axis(axis) != "layers"])
    squares = weights.mean(jnp.square(parameter / s))
    for dimension, axis in enumerate(spec.axes):
        if logical_axis(axis) == "layers":
            inherited = multipliers[axis].inherited.reshape(along_axis(dimension, spec))
            old = jnp.sum(inherited * squares) / jnp.maximum(1.0, jnp.sum(inherited))
            squares = jnp.where(inherited > 0, squares, jnp.maximum(squares, old))
    return jnp.maximum(EPSILON2, jnp.sqrt(squares))
