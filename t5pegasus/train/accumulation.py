"""From a batch to new parameters and moments: by the sum of its micro-batches' gradients, or without one.

Gradients are transformed by group, those of frozen entries left out, clipped together, and given to the optimizer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5pegasus.axes import Multipliers, ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.train.gradient_transforms import make_transform
from t5pegasus.train.gradients import pure_gradients, split_micro
from t5pegasus.train.groups import frozen_parameters, learning_rate_factors
from t5pegasus.train.loss import LossSums
from t5pegasus.train.norms import measure_norms
from t5pegasus.train.optimizer import (
    Moments,
    accumulate_gradients,
    apply_accumulated,
    apply_optimizer,
    keep_frozen,
    weighted_norm,
)
from t5pegasus.train.state import TrainState


class Update(NamedTuple):
    """What an update makes of a state, and what it saw on the way."""

    parameters: dict[str, jax.Array]
    moments: Moments
    sums: LossSums
    """Over the whole batch."""
    norm: jax.Array
    """Of all gradients, before clipping; with accumulation in moments the root mean square of the micro-batches'."""
    norms: jax.Array
    """By kind and group (`measure_norms`)."""


FindUpdate = Callable[[TrainState, Batch, jax.Array], Update]


def pure_update(config: RunConfig, specs: Mapping[str, ParamSpec], compute_dtype: Any) -> FindUpdate:
    """The pure function (state, batch, learning rate) → Update that a config asks for."""
    factors = learning_rate_factors(config.optimizer, specs)
    frozen = frozen_parameters(factors)
    transform = make_transform(config.optimizer, specs)
    hidden = config.optimizer.accumulate_in_moments
    num_micro = config.train.accumulation_steps
    each = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    find_gradients = pure_gradients(each if hidden else config, compute_dtype)

    def prepare(
        gradients: Mapping[str, jax.Array], parameters: Mapping[str, jax.Array], multipliers: Multipliers
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        """(gradients transformed, with none at frozen entries; their norm; what clips them)."""
        transformed = transform(gradients, parameters, multipliers)
        kept = {name: keep_frozen(gradient, 0.0, factors.get(name)) for name, gradient in transformed.items()}
        norm = weighted_norm(kept, specs, multipliers)
        return kept, norm, jnp.minimum(1.0, config.optimizer.max_grad_norm / (norm + 1e-9))

    def update(state: TrainState, batch: Batch, learning_rate: jax.Array) -> Update:
        trained = {name: array for name, array in state.parameters.items() if name not in frozen}
        gradients, sums = find_gradients(trained, state.parameters, batch)
        gradients, norm, clip = prepare(gradients, state.parameters, state.multipliers)
        clipped = {name: clip * gradient for name, gradient in gradients.items()}
        parameters, moments = apply_optimizer(
            config.optimizer, specs, state.multipliers, state.parameters, clipped, state.moments, state.step,
            learning_rate, factors,
        )  # fmt: skip
        return Update(parameters, moments, sums, norm, measure_norms(specs, gradients, state.parameters, parameters))

    def hidden_update(state: TrainState, batch: Batch, learning_rate: jax.Array) -> Update:
        trained = {name: array for name, array in state.parameters.items() if name not in frozen}
        total_weight = jnp.maximum(1.0, jnp.sum(batch.decoder_loss_weights))

        def accumulate(moments: Moments, micro: tuple[jax.Array, Batch]) -> tuple[Moments, tuple[Any, ...]]:
            number, rows = micro
            weight = jnp.maximum(1.0, jnp.sum(rows.decoder_loss_weights))
            gradients, sums = find_gradients(trained, state.parameters, rows)
            # As many times the micro-batch's part of the batch's mean loss as there are micro-batches.
            share = num_micro * weight / total_weight
            scaled = {name: share * gradient for name, gradient in gradients.items()}
            scaled, norm, clip = prepare(scaled, state.parameters, state.multipliers)
            norms = measure_norms(specs, scaled, state.parameters, state.parameters)[0]
            clipped = {name: clip * gradient for name, gradient in scaled.items()}
            moments = accumulate_gradients(config.optimizer, clipped, moments, state.step, number, num_micro, factors)
            return moments, (sums, jnp.square(norm), jnp.square(norms))

        micros = jnp.arange(num_micro), split_micro(batch, num_micro)
        moments, (sums, squares, squares_by_group) = jax.lax.scan(accumulate, state.moments, micros)
        moved = apply_accumulated(
            config.optimizer, specs, state.multipliers, trained, moments, state.step, learning_rate, factors
        )
        parameters = {**state.parameters, **moved}
        norms = measure_norms(specs, {}, state.parameters, parameters)
        norms = norms.at[0].set(jnp.sqrt(jnp.mean(squares_by_group, axis=0)))
        sums = jax.tree.map(lambda each: jnp.sum(each, axis=0), sums)
        return Update(parameters, moments, sums, jnp.sqrt(jnp.mean(squares)), norms)

    return hidden_update if hidden else update
