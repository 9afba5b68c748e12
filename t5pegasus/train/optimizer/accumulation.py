"""Gradient accumulation hidden in momentum (Su 2021, kexue.fm 8634): micro-batches are added up in the moments.

With k micro-batches whose mean gradients are h_1 … h_k, the first of them lets the moments decay, and each adds a k-th:

    m ← [β₁ at the first, else 1]·m + (1 − β₁)/k·h_i        v ← [β₂ at the first, else 1]·v + (1 − β₂)/k·h_i²

(SGD's m, which is no mean, takes 1/k·h_i.) Behind the last one parameters move, once, by these moments. No sum of
gradients is kept beside them: of the trees of the size of the model that an update needs, one is saved.

m is that of plain accumulation, so SGD with momentum is the same optimizer. In v stands the mean of squares in place of
the square of the mean: larger on average by (1 − 1/k) times the variance of h. Where noise is all there is, AdamW's
steps are √k times smaller than with plain accumulation. Lion and Muon look at the mean before and at the gradient
of the whole batch apart, and Adafactor at means over its squares: none of them can do without it.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer.adamw import adamw_of_moments
from t5pegasus.train.optimizer.moments import Moments
from t5pegasus.train.optimizer.multipliers import Arrays, leaf_multipliers
from t5pegasus.train.optimizer.parameter_scale import parameter_scale
from t5pegasus.train.optimizer.rounding import name_stream, round_stochastically
from t5pegasus.train.optimizer.update import move

Factors = Mapping[str, np.ndarray]


def accumulate_gradients(
    config: OptimizerConfig,
    gradients: Arrays,
    moments: Moments,
    step: jax.Array,
    micro: jax.Array,
    num_micro: int,
    factors: Factors | None = None,
) -> Moments:
    """The moments behind one micro-batch.

    Args:
        config: an optimizer that can do this (`OptimizerConfig` refuses the others).
        gradients: mean ones of the micro-batch, clipped; 0 where frozen. Parameters without one keep their moments.
        moments: behind the micro-batch before.
        step: updates made so far.
        micro: number of the micro-batch, from 0.
        num_micro: of micro-batches in an update.
        factors: of learning rates; moments of entries with 0 stay as they are.
    """
    after = Moments(*(dict(group) for group in moments))
    share = (1.0 if config.name == "sgd" else 1 - config.momentum) / num_micro
    for name, gradient in gradients.items():
        terms = {
            "first_moment": (config.momentum, share * gradient),
            "second_moment": (config.beta2, (1 - config.beta2) / num_micro * jnp.square(gradient)),
        }
        factor = (factors or {}).get(name)
        for kind, before in moments.of(name).items():
            beta, term = terms[kind]
            kept = (
                jnp.where(micro == 0, beta, 1.0)
                if factor is None
                else jnp.where((micro == 0) & (factor != 0), beta, 1.0)
            )
            moment = kept * before.astype(gradient.dtype) + term
            narrow = before.dtype == jnp.bfloat16
            stored = round_stochastically(moment, name_stream(kind, name), step, micro) if narrow else moment
            getattr(after, kind)[name] = stored
    return after


def apply_accumulated(
    config: OptimizerConfig,
    specs: Mapping[str, ParamSpec],
    multipliers: Multipliers,
    parameters: Arrays,
    moments: Moments,
    step: jax.Array,
    learning_rate: jax.Array,
    factors: Factors | None = None,
) -> dict[str, jax.Array]:
    """Parameters after the update that moments stand for, once all micro-batches are in them.

    Args:
        config: as before.
        specs: declarations.
        multipliers: growth's per-axis record.
        parameters: those to move, by name.
        moments: of this update.
        step: updates made so far.
        learning_rate: of this update, for entries of the first model.
        factors: what multiplies it; entries with 0 keep their values.
    """
    count = (step + 1).astype(jnp.result_type(float))
    moved = {}
    for name, theta in parameters.items():
        spec = specs[name]
        wide = {kind: array.astype(theta.dtype) for kind, array in moments.of(name).items()}
        if config.name == "sgd":
            direction = wide["first_moment"] / leaf_multipliers(spec, multipliers)[1]
        else:
            direction = adamw_of_moments(config, spec, multipliers, wide, count)
        if config.name == "adamw-scaled":
            direction = direction * parameter_scale(spec, multipliers, theta)
        factor = (factors or {}).get(name)
        moved[name] = move(config, spec, multipliers, theta, direction, step, learning_rate, factor)
    return moved
