"""Beam search with a pool of finished hypotheses and an exact end.

The score of a hypothesis is Σ log p / length ** length_penalty, its length counting the end token. At each step
the 2K best continuations of the K running hypotheses are looked at: those among the K best that end join the
pool, which keeps its K best; the K best that do not end run on (of 2K there are always so many, because each
hypothesis has one way to end). A row is done when no running hypothesis can still beat the worst of its pool,
whatever it goes on to write: log p is never positive, so the most that a sum s can still become is
s / max_new_tokens ** length_penalty for a positive penalty, and s / (length + 1) ** length_penalty otherwise.
What is still running at `max_new_tokens` competes with the pool as it is.

With one beam and length_penalty 0 this is greedy search. With another penalty it may go past the likeliest end.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t5pegasus.config import ModelConfig
from t5pegasus.generate.options import Generated, GenerationOptions
from t5pegasus.model.t5 import T5, DecoderCache


class _Beams(NamedTuple):
    """The loop's state. The cross-attention cache is no part of it: the loop only reads it."""

    position: jax.Array
    """Tokens written by every running hypothesis."""
    self_keys: jax.Array
    """[layers, B·K, max_tokens, heads, d_kv]."""
    self_values: jax.Array
    last: jax.Array
    """int32 [B, K]: the next decoder inputs."""
    running_tokens: jax.Array
    """int32 [B, K, T]."""
    running_sums: jax.Array
    """[B, K]: Σ log p, descending; -inf where there is no hypothesis."""
    pool_tokens: jax.Array
    pool_lengths: jax.Array
    pool_scores: jax.Array
    """[B, K], descending; -inf where there is no hypothesis."""


def search_beams(model: T5, cache: DecoderCache, options: GenerationOptions) -> Generated:
    """The best `num_beams` hypotheses of every row.

    Args:
        model: bound to parameters.
        cache: empty, over the encoded sources, one per row.
        options: beams, length limit and penalty.
    """
    config, num_beams, max_tokens = model.config, options.num_beams, options.max_new_tokens
    active = jnp.any(cache.cross_mask, axis=1)
    cache = _repeat_rows(cache, num_beams)

    def unfinished(state: _Beams) -> jax.Array:
        length = max_tokens if options.length_penalty > 0 else state.position + 1
        attainable = _normalise(state.running_sums[:, 0], length, options)
        return (state.position < max_tokens) & jnp.any(attainable > state.pool_scores[:, -1])

    def step(state: _Beams) -> _Beams:
        now = cache._replace(self_keys=state.self_keys, self_values=state.self_values)
        logits, now = model.decode_step(now, state.last.reshape(-1), state.position)
        sums = state.running_sums[..., None] + jax.nn.log_softmax(logits).reshape(*state.last.shape, -1)
        sums, parents, tokens = _take_best_continuations(sums, 2 * num_beams)
        extended = jax.lax.dynamic_update_slice(
            jnp.take_along_axis(state.running_tokens, parents[..., None], axis=1),
            tokens[..., None],
            (0, 0, state.position),
        )
        ends = tokens == config.eos_token_id
        length = state.position + 1
        joins = ends & (jnp.arange(2 * num_beams) < num_beams)[None]
        scores = jnp.where(joins, _normalise(sums, length, options), -jnp.inf)
        pool_tokens, pool_lengths, pool_scores = _join_pool(state, extended, length, scores)
        running_sums, places = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), num_beams)
        parents = jnp.take_along_axis(parents, places, axis=1)
        rows = (parents + num_beams * jnp.arange(len(parents))[:, None]).reshape(-1)
        return _Beams(
            position=length,
            self_keys=now.self_keys[:, rows],
            self_values=now.self_values[:, rows],
            last=jnp.take_along_axis(tokens, places, axis=1),
            running_tokens=jnp.take_along_axis(extended, places[..., None], axis=1),
            running_sums=running_sums,
            pool_tokens=pool_tokens,
            pool_lengths=pool_lengths,
            pool_scores=pool_scores,
        )

    end = jax.lax.while_loop(unfinished, step, _start(cache, active, config, num_beams))
    at_limit = _normalise(end.running_sums, max_tokens, options)
    at_limit = jnp.where(end.position == max_tokens, at_limit, -jnp.inf)
    tokens, lengths, scores = _join_pool(end, end.running_tokens, end.position, at_limit)
    exists = scores > -jnp.inf
    return Generated(tokens, jnp.where(exists, lengths, 0), jnp.where(active[:, None], scores, 0))


def _repeat_rows(cache: DecoderCache, num_beams: int) -> DecoderCache:
    """Each source `num_beams` times, once before the loop."""
    repeated = (jnp.repeat(array, num_beams, axis=1) for array in cache[:4])
    return DecoderCache(*repeated, cross_mask=jnp.repeat(cache.cross_mask, num_beams, axis=0))


def _start(cache: DecoderCache, active: jax.Array, config: ModelConfig, num_beams: int) -> _Beams:
    shape = (len(active), num_beams)
    wide = jnp.promote_types(cache.self_keys.dtype, jnp.float32)
    nothing = jnp.full(shape, -jnp.inf, wide)
    tokens = jnp.full((*shape, cache.self_keys.shape[2]), config.pad_token_id, jnp.int32)
    return _Beams(
        position=jnp.zeros((), jnp.int32),
        self_keys=cache.self_keys,
        self_values=cache.self_values,
        last=jnp.full(shape, config.decoder_start_token_id, jnp.int32),
        running_tokens=tokens,
        running_sums=nothing.at[:, 0].set(jnp.where(active, 0, -jnp.inf)),
        pool_tokens=tokens,
        pool_lengths=jnp.zeros(shape, jnp.int32),
        pool_scores=nothing,
    )


def _take_best_continuations(sums: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of [B, K, V] the best `count`: their sums, hypotheses and tokens, each [B, count], best first."""
    num_rows, _, vocab_size = sums.shape
    best, places = jax.lax.top_k(sums.reshape(num_rows, -1), count)
    return best, places // vocab_size, places % vocab_size


def _join_pool(
    state: _Beams, tokens: jax.Array, length: jax.Array, scores: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best K of the pool and of hypotheses of one length: tokens, lengths, scores; of equals the pool's first."""
    joined_tokens = jnp.concatenate([state.pool_tokens, tokens], axis=1)
    joined_lengths = jnp.concatenate([state.pool_lengths, jnp.broadcast_to(length, scores.shape)], axis=1)
    best, places = jax.lax.top_k(jnp.concatenate([state.pool_scores, scores], axis=1), state.last.shape[1])
    return (
        jnp.take_along_axis(joined_tokens, places[..., None], axis=1),
        jnp.take_along_axis(joined_lengths, places, axis=1),
        best,
    )


def _normalise(sums: jax.Array, length: jax.Array | int, options: GenerationOptions) -> jax.Array:
    return sums / jnp.asarray(length, sums.dtype) ** options.length_penalty
