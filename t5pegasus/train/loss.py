"""Token cross-entropy with z-loss, as sums that micro-batches and devices may add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Weighted sums over target tokens (padding weighs 0), float32 scalars; divide by `weight` for means."""

    nll: jax.Array
    """Negative log-likelihood in nats."""
    z: jax.Array
    """log(Z)²."""
    correct: jax.Array
    """Tokens whose arg max is the target."""
    weight: jax.Array
    uniform: jax.Array | None = None
    """log(Z) − the mean logit: the cross-entropy of a target spread evenly over the open tokens; None if not asked."""
    nll_by_row: jax.Array | None = None
    """[batch], of one batch alone."""
    by_source: jax.Array | None = None
    """[2, sources]: NLL and weight by source of the rows (`split_by_source`)."""


def sum_losses(
    logits: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    with_uniform: bool = False,
    num_masked_tokens: int = 0,
) -> LossSums:
    """The sums over one batch.

    Args:
        logits: float32 [batch, target, vocab]; those of masked tokens are so low that their probability is 0.
        targets: int32 [batch, target]. The loss of a masked one is no longer finite or close to that: the data are
            checked for them before (`data.row_layout.check_targets`).
        weights: float32 [batch, target], 0 on padding.
        with_uniform: sum what label smoothing needs, too.
        num_masked_tokens: the model's; label smoothing spreads over the other tokens.
    """
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = weights * (log_normaliser - target_logits)
    return LossSums(
        nll=jnp.sum(nll),
        z=jnp.sum(weights * jnp.square(log_normaliser)),
        correct=jnp.sum(weights * (first_highest(logits) == targets)),
        weight=jnp.sum(weights),
        uniform=jnp.sum(weights * (log_normaliser - _mean_logit(logits, num_masked_tokens))) if with_uniform else None,
        nll_by_row=jnp.sum(nll, axis=-1),
    )


def first_highest(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis, in two plain reductions.

    XLA shares the first with the softmax: in a train step on a CPU an arg max costs 56 ms for 25 M logits, and these
    are not seen in its profile. (Alone they are no faster.)
    """
    highest = jnp.max(logits, axis=-1, keepdims=True)
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.min(jnp.where(logits == highest, places, logits.shape[-1]), axis=-1)


def split_by_source(sums: LossSums, weights: jax.Array, source_ids: jax.Array, num_sources: int) -> LossSums:
    """The sums with those by source instead of those by row; without either where there is one source.

    Args:
        sums: of one batch.
        weights: float32 [batch, target].
        source_ids: int32 [batch].
        num_sources: of the mixture.
    """
    nll, sums = sums.nll_by_row, sums._replace(nll_by_row=None)
    if num_sources < 2 or nll is None:
        return sums
    is_of_source = source_ids[None] == jnp.arange(num_sources)[:, None]
    # No product with a one-hot: a TPU would round what it sums to bfloat16.
    by_row = jnp.stack([nll, jnp.sum(weights, axis=-1)])[:, None]
    return sums._replace(by_source=jnp.sum(jnp.where(is_of_source[None], by_row, 0), axis=-1))


def smooth_labels(sums: LossSums, label_smoothing: float) -> jax.Array:
    """Σ (1 − ε)·NLL + ε·(log Z − mean logit): cross-entropy against (1 − ε)·target + ε·uniform.

    The mean runs over all open tokens, the target among them (Szegedy et al. 2016, §7). The z-loss is no part of
    it and keeps its own weight. At ε = 0 it is the plain sum of NLL, the very same array.
    """
    if sums.uniform is None:
        return sums.nll
    return (1.0 - label_smoothing) * sums.nll + label_smoothing * sums.uniform


def _mean_logit(logits: jax.Array, num_masked_tokens: int) -> jax.Array:
    if num_masked_tokens == 0:
        return jnp.mean(logits, axis=-1)
    num_open = logits.shape[-1] - num_masked_tokens
    is_open = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < num_open
    return jnp.sum(jnp.where(is_open, logits, 0), axis=-1) / num_open
