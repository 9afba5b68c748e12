"""Held-out loss by teacher forcing: how well a model foretells the references."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from t5pegasus.batch import Batch
from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.data.packing import pack_examples
from t5pegasus.data.records import Example
from t5pegasus.data.row_layout import check_targets, fill_rows
from t5pegasus.sharding import make_mesh
from t5pegasus.train.heldout_loss import make_heldout_loss


def measure_heldout_loss(
    config: RunConfig, parameters: Mapping[str, Any], examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Mean loss and accuracy per target token by teacher forcing, on one device, from packed rows as in training.

    Args:
        config: the checkpoint's; its row lengths bound the examples.
        parameters: float32, by dotted name.
        examples: source ids, and target ids without the start id.
        batch_size: packed rows per batch.

    Raises:
        DataError: if a target holds a token that the model has masked.
    """
    check_targets(examples, config.model.num_open_tokens, range(len(examples)), "held-out examples")
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    return make_heldout_loss(config, mesh)(dict(parameters), _pack_batches(config, examples, batch_size))


def _pack_batches(config: RunConfig, examples: Sequence[Example], batch_size: int) -> Iterator[Batch]:
    data, model = config.data, config.model
    lengths = np.array([(len(example.source), len(example.target)) for example in examples])
    rows = list(pack_examples(lengths, data.max_source_tokens, data.max_target_tokens))
    for first in range(0, len(rows), batch_size):
        members = rows[first : first + batch_size]
        counts = [len(row) for row in members] + [0] * (batch_size - len(members))
        fields = fill_rows(
            [examples[index] for row in members for index in row],
            counts,
            data,
            model.pad_token_id,
            model.decoder_start_token_id,
        )
        yield Batch(**fields, row_ids=np.arange(first, first + batch_size, dtype=np.uint32))
