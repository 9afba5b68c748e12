"""Decoder-input noise: some decoder inputs are replaced, so that training reads mistakes as writing does.

In training the decoder always reads the right token before; in writing it reads its own. Replacing inputs at random,
with the targets as they were, narrows that gap (Su 2020, kexue.fm 7259, who draws 30 % of the inputs in half of the
examples from the target; renmada's t5-pegasus-pytorch draws from the vocabulary).
"""

import jax
import jax.numpy as jnp

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig

_STREAM = 2
"""What a row's key is folded with; 0 and 1 are the dropout of encoder and decoder."""


def disturb_decoder_inputs(batch: Batch, config: RunConfig) -> Batch:
    """The batch with some decoder inputs replaced, or the very same one where the noise is off.

    Start tokens and padding stay, and neither they nor the end token are put in place of others. What is drawn depends
    on (train.seed, row id) only, as dropout does: micro-batches and meshes draw the same.
    """
    train = config.train
    if train.decoder_noise_rate == 0:
        return batch
    seed_key = jax.random.key(train.seed)

    def disturb_row(
        row_id: jax.Array, inputs: jax.Array, targets: jax.Array, segment_ids: jax.Array, positions: jax.Array
    ) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(seed_key, row_id), _STREAM)
        where_key, which_key, examples_key = jax.random.split(key, 3)
        examples = jax.random.bernoulli(examples_key, train.decoder_noise_examples, (len(inputs) + 1,))
        chosen = examples[jnp.maximum(segment_ids, 0)]
        replaced = chosen & jax.random.bernoulli(where_key, train.decoder_noise_rate, inputs.shape)
        replaced &= (segment_ids > 0) & (positions > 0)
        if train.decoder_noise_source == "vocabulary":
            others = _draw_ordinary_tokens(which_key, inputs.shape, config)
        else:
            others = _draw_targets(which_key, targets, segment_ids, positions)
        return jnp.where(replaced, others, inputs)

    disturbed = jax.vmap(disturb_row)(
        batch.row_ids,
        batch.decoder_input_tokens,
        batch.decoder_target_tokens,
        batch.decoder_segment_ids,
        batch.decoder_positions,
    )
    return batch._replace(decoder_input_tokens=disturbed)


def _draw_ordinary_tokens(key: jax.Array, shape: tuple[int, ...], config: RunConfig) -> jax.Array:
    """Evenly from the open tokens of the vocabulary without pad, start and end."""
    model = config.model
    excluded = sorted({model.pad_token_id, model.decoder_start_token_id, model.eos_token_id})
    drawn = jax.random.randint(key, shape, 0, model.num_open_tokens - len(excluded), jnp.int32)
    for token in excluded:
        drawn += drawn >= token
    return drawn


def _draw_targets(key: jax.Array, targets: jax.Array, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
    """For each place a token of its own example's target, evenly, the end token left out."""
    places, segments = jnp.arange(len(targets)), jnp.maximum(segment_ids, 0)
    counts = jnp.zeros(len(targets) + 1, jnp.int32).at[segments].add(1)[segments] - 1  # without the end token
    drawn = jnp.floor(jax.random.uniform(key, targets.shape) * counts).astype(jnp.int32)
    return targets[places - positions + jnp.clip(drawn, 0, jnp.maximum(counts - 1, 0))]
