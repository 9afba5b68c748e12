"""Lion (Chen et al. 2023): the sign of an interpolation between the mean of gradients and the gradient.

    u = sign(β₁·m + (1 − β₁)·g)        m ← β₂·m + (1 − β₂)·g

Growth. With g' = r·g and m' = r·m the interpolation is r times as large, and r is positive: its sign is that of before
growth, bit for bit but where it is zero up to rounding.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig


def lion_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The direction of one parameter's update, and its new moment.

    Args:
        config: betas.
        spec: not used; other optimizers do.
        multipliers: not used; other optimizers do.
        parameter: not used; other optimizers do.
        gradient: already clipped.
        moments: `first_moment`.
        count: not used; other optimizers do.
    """
    m, beta1, beta2 = moments["first_moment"], config.momentum, config.beta2
    direction = jnp.sign(beta1 * m + (1 - beta1) * gradient)
    return direction, {"first_moment": beta2 * m + (1 - beta2) * gradient}
