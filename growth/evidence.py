"""What two models are compared on: held-out rows of the same tokenizer, or else random tokens."""

import contextlib
import itertools
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.config import DataConfig, ModelConfig
from t5pegasus.data.loader import PackedRows, load_epoch
from t5pegasus.errors import UsageError

_HELDOUT_BATCH_SIZE = 8
_MAX_HELDOUT_BATCHES = 4
_NUM_RANDOM_ROWS, _MAX_RANDOM_SOURCE, _MAX_RANDOM_TARGET = 8, 64, 32


class EvidenceShape(NamedTuple):
    """The batches that two models are compared on."""

    batches: int
    rows: int
    source_tokens: int
    target_tokens: int


def expect_evidence(data: DataConfig, *, with_examples: bool) -> EvidenceShape:
    """The batches there will be at most, of examples or else of random tokens."""
    if with_examples:
        return EvidenceShape(_MAX_HELDOUT_BATCHES, _HELDOUT_BATCH_SIZE, data.max_source_tokens, data.max_target_tokens)
    source, target = min(_MAX_RANDOM_SOURCE, data.max_source_tokens), min(_MAX_RANDOM_TARGET, data.max_target_tokens)
    return EvidenceShape(1, _NUM_RANDOM_ROWS, source, target)


def load_evidence(
    checkpoint_path: Path, info: CheckpointInfo, seed: int, examples_path: Path | None
) -> tuple[list[Batch], str]:
    """Batches to compare models on, and what they are.

    Args:
        checkpoint_path: of the source.
        info: what it is.
        seed: of random tokens.
        examples_path: examples, of which the `heldout` ones are taken if it has such a folder; None: random tokens.

    Raises:
        UsageError: if the examples have another tokenizer.
    """
    model, data = info.config.model, info.config.data
    if examples_path is None:
        return draw_batches(model, data, seed), f"random tokens, seed {seed}"
    heldout_path = examples_path / "heldout"
    if heldout_path.is_dir():
        examples_path = heldout_path
    with open_rows(checkpoint_path, info, examples_path) as rows:
        batches = itertools.islice(load_epoch(rows, _HELDOUT_BATCH_SIZE), _MAX_HELDOUT_BATCHES)
        return list(batches), str(examples_path)


@contextlib.contextmanager
def open_rows(checkpoint_path: Path, info: CheckpointInfo, examples_path: Path) -> Generator[PackedRows]:
    """Examples as rows of the lengths that the checkpoint's model was trained on.

    Raises:
        UsageError: if the examples have another tokenizer.
    """
    model, data = info.config.model, info.config.data
    with PackedRows(examples_path, data, model.pad_token_id, model.decoder_start_token_id) as rows:
        tokenizer = rows.shards.manifest["tokenizer_fingerprint"]
        if tokenizer != info.tokenizer_fingerprint:
            raise UsageError(
                f"the examples {examples_path} have another tokenizer than checkpoint {checkpoint_path}: "
                f"{tokenizer[:12]}…, {info.tokenizer_fingerprint[:12]}… was wanted; give examples built with "
                f"{checkpoint_path / 'tokenizer'}"
            )
        yield rows


def draw_batches(config: ModelConfig, data: DataConfig, seed: int, shape: EvidenceShape | None = None) -> list[Batch]:
    """A batch of uniformly random tokens, for a growth without held-out text; no target is a masked token."""
    _, num_rows, num_source, num_target = shape or expect_evidence(data, with_examples=False)
    random = np.random.default_rng(seed)
    source = random.integers(config.vocab_size, size=(num_rows, num_source), dtype=np.int32)
    target = random.integers(config.num_open_tokens, size=(num_rows, num_target), dtype=np.int32)
    start = np.full((num_rows, 1), config.decoder_start_token_id, np.int32)
    return [
        Batch(
            encoder_input_tokens=source,
            encoder_segment_ids=np.ones_like(source),
            encoder_positions=np.tile(np.arange(num_source, dtype=np.int32), (num_rows, 1)),
            decoder_input_tokens=np.concatenate([start, target[:, :-1]], axis=1),
            decoder_target_tokens=target,
            decoder_loss_weights=np.ones(target.shape, np.float32),
            decoder_segment_ids=np.ones_like(target),
            decoder_positions=np.tile(np.arange(num_target, dtype=np.int32), (num_rows, 1)),
            row_ids=np.arange(num_rows, dtype=np.uint32),
        )
    ]
