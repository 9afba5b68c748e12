"""The one entry to all searches: encode the source, then write token by token inside one compiled program."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.config import ModelConfig
from t5pegasus.generate.beam import search_beams
from t5pegasus.generate.options import Generated, GenerationOptions
from t5pegasus.generate.sequential import write_sequentially
from t5pegasus.model.decoding import CachedDecoder, DecoderCache
from t5pegasus.model.execution import Execution
from t5pegasus.model.t5 import bind


@functools.partial(jax.jit, static_argnames=("config", "options", "compute_dtype"))
def generate(
    config: ModelConfig,
    parameters: Mapping[str, Any],
    source_tokens: jax.Array,
    source_segment_ids: jax.Array,
    row_ids: jax.Array,
    options: GenerationOptions,
    compute_dtype: Any = jnp.float32,
    prefix_tokens: jax.Array | None = None,
) -> Generated:
    """Write an output for every row; stops as soon as no row can change its result any more.

    Compiled once per shape of the source and the prefix, config, options and dtype. With a mesh in context the program
    runs on all of it, on parameters that stay split as in training and rows that divide over data × fsdp.

    Args:
        config: the model's shape; its token ids start, end and pad the outputs.
        parameters: by dotted name.
        source_tokens: int32 [B, S], one source per row.
        source_segment_ids: int32 [B, S], 1 on tokens and 0 on padding; a row of zeros is empty and costs nothing.
        row_ids: uint32 [B], what sampling draws a row's random numbers from, next to the seed.
        options: which search.
        compute_dtype: of activations and the cache; log-probabilities are float32 at least.
        prefix_tokens: int32 [B, P], what every output of a row begins with, without the start token; default: nothing.

    Returns:
        Tokens, lengths and scores: of `num_beams` hypotheses per row, or `num_return` samples, best first.
    """
    encoded = bind(config, parameters, compute_dtype).encode(source_tokens, source_segment_ids)
    model = bind(config, parameters, compute_dtype, Execution(split_width=True))
    decoder = CachedDecoder.over(model, encoded, source_segment_ids > 0)
    inputs = jnp.full((len(source_tokens), 1), config.decoder_start_token_id, jnp.int32)
    if prefix_tokens is not None:
        inputs = jnp.concatenate([inputs, jnp.asarray(prefix_tokens, jnp.int32)], axis=1)
    with_beams = options.num_beams > 1 or options.finalisation == "bert4keras"
    num_hypotheses = options.num_beams if with_beams else options.num_return
    cache = decoder.start(num_hypotheses, inputs.shape[1] - 1 + options.max_new_tokens)

    def read(position: jax.Array, cache: DecoderCache) -> DecoderCache:
        tokens = jax.lax.dynamic_slice_in_dim(inputs, position, 1, axis=1)
        return decoder.step(cache, jnp.broadcast_to(tokens, (len(inputs), num_hypotheses)), position)[1]

    if inputs.shape[1] > 1:
        cache = jax.lax.fori_loop(0, inputs.shape[1] - 1, read, cache)
    if with_beams:
        generated = search_beams(decoder, cache, inputs, options)
    else:
        generated = write_sequentially(decoder, cache, inputs, row_ids, options)
    return _finish(generated, jnp.any(decoder.source_mask, axis=1), inputs.shape[1] - 1, config)


def _finish(generated: Generated, active: jax.Array, num_prefix: int, config: ModelConfig) -> Generated:
    """Drop the start token, count the prefix, and leave nothing where there is no hypothesis."""
    exists = active[:, None] & (generated.scores > -jnp.inf)
    return Generated(
        tokens=jnp.where(exists[..., None], generated.tokens[..., 1:], config.pad_token_id),
        lengths=jnp.where(exists, generated.lengths + num_prefix, 0),
        scores=jnp.where(active[:, None], generated.scores, 0),
    )
