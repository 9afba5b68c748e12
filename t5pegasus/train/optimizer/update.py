"""Directions become updates: rates, decay, and what is frozen."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.adafactor import adafactor_direction
from t5pegasus.train.optimizer.adamw import adamw_direction, scaled_adamw_direction
from t5pegasus.train.optimizer.lion import lion_direction
from t5pegasus.train.optimizer.moments import Moments, declare_moments
from t5pegasus.train.optimizer.multipliers import Arrays, leaf_multipliers
from t5pegasus.train.optimizer.muon import muon_direction
from t5pegasus.train.optimizer.rounding import name_stream, round_stochastically
from t5pegasus.train.optimizer.schedule import rewarm_factor
from t5pegasus.train.optimizer.sgd import sgd_direction

_DIRECTIONS = {
    "adamw": adamw_direction,
    "adamw-scaled": scaled_adamw_direction,
    "adafactor": adafactor_direction,
    "muon": muon_direction,
    "sgd": sgd_direction,
    "lion": lion_direction,
}


def apply_optimizer(
    config: OptimizerConfig,
    specs: Mapping[str, ParamSpec],
    multipliers: Multipliers,
    parameters: Arrays,
    gradients: Arrays,
    moments: Moments,
    step: jax.Array,
    learning_rate: jax.Array,
    factors: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, jax.Array], Moments]:
    """One update of every parameter: θ ← θ − lr·(s·direction + λ·θ).

    Decay is decoupled and of the same share of θ before and after growth, whichever the optimizer: with lr' = s·lr it
    is λ' = λ/s.

    Args:
        config: which optimizer, and its settings.
        specs: declarations (which parameters decay, which are factored, how the multipliers act).
        multipliers: growth's per-axis record.
        parameters: by name.
        gradients: by name, already clipped; a parameter without one keeps its value and its moments.
        moments: of the step before.
        step: updates made so far.
        learning_rate: of this update, for entries of the first model.
        factors: what multiplies it (`learning_rate_factors`); entries with 0 keep their values and moments.

    Returns:
        New parameters and moments.
    """
    count = (step + 1).astype(jnp.result_type(float))  # float64 where that is on
    find_direction = _DIRECTIONS[config.name]
    new_parameters = dict(parameters)
    new_moments = Moments(*(dict(group) for group in moments))
    for name, gradient in gradients.items():
        spec, theta = specs[name], parameters[name]
        before = moments.of(name)
        wide = {kind: array.astype(theta.dtype) for kind, array in before.items()}
        direction, after = find_direction(config, spec, multipliers, theta, gradient, wide, count)
        factor = (factors or {}).get(name)
        new_parameters[name] = move(config, spec, multipliers, theta, direction, step, learning_rate, factor)
        for kind, array in after.items():
            narrow = before[kind].dtype == jnp.bfloat16
            stored = round_stochastically(array, name_stream(kind, name), step) if narrow else array
            getattr(new_moments, kind)[name] = keep_frozen(stored, before[kind], _factor_of(kind, factor, config, spec))
    return new_parameters, new_moments


def move(
    config: OptimizerConfig,
    spec: ParamSpec,
    multipliers: Multipliers,
    theta: jax.Array,
    direction: jax.Array,
    step: jax.Array,
    learning_rate: jax.Array,
    factor: np.ndarray | None,
) -> jax.Array:
    """One parameter after its update: θ − lr·(s·direction + λ·θ).

    Args:
        config: decay, and the rate of what growth added.
        spec: its declaration.
        multipliers: growth's per-axis record.
        theta: its values.
        direction: as the model before growth would have taken it.
        step: updates made so far.
        learning_rate: of entries of the first model.
        factor: what multiplies it; None: nothing does.
    """
    s, _ = leaf_multipliers(spec, multipliers)
    decay = config.weight_decay * theta if spec.decays else 0.0
    rate = learning_rate if factor is None else learning_rate * factor
    if config.rewarm_steps:
        rate = rate * rewarm_factor(config, spec, multipliers, step)
    return theta - rate * (s * direction + decay)


def keep_frozen(updated: jax.Array, before: jax.Array | float, factor: np.ndarray | None) -> jax.Array:
    """`updated`, with the entries whose factor is 0 as they were `before`."""
    return updated if factor is None or factor.all() else jnp.where(factor != 0, updated, before)


def _factor_of(kind: str, factor: np.ndarray | None, config: OptimizerConfig, spec: ParamSpec) -> np.ndarray | None:
    """The factor of a moment, which may have fewer axes than its parameter: 0 where no entry behind it is trained."""
    if factor is None:
        return None
    axes = declare_moments(config, {"": spec})[kind][""].spec.axes
    absent = tuple(dimension for dimension, axis in enumerate(spec.axes) if axis not in axes)
    return (factor != 0).any(absent) if absent else factor
