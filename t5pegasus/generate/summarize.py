"""Summaries of texts: clean, tokenise, group by length into few shapes, search, answer in the order of the texts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5pegasus.checkpoint import load_checkpoint_info, load_parameters
from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.text.clean import clean_text
from t5pegasus.text.tokenizer import Tokenizer, load_tokenizer

MIN_SOURCE_WIDTH = 64
"""Narrower batches save nothing, and every width is one more program to compile."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the model wrote about one text."""

    text: str
    score: float
    """Σ log p / tokens ** length_penalty; 0 for an empty text."""
    num_tokens: int
    """Tokens written, the end token among them; 0 for an empty text, which has an empty summary."""


@dataclasses.dataclass(frozen=True)
class Summarizer:
    """A model with its tokenizer and the way to search; runs on one device."""

    model: ModelConfig
    parameters: Mapping[str, Any]
    """float32, by dotted name."""
    tokenizer: Tokenizer
    options: GenerationOptions
    max_source_tokens: int
    """Longer texts lose their end."""
    compute_dtype: str
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size} must be at least 1")

    def summarize(self, texts: Sequence[str], first_index: int = 0) -> list[Summary]:
        """One summary per text, in the order of the texts.

        Texts of similar length share a batch, whatever their order. Its width is the next power of two from
        `MIN_SOURCE_WIDTH` on (or `max_source_tokens`), its number of rows the next power of two up to
        `batch_size`, so that a corpus needs a handful of compiled programs.

        Args:
            texts: cleaned here as documents are before training.
            first_index: of the first text, for those who call in portions: sampling draws by seed and index.
        """
        cleaned = [clean_text(text) for text in texts]
        sources = {
            index: self.tokenizer.encode_source(text, self.max_source_tokens)
            for index, text in enumerate(cleaned)
            if text
        }
        summaries = [Summary("", 0.0, 0)] * len(texts)
        by_length = sorted(sources, key=lambda index: len(sources[index]))
        for start in range(0, len(by_length), self.batch_size):
            indices = by_length[start : start + self.batch_size]
            written = self._write([sources[index] for index in indices], np.array(indices) + first_index)
            for index, summary in zip(indices, written):
                summaries[index] = summary
        return summaries

    def _write(self, sources: list[list[int]], indices: np.ndarray) -> list[Summary]:
        num_rows = min(_next_power_of_two(len(sources)), self.batch_size)
        longest = max(map(len, sources))
        width = min(max(_next_power_of_two(longest), MIN_SOURCE_WIDTH), self.max_source_tokens)
        tokens = np.full((num_rows, width), self.model.pad_token_id, np.int32)
        segment_ids = np.zeros((num_rows, width), np.int32)
        for row, source in enumerate(sources):
            tokens[row, : len(source)] = source
            segment_ids[row, : len(source)] = 1
        row_ids = np.zeros(num_rows, np.uint32)
        row_ids[: len(sources)] = indices
        generated = jax.device_get(
            generate(self.model, self.parameters, tokens, segment_ids, row_ids, self.options, self.compute_dtype)
        )
        return [
            Summary(self.tokenizer.decode(best[:length].tolist()), float(score), int(length))
            for best, length, score, _ in zip(
                generated.tokens[:, 0], generated.lengths[:, 0], generated.scores[:, 0], sources
            )
        ]


def load_summarizer(
    checkpoint: Path,
    options: GenerationOptions | None = None,
    *,
    max_source_tokens: int | None = None,
    batch_size: int = 16,
) -> Summarizer:
    """The summarizer of a checkpoint folder that has been verified (`find_checkpoint`); reads parameters only.

    It computes in the checkpoint's dtype, on a CPU in float32 (its bfloat16 is the slower one).

    Args:
        checkpoint: a checkpoint folder.
        options: default: greedy, as many tokens as the targets it was trained on.
        max_source_tokens: default: as many as the sources it was trained on.
        batch_size: texts per batch.

    Raises:
        ArtifactError: if the tokenizer in the folder is not the one the checkpoint was trained with.
    """
    info = load_checkpoint_info(checkpoint)
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    if tokenizer.fingerprint != info.tokenizer_fingerprint:
        raise ArtifactError(
            f"{checkpoint / 'tokenizer'} has fingerprint {tokenizer.fingerprint[:12]}…, the checkpoint was trained "
            f"with {info.tokenizer_fingerprint[:12]}…; put the tokenizer of its training back"
        )
    on_cpu = jax.default_backend() == "cpu"
    return Summarizer(
        model=info.config.model,
        parameters=jax.device_put(load_parameters(checkpoint), jax.local_devices()[0]),
        tokenizer=tokenizer,
        options=options or GenerationOptions(max_new_tokens=info.config.data.max_target_tokens),
        max_source_tokens=max_source_tokens or info.config.data.max_source_tokens,
        compute_dtype="float32" if on_cpu else info.compute_dtype,
        batch_size=batch_size,
    )


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
