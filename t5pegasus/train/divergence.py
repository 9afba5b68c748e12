"""When an update is bad: its loss, its gradient or itself is not finite, or a spike against those before it.

The rule is that of OLMo's and MaxText's step skipping: the mean of a window plus so many standard deviations. It is
evaluated on the device, from numbers that the state carries, so a resumed run judges as one that was never stopped.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.config import TrainConfig

WATCHED = ("loss", "grad_norm")
"""What of an update is held against those before it."""


class Why(enum.IntFlag):
    """What is wrong with an update; 0 is nothing."""

    LOSS_NOT_FINITE = 1
    GRADIENT_NOT_FINITE = 2
    LOSS_SPIKE = 4
    GRADIENT_SPIKE = 8
    UPDATE_NOT_FINITE = 16

    def describe(self) -> str:
        """In words: `loss is not finite, gradient norm is a spike`."""
        words = {
            Why.LOSS_NOT_FINITE: "loss is not finite",
            Why.GRADIENT_NOT_FINITE: "gradient norm is not finite",
            Why.UPDATE_NOT_FINITE: "update norm is not finite",
            Why.LOSS_SPIKE: "loss is a spike",
            Why.GRADIENT_SPIKE: "gradient norm is a spike",
        }
        return ", ".join(text for why, text in words.items() if why in self)


class RollbackNeededError(Exception):
    """An update was bad, and the run is to go back to its last checkpoint and on behind the update's rows."""

    def __init__(self, record: dict[str, Any]):
        super().__init__(record["why"])
        self.record = record
        """at_step, rows (the first and that behind the last), why, loss, grad_norm and limits, as the ledger has it."""


def spike_window(config: TrainConfig) -> int:
    """How many updates the state remembers for this config: none unless spikes are looked for."""
    return config.spike_window if config.spike_factor > 0 else 0


def init_recent(window: int) -> dict[str, jax.Array]:
    """The memory of no updates: `loss` and `grad_norm`, float32 [window], and how many there have been; or {}."""
    if not window:
        return {}
    return {name: jnp.zeros(window, jnp.float32) for name in WATCHED} | {"count": jnp.zeros((), jnp.int32)}


def judge_update(
    config: TrainConfig, loss: jax.Array, grad_norm: jax.Array, update_norm: jax.Array, recent: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """What is wrong with an update, by which limits, and the memory behind it.

    A spike is a number above mean + `spike_factor` · σ of the last `spike_window` ones, once there are so many. It is
    remembered as the limit that it crossed: one spike does not hide the next, and a new level is learnt in time. What
    is not finite is not remembered.

    Args:
        config: `spike_factor`, `spike_window`.
        loss: of the update, scalar.
        grad_norm: before clipping, scalar.
        update_norm: of what is added to the parameters, scalar; finite gradients can make them overflow.
        recent: as `init_recent` makes it.

    Returns:
        (`Why` as int32, {loss_limit, grad_norm_limit} where spikes are looked for, memory).
    """
    numbers = {"loss": loss, "grad_norm": grad_norm}
    is_finite = {name: jnp.isfinite(number) for name, number in numbers.items()}
    why = jnp.where(is_finite["loss"], 0, Why.LOSS_NOT_FINITE) | jnp.where(
        is_finite["grad_norm"], 0, Why.GRADIENT_NOT_FINITE
    )
    why |= jnp.where((why == 0) & ~jnp.isfinite(update_norm), Why.UPDATE_NOT_FINITE, 0)
    if not recent:
        return why.astype(jnp.int32), {}, recent
    count, limits, after = recent["count"], {}, {}
    all_finite = why == 0
    for name, flag in (("loss", Why.LOSS_SPIKE), ("grad_norm", Why.GRADIENT_SPIKE)):
        values, number = recent[name], numbers[name].astype(jnp.float32)
        limit = jnp.mean(values) + config.spike_factor * jnp.std(values)
        limit = jnp.where(count >= len(values), limit, jnp.inf)
        why |= jnp.where(is_finite[name] & (number > limit), flag, 0)
        remembered = values.at[count % len(values)].set(jnp.minimum(number, limit))
        limits[f"{name}_limit"] = limit
        after[name] = jnp.where(all_finite, remembered, values)
    after["count"] = count + all_finite
    return why.astype(jnp.int32), limits, after
