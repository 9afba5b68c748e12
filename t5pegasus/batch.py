"""The arrays a model trains on: one packed row may hold several examples, kept apart by segment ids."""

from typing import Any, NamedTuple

Array = Any
"""A NumPy or JAX array; this file imports neither."""

OF_ROWS = ("row_ids", "source_ids", "num_bad_examples")
"""Fields with one number per row; the others have one per position."""


class Batch(NamedTuple):
    """A batch of packed rows; field names are seqio's. B rows, S source and T target positions.

    Segment ids count 1, 2, … along a row, 0 is padding; positions restart at 0 in every segment. A negative id -n
    marks a position that reads segment n and that nothing reads: padding as other implementations treat it.
    """

    encoder_input_tokens: Array
    """int32 [B, S], pad id where empty."""
    encoder_segment_ids: Array
    """int32 [B, S]."""
    encoder_positions: Array
    """int32 [B, S]."""
    decoder_input_tokens: Array
    """int32 [B, T]: the targets moved right by one behind the start id, in each segment."""
    decoder_target_tokens: Array
    """int32 [B, T], ending with the end id in each segment."""
    decoder_loss_weights: Array
    """float32 [B, T]: 1 on targets, 0 on padding."""
    decoder_segment_ids: Array
    """int32 [B, T]."""
    decoder_positions: Array
    """int32 [B, T]."""
    row_ids: Array
    """uint32 [B]: number of the row in the stream since the beginning of training; keys its dropout."""
    source_ids: Array = None
    """int32 [B]: which source of the mixture the row is of, in the order of `data.mixture`; None if nobody asks."""
    num_bad_examples: Array = None
    """int32 [B]: examples of the row that could not be read, whose segments are empty; None if nobody asks."""
