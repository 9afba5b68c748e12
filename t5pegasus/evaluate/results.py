"""What an evaluation finds out: scores of every system with intervals, differences, lengths; its files."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from t5pegasus.evaluate.bootstrap import Bootstrap, Interval
from t5pegasus.evaluate.lengths import LengthBin, score_by_length
from t5pegasus.evaluate.scores import DEFINITIONS, PAIR_SCORES, PairScores, score_each_pair
from t5pegasus.json_files import SCHEMA, write_json
from t5pegasus.storage import write_bytes
from t5pegasus.text.overlap import measure_copied_fraction

LEAD = "lead"
SYSTEMS = {
    "model": "what the checkpoint writes",
    "summaries": "the summaries given",
    "oracle": "of the candidates for each pair the one with the highest rouge-l: the bound of any choice among them",
    LEAD: "the first sentence of the text",
}
"""Name → meaning."""

COPIED = "characters of the output that stand in runs of two or more which the text has, too; mean over pairs"


class Pair(NamedTuple):
    """A cleaned text and the summary a person wrote."""

    id: str
    source: str
    reference: str


@dataclasses.dataclass(frozen=True)
class SystemScores:
    """One system's scores, and what its outputs are like."""

    scores: dict[str, Interval]
    """Every name of `DEFINITIONS`, in percent."""
    mean_characters: float
    copied_percent: float
    """Of the outputs' characters: mean over pairs of `measure_copied_fraction`."""
    num_empty: int


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluation found; `to_json` is scores.json."""

    checkpoint: str | None
    """None where summaries were given."""
    step: int | None
    summaries_path: str | None
    pairs_path: str
    num_pairs: int
    dropped: dict[str, int]
    """Unusable pairs by reason."""
    num_truncated: int | None
    """Texts of which the model read the beginning only."""
    heldout_loss: float | None
    """Nats per target token, mean over all of them (end tokens included), by teacher forcing."""
    heldout_accuracy: float | None
    systems: dict[str, SystemScores]
    """By names of `SYSTEMS`; the one that was evaluated is the first, the lead the last."""
    reference: dict[str, float]
    """`mean_characters` and `copied_percent` of the references."""
    difference_from_lead: dict[str, Interval]
    """Score → points by which the evaluated system is above the lead, on the same resamples (paired)."""
    lengths: dict[str, list[LengthBin]]
    """By length of the `source` and of the `reference`."""
    bootstrap: Bootstrap
    generation: dict[str, Any] | None
    """The options the model wrote with."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object that also defines every score and system."""
        definitions = DEFINITIONS | {system: SYSTEMS[system] for system in self.systems} | {"copied_percent": COPIED}
        return {"schema": SCHEMA, **dataclasses.asdict(self), "definitions": definitions}


class Comparison(NamedTuple):
    """Systems on the same pairs."""

    fields: dict[str, Any]
    """`systems`, `reference`, `difference_from_lead`, `lengths` and `bootstrap` of `Scores`."""
    records: list[dict[str, Any]]
    """Per pair: id, source, reference, summary of the first system, its scores in percent and its copied percent."""


def compare_systems(pairs: Sequence[Pair], outputs: Mapping[str, Sequence[str]], bootstrap: Bootstrap) -> Comparison:
    """Score systems on the same pairs.

    Args:
        pairs: at least one.
        outputs: system → its text for each pair; the evaluated system first, `lead` among the others.
        bootstrap: how to make intervals.
    """
    references = [pair.reference for pair in pairs]
    scored = {system: score_each_pair(references, texts) for system, texts in outputs.items()}
    values = {system: pair_scores.of_all() for system, pair_scores in scored.items()}
    resampled = bootstrap.resample(scored)
    copied = {
        system: [100 * measure_copied_fraction(pair.source, text) for pair, text in zip(pairs, texts, strict=True)]
        for system, texts in {**outputs, "reference": references}.items()
    }
    systems = {
        system: SystemScores(
            {name: bootstrap.bound(values[system][name], resampled[system][name]) for name in DEFINITIONS},
            statistics.fmean(map(len, texts)),
            statistics.fmean(copied[system]),
            sum(not text.strip() for text in texts),
        )
        for system, texts in outputs.items()
    }
    first = next(iter(outputs))
    difference = {
        name: bootstrap.bound(values[first][name] - values[LEAD][name], resampled[first][name] - resampled[LEAD][name])
        for name in DEFINITIONS
    }
    fields = {
        "systems": systems,
        "reference": {
            "mean_characters": statistics.fmean(map(len, references)),
            "copied_percent": statistics.fmean(copied["reference"]),
        },
        "difference_from_lead": difference,
        "lengths": {
            "source": score_by_length([len(pair.source) for pair in pairs], scored),
            "reference": score_by_length([len(text) for text in references], scored),
        },
        "bootstrap": bootstrap,
    }
    return Comparison(fields, _describe_pairs(pairs, outputs[first], scored[first], copied[first]))


def save_evaluation(folder: Path, scores: Scores, records: Iterable[Mapping[str, Any]]) -> None:
    """Write scores.json and summaries.jsonl into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_bytes(folder / "summaries.jsonl", lines.encode())
    write_json(folder / "scores.json", scores.to_json())


def _describe_pairs(
    pairs: Sequence[Pair], summaries: Sequence[str], scored: PairScores, copied: Sequence[float]
) -> list[dict[str, Any]]:
    return [
        {
            **pair._asdict(),
            "summary": summary,
            "scores": {name: round(100 * float(value), 4) for name, value in zip(PAIR_SCORES, values)},
            "copied_percent": round(percent, 2),
        }
        for pair, summary, values, percent in zip(pairs, summaries, scored.values, copied)
    ]
