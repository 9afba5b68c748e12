"""The moving average of the parameters."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from t5pegasus.config import TrainConfig


def update_ema(
    config: TrainConfig, ema: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array], step: jax.Array
) -> dict[str, jax.Array]:
    """The moving average after an update: d·average + (1 − d)·parameters (Polyak & Juditsky 1992, exponential form).

    With warm-up d = min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not an average of its
    start. Entries that training does not move are averaged to themselves, bit for bit.

    Args:
        config: `ema_decay`, `ema_warmup`.
        ema: the average so far, by name; empty where none is kept.
        parameters: after the update.
        step: updates made before it.
    """
    decay = jnp.float32(config.ema_decay)
    if config.ema_warmup:
        count = (step + 1).astype(jnp.float32)
        decay = jnp.minimum(decay, (1 + count) / (10 + count))
    return {name: average + (1 - decay) * (parameters[name] - average) for name, average in ema.items()}
