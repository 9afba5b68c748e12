"""AdamW with growth's per-axis multipliers, and its learning-rate schedule.

The multipliers make an update of a grown parameter the image of the source's update (docs/growth.md, dynamics):
with a weight multiplied by s and its gradient by r, the learning rate is s·lr, epsilon r·ε, decay λ/s, and the
clip norm counts Σ (s/r)·g². All are one where nothing grew, which leaves plain AdamW (Loshchilov & Hutter 2019).
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t5pegasus.axes import AxisMultiplier, Multipliers, ParamSpec, dual_multipliers
from t5pegasus.config import OptimizerConfig, TrainConfig

Arrays = Mapping[str, jax.Array]


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Update number (from 0) → learning rate: linear warm-up from lr/warmup_steps, then the chosen shape.

    `total_steps` ends the cosine and places the decay of `wsd` (Hu et al. 2024) over its last `decay_steps`.
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

    def schedule(step: jax.Array) -> jax.Array:
        warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
        return warm * body(jnp.maximum(0, step + 1 - config.warmup_steps))

    return schedule


def init_multipliers(specs: Mapping[str, ParamSpec]) -> dict[str, AxisMultiplier]:
    """The record of a model that never grew: ones for every axis."""
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    return {
        axis: AxisMultiplier(*(jnp.ones(size) for _ in range(4)), born=jnp.full(size, -1, jnp.int32))
        for axis, size in sorted(sizes.items())
    }


def leaf_multipliers(spec: ParamSpec, multipliers: Multipliers) -> tuple[jax.Array, jax.Array]:
    """(s, r) of one parameter, of its shape: how growth multiplied its weights and, by duality, its gradients."""
    s, r = jnp.ones(spec.shape), jnp.ones(spec.shape)
    for position, axis in enumerate(spec.axes):
        forward, backward = dual_multipliers(axis, spec, multipliers[axis])
        along = [1] * len(spec.shape)
        along[position] = -1
        s, r = s * forward.reshape(along), r * backward.reshape(along)
    return s, r


def weighted_norm(gradients: Arrays, specs: Mapping[str, ParamSpec], multipliers: Multipliers) -> jax.Array:
    """√Σ (s/r)·g²: the gradients' global norm as the model before growth would have measured it."""
    total = jnp.zeros(())
    for name, gradient in sorted(gradients.items()):
        s, r = leaf_multipliers(specs[name], multipliers)
        total += jnp.sum(jnp.square(gradient) * (s / r))
    return jnp.sqrt(total)


def apply_adamw(
    config: OptimizerConfig,
    specs: Mapping[str, ParamSpec],
    multipliers: Multipliers,
    parameters: Arrays,
    gradients: Arrays,
    first_moment: Arrays,
    second_moment: Arrays,
    step: jax.Array,
    learning_rate: jax.Array,
    factors: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
    """One update of every parameter.

    Args:
        config: betas, epsilon and weight decay.
        specs: declarations (which parameters decay, how the multipliers act).
        multipliers: growth's per-axis record.
        parameters: by name, as are the next three.
        gradients: already clipped; a parameter without one keeps its value and its moments.
        first_moment: m of the step before.
        second_moment: v of the step before.
        step: updates made so far, for the bias correction.
        learning_rate: of this update.
        factors: what multiplies it (`learning_rate_factors`); entries with 0 keep their values and moments.

    Returns:
        New parameters, first and second moments.
    """
    count = (step + 1).astype(jnp.result_type(float))  # float64 where that is on
    correct1, correct2 = 1 - config.beta1**count, 1 - config.beta2**count
    new_parameters, new_first, new_second = {}, {}, {}
    for name, theta in parameters.items():
        if name not in gradients:
            new_parameters[name], new_first[name], new_second[name] = theta, first_moment[name], second_moment[name]
            continue
        s, r = leaf_multipliers(specs[name], multipliers)
        m = config.beta1 * first_moment[name] + (1 - config.beta1) * gradients[name]
        v = config.beta2 * second_moment[name] + (1 - config.beta2) * jnp.square(gradients[name])
        direction = (m / correct1) / (jnp.sqrt(v / correct2) + r * config.epsilon)
        decay = config.weight_decay * theta if specs[name].decays else 0.0
        factor = (factors or {}).get(name)
        rate = learning_rate if factor is None else learning_rate * factor
        new_parameters[name] = theta - rate * (s * direction + decay)
        new_first[name] = keep_frozen(m, first_moment[name], factor)
        new_second[name] = keep_frozen(v, second_moment[name], factor)
    return new_parameters, new_first, new_second


def keep_frozen(updated: jax.Array, before: jax.Array | float, factor: np.ndarray | None) -> jax.Array:
    """`updated`, with the entries whose factor is 0 as they were `before`."""
    return updated if factor is None or factor.all() else jnp.where(factor != 0, updated, before)


def update_ema(config: TrainConfig, ema: Arrays, parameters: Arrays, step: jax.Array) -> dict[str, jax.Array]:
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
