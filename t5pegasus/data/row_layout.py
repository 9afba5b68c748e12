"""Laying examples out in rows: tokens, segment ids and positions of encoder and decoder."""

from collections.abc import Sequence

import numpy as np

from t5pegasus.config import DataConfig
from t5pegasus.data.records import Example, Sequences
from t5pegasus.errors import DataError


def fill_rows(
    examples: Sequence[Example], counts: Sequence[int], data: DataConfig, pad_id: int, start_id: int
) -> dict[str, np.ndarray]:
    """The fields of `Batch` with one number per position, for rows that hold these examples as their segments.

    Args:
        examples: those of the first row, then those of the second, and so on; longer than a row loses its end.
        counts: how many each row holds; the packing sees to it that they fit together.
        data: the lengths of a row.
        pad_id: fills what is left.
        start_id: the first decoder input of each segment.
    """
    sources = Sequences.of([example.source for example in examples])
    targets = Sequences.of([example.target for example in examples])
    return lay_out(sources, targets, np.asarray(counts, np.int64), data, pad_id, start_id)


def lay_out(
    sources: Sequences, targets: Sequences, counts: np.ndarray, data: DataConfig, pad_id: int, start_id: int
) -> dict[str, np.ndarray]:
    """`fill_rows` of sequences; one of length 0 leaves its segment empty."""
    source, source_segments, source_positions = _place(sources, counts, data.max_source_tokens, pad_id)
    target, target_segments, target_positions = _place(targets, counts, data.max_target_tokens, pad_id)
    inputs = np.full_like(target, pad_id)
    inputs[:, 1:] = target[:, :-1]
    inside = target_segments > 0
    inputs[~inside] = pad_id
    inputs[inside & (target_positions == 0)] = start_id
    return {
        "encoder_input_tokens": source,
        "encoder_segment_ids": source_segments,
        "encoder_positions": source_positions,
        "decoder_input_tokens": inputs,
        "decoder_target_tokens": target,
        "decoder_loss_weights": inside.astype(np.float32),
        "decoder_segment_ids": target_segments,
        "decoder_positions": target_positions,
    }


def check_targets(
    examples: Sequence[Example], num_open_tokens: int, indices: Sequence[int] | np.ndarray, where: str
) -> None:
    """Refuse targets with tokens that the model cannot write: their probability is 0, their loss infinite.

    Args:
        examples: what is to be trained or measured on.
        num_open_tokens: the model's (`ModelConfig.num_masked_tokens`).
        indices: the number of each example, for the message.
        where: what they are of, for the message.

    Raises:
        DataError: naming the first such example and its token.
    """
    for index, example in zip(indices, examples):
        if len(example.target) and (highest := int(example.target.max())) >= num_open_tokens:
            raise DataError(
                f"{where}: the target of example {index} holds token {highest}, but of the model's vocabulary only "
                f"the first {num_open_tokens} tokens are open (num_masked_tokens); open the others with t5pegasus "
                "grow, or give examples whose targets do without them"
            )


def _place(
    sequences: Sequences, counts: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of `counts` sequences each, one behind the other: tokens, segment ids, positions.

    A sequence longer than a row keeps its first tokens and its last one.
    """
    shape = (len(counts), width)
    tokens = np.full(shape, pad_id, np.int32)
    segment_ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    cut = sequences.shortened(width)
    lengths = cut.lengths
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(counts)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)  # the first sequence in the same row
    position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    place = np.repeat(rows * width + starts - starts[first], lengths) + position
    taken = cut.places()
    long = sequences.lengths > width
    if long.any():
        taken[(starts + lengths - 1)[long]] = (sequences.starts + sequences.lengths - 1)[long]
    tokens.ravel()[place] = sequences.tokens[taken]
    segment_ids.ravel()[place] = np.repeat(np.arange(len(rows)) - first + 1, lengths)
    positions.ravel()[place] = position
    return tokens, segment_ids, positions
