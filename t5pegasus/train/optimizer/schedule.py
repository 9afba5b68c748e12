"""The learning rate: of an update, and of the entries that growth added."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.multipliers import along_axis


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Update number (from 0) → learning rate: linear warm-up from lr/warmup_steps, then the chosen shape.

    `total_steps` ends the cosine and places the decay of `wsd` (Hu et al. 2024) over its last `decay_steps`. With
    `schedule_shift` all of it is evaluated that many updates further on, or back, but not before its beginning.
    `piecewise` has no warm-up but that of its points.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.final_learning_rate_fraction
    remaining = max(1, total_steps - config.warmup_steps)
    match config.schedule:
        case "constant":
            body = optax.constant_schedule(peak)
        case "cosine":
            body = optax.cosine_decay_schedule(peak, remaining, alpha=config.final_learning_rate_fraction)
        case "wsd":
            decay = config.decay_steps
            parts = [optax.constant_schedule(peak), optax.linear_schedule(peak, floor, max(1, decay))]
            body = optax.join_schedules(parts, [remaining - decay]) if decay else parts[0]

        case "piecewise":
            return _make_piecewise(config)

    def schedule(step: jax.Array) -> jax.Array:
        if config.schedule_shift:
            step = jnp.maximum(0, step + config.schedule_shift)
        warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        return warm * body(jnp.maximum(0, step + 1 - config.warmup_steps))

    return schedule


def _make_piecewise(config: OptimizerConfig) -> Callable[[jax.Array], jax.Array]:
    """Linear between `schedule_points`, which count updates from 1 and have a warm-up of their own."""
    updates, factors = zip(*config.split_schedule_points())

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.maximum(0, step + config.schedule_shift)
        return config.learning_rate * jnp.interp(step + 1, jnp.array(updates, float), jnp.array(factors))

    return schedule


def rewarm_factor(config: OptimizerConfig, spec: ParamSpec, multipliers: Multipliers, step: jax.Array) -> jax.Array:
    """What multiplies the learning rate of the entries that growth added: peak·min(1, (step + 1 − born)/rewarm_steps).

    Entries of the first model have 1. One that is new along several axes was born at the latest of them. (SPARKLING,
    2602.02472: new parameters warm up to 1.3 times the rate at growth, the old ones keep theirs.)

    Args:
        config: `rewarm_steps`, which must not be 0, and `rewarm_peak`.
        spec: the parameter's declaration.
        multipliers: growth's per-axis record.
        step: updates made so far.

    Returns:
        An array that broadcasts to the parameter.
    """
    born = functools.reduce(
        jnp.maximum,
        (multipliers[axis].born.reshape(along_axis(position, spec)) for position, axis in enumerate(spec.axes)),
    )
    warm = config.rewarm_peak * jnp.minimum(1.0, (step + 1 - born) / config.rewarm_steps)
    return jnp.where(born >= 0, warm, 1.0)
