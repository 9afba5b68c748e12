"""Token cross-entropy with z-loss, as sums that micro-batches and devices may add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Weighted sums over target tokens, float32 scalars; divide by `weight` for means."""

    nll: jax.Array
    """Negative log-likelihood in nats."""
    z: jax.Array
    """log(Z)²."""
    correct: jax.Array
    """Tokens whose arg max is the target."""
    weight: jax.Array


def sum_losses(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> LossSums:
    """The sums over one batch.

    Args:
        logits: float32 [batch, target, vocab].
        targets: int32 [batch, target].
        weights: float32 [batch, target], 0 on padding.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return LossSums(
        nll=jnp.sum(weights * (log_normaliser - target_logits)),
        z=jnp.sum(weights * jnp.square(log_normaliser)),
        correct=jnp.sum(weights * (jnp.argmax(logits, axis=-1) == targets)),
        weight=jnp.sum(weights),
    )
