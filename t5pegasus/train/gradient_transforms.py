"""What is done to gradients before they are clipped all together: scaled, clipped by group, drawn towards zero weights.

Groups are those of patterns of names or axes (`groups.select_entries`). Each transform gives, of gradients that growth
multiplied by r, r times what it would have given before growth.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.groups import select_entries
from t5pegasus.train.optimizer import leaf_multipliers, weighted_norm

Gradients = Mapping[str, jax.Array]
Transform = Callable[[Gradients, Gradients, Multipliers], dict[str, jax.Array]]
"""(gradients, parameters, growth's record) → gradients."""


def make_transform(config: OptimizerConfig, specs: Mapping[str, ParamSpec]) -> Transform:
    """All of `config.gradient_transforms`, one after the other.

    Raises:
        UsageError: if a pattern fits nothing.
    """
    steps = [
        (kind, value, select_entries(pattern, specs, "optimizer.gradient_transforms"))
        for pattern, kind, value in config.split_gradient_transforms()
    ]

    def transform(gradients: Gradients, parameters: Gradients, multipliers: Multipliers) -> dict[str, jax.Array]:
        after = dict(gradients)
        for kind, value, entries in steps:
            chosen = {name: mask for name, mask in entries.items() if name in after}
            match kind:
                case "scale":
                    changed = {name: value * after[name] for name in chosen}
                case "clip":
                    changed = _clip(value, after, chosen, specs, multipliers)
                case _:
                    changed = {
                        name: after[name]
                        + value * leaf_multipliers(specs[name], multipliers)[1] * jnp.sign(parameters[name])
                        for name in chosen
                    }
            after |= {name: jnp.where(mask, changed[name], after[name]) for name, mask in chosen.items()}
        return after

    return transform


def _clip(
    limit: float,
    gradients: Gradients,
    chosen: Mapping[str, np.ndarray],
    specs: Mapping[str, ParamSpec],
    multipliers: Multipliers,
) -> dict[str, jax.Array]:
    """Gradients multiplied so that the chosen entries together have at most this norm."""
    group = {name: jnp.where(mask, gradients[name], 0) for name, mask in chosen.items()}
    factor = jnp.minimum(1.0, limit / (weighted_norm(group, specs, multipliers) + 1e-9))
    return {name: factor * gradients[name] for name in chosen}
