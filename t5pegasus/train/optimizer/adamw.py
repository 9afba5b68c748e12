"""AdamW (Loshchilov & Hutter 2019): the direction m̂ / (√v̂ + ε) from the moments of gradients.

Its scaled form (nanoT5, Nawrot 2023) multiplies that by the scale of the parameter, as Adafactor does.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.multipliers import leaf_multipliers
from t5pegasus.train.optimizer.parameter_scale import parameter_scale


def adamw_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The direction of one parameter's update, and its new moments.

    A gradient r times as large gives m and √v r times as large: with epsilon r·ε the direction is that of before
    growth.

    Args:
        config: betas and epsilon.
        spec: its declaration.
        multipliers: growth's per-axis record.
        parameter: not used; other optimizers do.
        gradient: already clipped.
        moments: `first_moment` (none without beta1) and `second_moment`.
        count: of this update, from 1, for the bias correction.
    """
    updated = {"second_moment": config.beta2 * moments["second_moment"] + (1 - config.beta2) * jnp.square(gradient)}
    if config.momentum > 0:
        updated["first_moment"] = config.momentum * moments["first_moment"] + (1 - config.momentum) * gradient
    known = updated if config.momentum > 0 else {**updated, "first_moment": gradient}
    return adamw_of_moments(config, spec, multipliers, known, count), updated


def adamw_of_moments(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> jax.Array:
    """The direction from the moments of an update: `first_moment` and `second_moment`, both in being."""
    _, r = leaf_multipliers(spec, multipliers)
    mean = moments["first_moment"]
    if config.momentum > 0:
        mean = mean / (1 - config.momentum**count)
    corrected = moments["second_moment"] / (1 - config.beta2**count)
    return mean / (jnp.sqrt(corrected) + r * config.epsilon)


def scaled_adamw_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`adamw_direction` times max(1e-3, RMS(θ)) of each layer, so that the rate is a share of the parameter.

    Args:
        config: betas and epsilon.
        spec: its declaration.
        multipliers: growth's per-axis record.
        parameter: the values before the update, for their RMS.
        gradient: already clipped.
        moments: as of `adamw_direction`.
        count: of this update, from 1.
    """
    direction, updated = adamw_direction(config, spec, multipliers, parameter, gradient, moments, count)
    return direction * parameter_scale(spec, multipliers, parameter), updated
