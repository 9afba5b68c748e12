"""Beam search: the K best hypotheses of every row go on together; how they end is decided by name."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from t5pegasus.generate.candidates import forbid, take_likeliest
from t5pegasus.generate.finalisation import BestEnds, Candidates, Finalisation, Pool
from t5pegasus.generate.options import Generated, GenerationOptions
from t5pegasus.model.decoding import CachedDecoder, DecoderCache


class _Beams(NamedTuple):
    """The loop's state."""

    length: jax.Array
    """Tokens written after the prefix by every running hypothesis."""
    cache: DecoderCache
    last: jax.Array
    """int32 [B, K]: the next decoder inputs."""
    tokens: jax.Array
    """int32 [B, K, L], from the start token on."""
    sums: jax.Array
    """[B, K]: Σ log p, descending; -inf where there is no hypothesis."""
    final: Any
    """The state of the finalisation."""


def search_beams(
    decoder: CachedDecoder, cache: DecoderCache, inputs: jax.Array, options: GenerationOptions
) -> Generated:
    """The best hypotheses of every row.

    Args:
        decoder: over the encoded sources, one per row.
        cache: for `num_beams` hypotheses; all inputs but the last are read.
        inputs: int32 [B, 1 + P]: the start token and the prefix.
        options: beams, limits, length penalty, finalisation.

    Returns:
        Tokens from the start token on, lengths without the prefix.
    """
    config, num_beams, num_inputs = decoder.model.config, options.num_beams, inputs.shape[1]
    finalisation = _choose_finalisation(options)

    def unfinished(state: _Beams) -> jax.Array:
        return (state.length < options.max_new_tokens) & jnp.any(finalisation.is_open(state.final))

    def step(state: _Beams) -> _Beams:
        position = state.length + num_inputs - 1
        hidden, cache = decoder.step(state.cache, state.last, position)
        logits = decoder.logits(hidden)
        allowed = forbid(logits, state.tokens, position + 1, state.length, config, options)
        # Of each hypothesis as many as of all together, so that nothing of the width of the vocabulary is kept.
        best, tokens = take_likeliest(allowed, min(2 * num_beams, config.vocab_size))
        gains = finalisation.gain(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
        sums, places = jax.lax.top_k(_flatten(state.sums[..., None] + gains), 2 * num_beams)
        parents = places // tokens.shape[-1]
        tokens = jnp.take_along_axis(_flatten(tokens), places, axis=1)
        extended = jax.lax.dynamic_update_slice(
            jnp.take_along_axis(state.tokens, parents[..., None], axis=1), tokens[..., None], (0, 0, position + 1)
        )
        length = state.length + 1
        found = Candidates(sums, tokens == config.eos_token_id, extended)
        final, sums = finalisation.receive(state.final, found, length)
        sums, places = jax.lax.top_k(sums, num_beams)
        return _Beams(
            length=length,
            cache=cache.follow(jnp.take_along_axis(parents, places, axis=1)),
            last=jnp.take_along_axis(tokens, places, axis=1),
            tokens=jnp.take_along_axis(extended, places[..., None], axis=1),
            sums=sums,
            final=finalisation.settle(final, sums, length),
        )

    end = jax.lax.while_loop(unfinished, step, _start(decoder, cache, inputs, options, finalisation))
    return finalisation.finish(end.final, end.tokens, end.sums, end.length)


def _choose_finalisation(options: GenerationOptions) -> Finalisation:
    return BestEnds(options) if options.finalisation == "bert4keras" else Pool(options)


def _start(
    decoder: CachedDecoder,
    cache: DecoderCache,
    inputs: jax.Array,
    options: GenerationOptions,
    finalisation: Finalisation,
) -> _Beams:
    active = jnp.any(decoder.source_mask, axis=1)
    shape = (len(inputs), options.num_beams)
    tokens = jnp.pad(inputs, ((0, 0), (0, options.max_new_tokens)), constant_values=decoder.model.config.pad_token_id)
    tokens = jnp.broadcast_to(tokens[:, None], (*shape, tokens.shape[1]))
    sums = jnp.full(shape, -jnp.inf, decoder.wide).at[:, 0].set(jnp.where(active, 0, -jnp.inf))
    return _Beams(
        length=jnp.zeros((), jnp.int32),
        cache=cache,
        last=jnp.broadcast_to(inputs[:, -1:], shape),
        tokens=tokens,
        sums=sums,
        final=finalisation.start(active, tokens, decoder.wide),
    )


def _flatten(array: jax.Array) -> jax.Array:
    """[B, K, C] → [B, K·C]."""
    return array.reshape(len(array), -1)
