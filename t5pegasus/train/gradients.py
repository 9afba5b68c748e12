"""The training loss of a batch and its gradients, as a pure function: micro-batches summed."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import bind
from t5pegasus.train.execution import resolve_execution
from t5pegasus.train.head_loss import sum_model_losses
from t5pegasus.train.loss import LossSums, smooth_labels, split_by_source
from t5pegasus.train.noise import disturb_decoder_inputs


def pure_gradients(
    config: RunConfig, compute_dtype: Any
) -> Callable[[dict[str, jax.Array], Mapping[str, jax.Array], Batch], tuple[dict[str, jax.Array], LossSums]]:
    """A pure function (trained parameters, all parameters, batch) → (gradients of the training loss, its sums).

    The loss is the mean over the batch's target tokens, with smoothing, z-loss, dropout and decoder noise as
    configured; micro-batches are summed.
    """
    smoothing = config.train.label_smoothing
    num_sources = len(config.data.mixture_weights())

    def find_gradients(
        trained: dict[str, jax.Array], parameters: Mapping[str, jax.Array], batch: Batch
    ) -> tuple[dict[str, jax.Array], LossSums]:
        total_weight = jnp.maximum(1.0, jnp.sum(batch.decoder_loss_weights))

        def objective(trained: dict[str, jax.Array], micro: Batch) -> tuple[jax.Array, LossSums]:
            micro = disturb_decoder_inputs(micro, config)
            execution = resolve_execution(config, compute_dtype)
            model = bind(config.model, {**parameters, **trained}, compute_dtype, execution)
            seed = config.train.seed
            sums = sum_model_losses(model, micro, config, dropout_seed=seed, with_uniform=smoothing > 0)
            sums = split_by_source(sums, micro.decoder_loss_weights, micro.source_ids, num_sources)
            return (smooth_labels(sums, smoothing) + config.train.z_loss * sums.z) / total_weight, sums

        def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
            gradients, sums = jax.grad(objective, has_aux=True)(trained, micro)
            return jax.tree.map(jnp.add, carry, (gradients, sums)), None

        sums = LossSums(*(jnp.zeros(()),) * (5 if smoothing else 4))
        if num_sources > 1:
            sums = sums._replace(by_source=jnp.zeros((2, num_sources)))
        zeros = jax.tree.map(jnp.zeros_like, trained), sums
        return jax.lax.scan(accumulate, zeros, split_micro(batch, config.train.accumulation_steps))[0]

    return find_gradients


def split_micro(batch: Batch, count: int) -> Batch:
    """[B, …] → [count, B/count, …], every device giving an equal part of its rows to each micro-batch."""
    return jax.tree.map(lambda field: field.reshape(-1, count, *field.shape[1:]).swapaxes(0, 1), batch)
