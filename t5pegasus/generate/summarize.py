"""Summaries of texts: clean, tokenise, group by length into few shapes, search, answer in the order of the texts."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5pegasus.checkpoint import load_checkpoint_info, load_parameters
from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.sharding import batch_unit, mesh_of, place_rows
from t5pegasus.text.clean import clean_text
from t5pegasus.text.tokenizer import Tokenizer, load_tokenizer

MIN_SOURCE_WIDTH = 64
"""Narrower batches save nothing, and every width is one more program to compile."""


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the model wrote about one text."""

    text: str
    score: float
    """Σ log p / tokens ** length_penalty, both without the prefix; 0 for an empty text."""
    num_tokens: int
    """Tokens of prefix and output, the end token among them; 0 for an empty text, which has an empty summary."""


@dataclasses.dataclass(frozen=True)
class Summarizer:
    """A model with its tokenizer and the way to search; runs where its parameters are.

    Where they are split over a mesh, so is the work, and all of its processes call a summarizer alike: with the same
    texts, to get the same summaries.
    """

    model: ModelConfig
    parameters: Mapping[str, Any]
    """float32, by dotted name; of one device, or of a mesh, as `sharding.param_shardings` splits them."""
    tokenizer: Tokenizer
    options: GenerationOptions
    max_source_tokens: int
    """Longer texts lose their end."""
    compute_dtype: str
    batch_size: int = 16
    prefix: str = ""
    """What every summary begins with."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch_size={self.batch_size} must be at least 1")
        if self.max_source_tokens < 2:
            raise UsageError(f"max_source_tokens={self.max_source_tokens} must be at least 2")
        if self.tokenizer.unk_id in self._prefix_ids():
            raise UsageError(
                f"prefix={self.prefix!r} holds a character that the tokenizer does not know, and no summary could "
                "begin with it; leave it out"
            )
        if masked := [index for index in self._prefix_ids() if index >= self.model.num_open_tokens]:
            raise UsageError(
                f"prefix={self.prefix!r} holds {self.tokenizer.token(masked[0])!r}, one of the last "
                f"num_masked_tokens={self.model.num_masked_tokens} of the vocabulary, which are not open yet; "
                "leave it out, or open these tokens with t5pegasus grow"
            )

    def _prefix_ids(self) -> list[int]:
        return self.tokenizer.encode(self.prefix) if self.prefix else []

    def summarize(
        self, texts: Sequence[str], first_index: int = 0, before_batch: Callable[[], None] = lambda: None
    ) -> list[Summary]:
        """One summary per text, in the order of the texts: the best of `summarize_n_best`."""
        return [summaries[0] for summaries in self.summarize_n_best(texts, first_index, before_batch)]

    def summarize_n_best(
        self, texts: Sequence[str], first_index: int = 0, before_batch: Callable[[], None] = lambda: None
    ) -> list[list[Summary]]:
        """For every text, in their order, its summaries, best first: at least one, at most `options.num_return`.

        They are fewer where the search found fewer, or where two of them read the same (the better one is kept).
        Texts of similar length share a batch, whatever their order. Its width is the next power of two from
        `MIN_SOURCE_WIDTH` on (or `max_source_tokens`), its number of rows the next power of two up to
        `batch_size`, so that a corpus needs a handful of compiled programs. On a mesh both numbers of rows are rounded
        up to what its data and fsdp axes divide.

        Args:
            texts: cleaned here as documents are before training.
            first_index: of the first text, for those who call in portions: sampling draws by seed and index.
            before_batch: called in front of each batch; what it raises ends the call.

        Raises:
            UsageError: if the options forbid every output of a text (a short vocabulary without repetitions).
        """
        cleaned = [clean_text(text) for text in texts]
        sources = {
            index: self.tokenizer.encode_source(text, self.max_source_tokens)
            for index, text in enumerate(cleaned)
            if text
        }
        summaries = [[Summary("", 0.0, 0)] for _ in texts]
        by_length = sorted(sources, key=lambda index: len(sources[index]))
        for start in range(0, len(by_length), self._num_rows(self.batch_size)):
            before_batch()
            indices = by_length[start : start + self._num_rows(self.batch_size)]
            written = self._write([sources[index] for index in indices], np.array(indices) + first_index)
            for index, candidates in zip(indices, written):
                summaries[index] = candidates
        return summaries

    @functools.cached_property
    def _mesh(self) -> Mesh | None:
        return mesh_of(self.parameters)

    def _num_rows(self, wanted: int) -> int:
        """Of a batch that has at least so many, where the mesh divides it."""
        unit = batch_unit(self._mesh)
        return -(-wanted // unit) * unit

    def _write(self, sources: list[list[int]], indices: np.ndarray) -> list[list[Summary]]:
        num_rows = self._num_rows(max(len(sources), min(_next_power_of_two(len(sources)), self.batch_size)))
        longest = max(map(len, sources))
        width = min(max(_next_power_of_two(longest), MIN_SOURCE_WIDTH), self.max_source_tokens)
        tokens = np.full((num_rows, width), self.model.pad_token_id, np.int32)
        segment_ids = np.zeros((num_rows, width), np.int32)
        for row, source in enumerate(sources):
            tokens[row, : len(source)] = source
            segment_ids[row, : len(source)] = 1
        row_ids = np.zeros(num_rows, np.uint32)
        row_ids[: len(sources)] = indices
        prefix = np.tile(np.array(self._prefix_ids(), np.int32), (num_rows, 1))
        generated = self._generate(tokens, segment_ids, row_ids, prefix)
        return [
            self._read(*(array[row] for array in generated), index=index) for row, index in enumerate(indices.tolist())
        ]

    def _generate(self, tokens: np.ndarray, segment_ids: np.ndarray, row_ids: np.ndarray, prefix: np.ndarray) -> Any:
        """What the search finds, on the host of every process."""
        run = functools.partial(generate, options=self.options, compute_dtype=self.compute_dtype)
        mesh = self._mesh
        if mesh is None:
            return jax.device_get(run(self.model, self.parameters, tokens, segment_ids, row_ids, prefix_tokens=prefix))
        *sources, placed = (place_rows(array, mesh) for array in (tokens, segment_ids, row_ids, prefix))
        with jax.set_mesh(mesh):
            generated = run(self.model, self.parameters, *sources, prefix_tokens=placed)
            return jax.device_get(jax.device_put(generated, NamedSharding(mesh, PartitionSpec())))

    def _read(self, tokens: np.ndarray, lengths: np.ndarray, scores: np.ndarray, index: int) -> list[Summary]:
        """The different texts among the hypotheses of one row."""
        candidates: dict[str, Summary] = {}
        for ids, length, score in zip(tokens, lengths, scores):
            if score > -np.inf:
                text = self.tokenizer.decode(ids[:length].tolist())
                candidates.setdefault(text, Summary(text, float(score), int(length)))
        if not candidates:
            raise UsageError(
                f"text {index}: min_new_tokens={self.options.min_new_tokens} and no_repeat_ngram_size="
                f"{self.options.no_repeat_ngram_size} leave no summary in a vocabulary of {self.model.vocab_size}; "
                "loosen one of them"
            )
        return list(candidates.values())[: self.options.num_return]


def load_summarizer(
    checkpoint: Path,
    options: GenerationOptions | None = None,
    *,
    max_source_tokens: int | None = None,
    batch_size: int = 16,
    prefix: str = "",
) -> Summarizer:
    """The summarizer of a checkpoint folder that has been verified (`find_checkpoint`); reads parameters only.

    It computes in the checkpoint's dtype, on a CPU in float32 (its bfloat16 is the slower one).

    Args:
        checkpoint: a checkpoint folder.
        options: default: greedy, as many tokens as the targets it was trained on.
        max_source_tokens: default: as many as the sources it was trained on. More is possible: the model has no
            longest input, its relative positions are alike from `relative_attention_max_distance` on, or from the
            last of `relative_attention_boundaries`.
        batch_size: texts per batch.
        prefix: what every summary begins with.

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
        max_source_tokens=info.config.data.max_source_tokens if max_source_tokens is None else max_source_tokens,
        compute_dtype="float32" if on_cpu else info.compute_dtype,
        batch_size=batch_size,
        prefix=prefix,
    )


def _next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
