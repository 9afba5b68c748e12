"""Stochastic gradient descent with momentum (Polyak 1964): m ← beta1·m + g, not divided by 1 − beta1."""

from collections.abc import Mapping

import jax

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.multipliers import leaf_multipliers


def sgd_direction(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    parameter: jax.Array,
    gradient: jax.Array,
    moments: Mapping[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The direction of one parameter's update, and its new moment (none without beta1).

    m is r times what it was before growth, so the direction is m/r, and the learning rate in all s/r.

    Args:
        config: beta1.
        spec: its declaration.
        multipliers: growth's per-axis record.
        parameter: not used; other optimizers do.
        gradient: already clipped.
        moments: `first_moment`, if beta1 is not 0.
        count: not used; other optimizers do.
    """
    _, r = leaf_multipliers(spec, multipliers)
    if config.momentum == 0:
        return gradient / r, {}
    m = config.momentum * moments["first_moment"] + gradient
    return m / r, {"first_moment": m}
