"""Which tokens may follow, and the likeliest of them."""

import jax
import jax.numpy as jnp

from t5pegasus.config import ModelConfig
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.model.t5 import open_tokens

_BLOCK = 128
"""Tokens per block of the vocabulary in `take_likeliest`."""


def forbid(
    logits: jax.Array,
    tokens: jax.Array,
    num_tokens: jax.Array | int,
    num_new: jax.Array | int,
    config: ModelConfig,
    options: GenerationOptions,
) -> jax.Array:
    """Logits with -inf on masked tokens and on those that `min_new_tokens` and `no_repeat_ngram_size` forbid.

    Args:
        logits: [B, K, V] of the next token.
        tokens: int32 [B, K, L]: the start token, the prefix, what was written, and room behind.
        num_tokens: how many of the L there are.
        num_new: how many of those come after the prefix.
        config: knows the end token, and which tokens are masked.
        options: what is forbidden.
    """
    if config.num_masked_tokens > 0:  # not only unlikely: where all others are forbidden, nothing can follow
        logits = jnp.where(open_tokens(logits, config), logits, -jnp.inf)
    if options.min_new_tokens > 0:
        end = config.eos_token_id
        logits = logits.at[..., end].set(jnp.where(num_new < options.min_new_tokens, -jnp.inf, logits[..., end]))
    size = options.no_repeat_ngram_size
    if 0 < size <= tokens.shape[-1]:
        num_windows = tokens.shape[-1] - size + 1
        matches = jnp.broadcast_to(jnp.arange(num_windows) + size <= num_tokens, (*tokens.shape[:2], num_windows))
        for place in range(size - 1):
            recent = jax.lax.dynamic_slice_in_dim(tokens, num_tokens - size + 1 + place, 1, axis=2)
            matches &= tokens[..., place : place + num_windows] == recent
        nowhere = logits.shape[-1]
        repeating = jnp.where(matches, tokens[..., size - 1 :], nowhere)
        rows, hypotheses = jnp.arange(tokens.shape[0])[:, None, None], jnp.arange(tokens.shape[1])[None, :, None]
        logits = logits.at[rows, hypotheses, repeating].set(-jnp.inf, mode="drop")
    return logits


def take_likeliest(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The same as `lax.top_k` along the last axis: values and indices, best first, of equals the first.

    The best `count` lie in the `count` blocks with the largest maxima, so a wide axis is read once, by a maximum that
    XLA vectorises, and only those blocks are searched: on 32 × 50,000 values 4 times faster on a CPU.
    """
    width = logits.shape[-1]
    num_blocks = -(-width // _BLOCK)
    if num_blocks < 4 * count:
        return jax.lax.top_k(logits, count)
    room = [(0, 0)] * (logits.ndim - 1) + [(0, num_blocks * _BLOCK - width)]
    blocks = jnp.pad(logits, room, constant_values=-jnp.inf).reshape(*logits.shape[:-1], num_blocks, _BLOCK)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(blocks, axis=-1), count)[1], axis=-1)
    within = jnp.arange(_BLOCK).reshape((1,) * logits.ndim + (_BLOCK,))
    indices = (chosen[..., None] * _BLOCK + within).reshape(*logits.shape[:-1], count * _BLOCK)
    values = jnp.take_along_axis(logits, jnp.minimum(indices, width - 1), axis=-1)
    best, places = jax.lax.top_k(jnp.where(indices < width, values, -jnp.inf), count)
    return best, jnp.take_along_axis(indices, places, axis=-1)
