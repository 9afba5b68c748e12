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
) -> Generated:
    """Write an output for every row; stops as soon as no row can change its result any more.

    Compiled once per shape of the source, config, options and dtype.

    Args:
        config: the model's shape; its token ids start, end and pad the outputs.
        parameters: by dotted name.
        source_tokens: int32 [B, S], one source per row.
        source_segment_ids: int32 [B, S], 1 on tokens and 0 on padding; a row of zeros is empty and costs nothing.
        row_ids: uint32 [B], what sampling draws a row's random numbers from, next to the seed.
        options: which search.
        compute_dtype: of activations and the cache; log-probabilities are float32 at least.

    Returns:
        Tokens, lengths and scores: of `num_beams` hypotheses per row, best first (one, if not beam search).
    """
    model = bind(config, parameters, compute_dtype)
    encoded = model.encode(source_tokens, source_segment_ids)
    cache = model.start_cache(encoded, source_segment_ids, options.max_new_tokens)
    if options.num_beams > 1:
        return search_beams(model, cache, options)
    return write_sequentially(model, cache, row_ids, options)
