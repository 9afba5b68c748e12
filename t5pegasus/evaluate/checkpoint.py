"""How good a checkpoint is on pairs of text and summary: held-out loss, ROUGE of what it writes, lead baseline."""

import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.config import SCHEMA, MeshConfig, RunConfig, write_json
from t5pegasus.corpus.chain import Chain
from t5pegasus.data.loader import fill_rows
from t5pegasus.data.packing import pack_examples
from t5pegasus.data.shards import Example
from t5pegasus.errors import DataError
from t5pegasus.evaluate.scores import score_pairs
from t5pegasus.generate.summarize import Summarizer
from t5pegasus.progress import Progress
from t5pegasus.sharding import make_mesh
from t5pegasus.text.clean import clean_text
from t5pegasus.text.read import Document
from t5pegasus.text.rouge import ROUGE_DEFINITION, first_sentence
from t5pegasus.train.step import make_heldout_loss

_PORTION_BATCHES = 16
"""Texts are sorted by length within so many batches; progress is shown after each portion."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluation found; `to_json` is scores.json."""

    checkpoint: str
    step: int
    num_pairs: int
    dropped: dict[str, int]
    """Unusable pairs by reason."""
    heldout_loss: float
    """Nats per target token, mean over all of them (end tokens included), by teacher forcing."""
    heldout_accuracy: float
    rouge: dict[str, dict[str, float]]
    """System (`model`, `lead`) → `rouge-1`, `rouge-2`, `rouge-l`, in percent."""
    mean_characters: dict[str, float]
    """Of the outputs of each system, and of the `reference`."""
    generation: dict[str, Any]
    """The options the model wrote with."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that also names the definition of ROUGE."""
        return {"schema": SCHEMA, **dataclasses.asdict(self), "rouge_definition": ROUGE_DEFINITION}

    def to_table(self) -> str:
        """The same for people, in a few lines."""
        lines = [
            f"{self.checkpoint} (step {self.step}), {self.num_pairs:,} pairs",
            *(f"left out: {count:,} pairs, {reason}" for reason, count in self.dropped.items()),
            f"held-out loss {self.heldout_loss:.4f} nats per target token",
            f"held-out accuracy {100 * self.heldout_accuracy:.2f} %",
            "",
            f"{'':<10}{'ROUGE-1':>9}{'ROUGE-2':>9}{'ROUGE-L':>9}{'characters':>12}",
        ]
        for system, characters in self.mean_characters.items():
            figures = (
                [self.rouge[system][name] for name in ("rouge-1", "rouge-2", "rouge-l")] if system in self.rouge else []
            )
            cells = "".join(f"{figure:9.2f}" for figure in figures) or " " * 27
            lines.append(f"{system:<10}{cells}{characters:12.1f}")
        return "\n".join([*lines, "", ROUGE_DEFINITION, "lead = the first sentence of the text"])


def evaluate_checkpoint(
    checkpoint: Path, summarizer: Summarizer, pairs: Iterable[Document], dropped: Counter[str] | None = None
) -> tuple[Scores, list[dict[str, str]]]:
    """Score a checkpoint on pairs (documents whose title is the summary).

    Args:
        checkpoint: its folder.
        summarizer: loaded from it, with the options to write with.
        pairs: cleaned here as in training; those with an empty side are left out and counted.
        dropped: pairs left out before, by reason, to be reported together.

    Returns:
        The scores, and per pair `id`, `source`, `reference` and `summary`.

    Raises:
        DataError: if no pair is left.
    """
    info = load_checkpoint_info(checkpoint)
    dropped = Counter() if dropped is None else dropped
    data = info.config.data
    chain = Chain("pairs", summarizer.tokenizer, data.max_source_tokens, data.max_target_tokens)
    kept: list[dict[str, str]] = []
    examples: list[Example] = []
    for pair in pairs:
        made = chain.run(pair)
        if isinstance(made, str):
            dropped[made] += 1
            continue
        examples += [Example(*(np.array(side, np.int32) for side in example)) for example in made.examples]
        kept.append({"id": pair.id, "source": clean_text(pair.text), "reference": clean_text(pair.title or "")})
    if not kept:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "the file holds none"
        raise DataError(f"no pair can be used ({reasons}); give lines {{text, summary}} or title<TAB>text")
    heldout = measure_heldout_loss(info.config, summarizer.parameters, examples, summarizer.batch_size)
    references = [record["reference"] for record in kept]
    outputs = {
        "model": _summarize(summarizer, [record["source"] for record in kept]),
        "lead": [first_sentence(record["source"]) for record in kept],
    }
    for record, summary in zip(kept, outputs["model"]):
        record["summary"] = summary
    scores = Scores(
        checkpoint=str(checkpoint),
        step=info.step,
        num_pairs=len(kept),
        dropped=dict(dropped),
        heldout_loss=heldout["loss"],
        heldout_accuracy=heldout["accuracy"],
        rouge={system: score_pairs(references, texts) for system, texts in outputs.items()},
        mean_characters={
            system: statistics.fmean(map(len, texts)) for system, texts in {**outputs, "reference": references}.items()
        },
        generation=dataclasses.asdict(summarizer.options),
    )
    return scores, kept


def measure_heldout_loss(
    config: RunConfig, parameters: Mapping[str, Any], examples: Sequence[Example], batch_size: int
) -> dict[str, float]:
    """Mean loss and accuracy per target token by teacher forcing, on one device, from packed rows as in training.

    Args:
        config: the checkpoint's; its row lengths bound the examples.
        parameters: float32, by dotted name.
        examples: source ids, and target ids without the start id.
        batch_size: packed rows per batch.
    """
    mesh = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
    return make_heldout_loss(config, mesh)(dict(parameters), _pack_batches(config, examples, batch_size))


def save_evaluation(folder: Path, scores: Scores, records: Iterable[Mapping[str, str]]) -> None:
    """Write scores.json and summaries.jsonl into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "summaries.jsonl.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    temporary.replace(folder / "summaries.jsonl")
    write_json(folder / "scores.json", scores.to_json())


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


def _summarize(summarizer: Summarizer, sources: Sequence[str]) -> list[str]:
    summaries: list[str] = []
    portion = _PORTION_BATCHES * summarizer.batch_size
    with Progress("summarize", total=len(sources), unit="texts") as progress:
        for first in range(0, len(sources), portion):
            texts = sources[first : first + portion]
            summaries += [summary.text for summary in summarizer.summarize(texts, first)]
            progress.advance(len(texts))
    return summaries
