"""The loss of a model on a batch, by whole logits where they are few, else by chunks of the vocabulary."""

import math

import jax
import jax.numpy as jnp

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import T5
from t5pegasus.sharding import RULES
from t5pegasus.train.chunked_loss import ChunkedHead, sum_chunked_losses
from t5pegasus.train.loss import LossSums, sum_losses

WHOLE_BYTES = 2**27
"""Logits of so many bytes per device are computed as a whole: their second computation would take longer."""
CHUNK_BYTES = 2**26
SMALLEST_CHUNK, LARGEST_CHUNK = 1024, 8192
"""Entries: below, products are too narrow to be fast; above, the gathered part of a large head is no small one."""


def sum_model_losses(
    model: T5, batch: Batch, config: RunConfig, *, dropout_seed: int | None = None, with_uniform: bool = False
) -> LossSums:
    """The sums of the loss over one batch.

    Args:
        model: with its parameters.
        batch: packed rows.
        config: of the run, for `train.vocab_chunk`.
        dropout_seed: switches dropout on.
        with_uniform: sum what label smoothing needs, too.
    """
    states = model.read(batch, dropout_seed)
    targets, weights = batch.decoder_target_tokens, batch.decoder_loss_weights
    chunk_size = choose_chunk(config, targets.shape, jnp.promote_types(states.dtype, jnp.float32).itemsize)
    if chunk_size is None:
        num_masked = config.model.num_masked_tokens
        logits = model.logits(states, model.head())
        return sum_losses(logits, targets, weights, with_uniform=with_uniform, num_masked_tokens=num_masked)
    how = ChunkedHead(config.model.num_open_tokens, chunk_size, with_uniform)
    return sum_chunked_losses(states, model.head(), targets, weights, how)


def choose_chunk(config: RunConfig, shape: tuple[int, ...], itemsize: int) -> int | None:
    """How many entries of a device's part of the vocabulary to take at once; None for whole logits.

    Args:
        config: `train.vocab_chunk`, or 0 to choose: whole logits where they take little memory and the head is not
            split by its columns, which would have to be gathered; else chunks of about equal size.
        shape: of the targets, [rows on all devices, positions].
        itemsize: bytes of a logit.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def splits(axis: str) -> int:
        rule = RULES[axis]
        names = (rule,) if isinstance(rule, str) else rule or ()
        return 1 if mesh.empty else math.prod(mesh.shape[name] for name in names)

    own_vocabulary = config.model.vocab_size // splits("vocab")
    if config.train.vocab_chunk:
        return None if config.train.vocab_chunk >= config.model.vocab_size else config.train.vocab_chunk
    column_bytes = math.prod(shape) // splits("batch") * itemsize
    if splits("embed") == 1 and own_vocabulary * column_bytes <= WHOLE_BYTES:
        return None
    largest = min(max(CHUNK_BYTES // column_bytes, SMALLEST_CHUNK), LARGEST_CHUNK)
    even = -(-own_vocabulary // -(-own_vocabulary // largest))
    return min(-(-even // 128) * 128, own_vocabulary)
