"""Scores for people: a table of at most 100 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from t5pegasus.evaluate.bootstrap import Interval
from t5pegasus.evaluate.results import LEAD, SYSTEMS, Scores

_BLOCKS = (
    ("standard", ("rouge-1", "rouge-2", "rouge-l", "bleu")),
    ("T5 PEGASUS", ("t5-pegasus-rouge-1", "t5-pegasus-rouge-2", "t5-pegasus-rouge-l", "t5-pegasus-bleu")),
)
_FOOTNOTES = (
    "standard: character ROUGE F1 (Lin 2004, equal to rouge-score), lower-cased, without white space;",
    "    corpus BLEU of sacreBLEU nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp",
    "T5 PEGASUS: the recipe of its published tables, rouge 1.0.1 and nltk's sentence BLEU with smoothing",
    "    method 1 on lower-cased characters; not to be compared with the figures above",
    "copied: characters of the output in runs of two or more that the text has, too",
)


def format_scores(scores: Scores) -> str:
    """The evaluation in a few blocks: what was scored, scores by definition, scores by length, what they mean."""
    meanings = [f"{system}: {SYSTEMS[system]}" for system in scores.systems if system in ("oracle", LEAD)]
    bootstrap = scores.bootstrap
    interval = (
        f"±: half of the {100 * bootstrap.confidence:g} % bootstrap interval, "
        f"{bootstrap.num_resamples:,} resamples of the pairs"
    )
    lines = [*_head(scores), *_systems(scores), *_lengths(scores), "", *_FOOTNOTES, *meanings, interval]
    return "\n".join(line.rstrip() for line in lines)


def _head(scores: Scores) -> Iterator[str]:
    subject = scores.summaries_path if scores.checkpoint is None else f"{scores.checkpoint} (step {scores.step})"
    yield f"{subject}, {scores.num_pairs:,} pairs of {scores.pairs_path}"
    for reason, count in scores.dropped.items():
        yield f"left out: {count:,} pairs, {reason}"
    if scores.num_truncated:
        yield f"cut off: {scores.num_truncated:,} texts are longer than what the model reads"
    if scores.heldout_loss is not None and scores.heldout_accuracy is not None:
        yield (
            f"held-out loss {scores.heldout_loss:.4f} nats per target token, "
            f"accuracy {100 * scores.heldout_accuracy:.2f} %"
        )
    for system, found in scores.systems.items():
        if found.num_empty:
            yield f"empty outputs of {system}: {found.num_empty:,}, which count as 0"


def _systems(scores: Scores) -> Iterator[str]:
    for place, (title, names) in enumerate(_BLOCKS):
        headings = "".join(f"{name.removeprefix('t5-pegasus-').upper():>13} " for name in names)
        rows = [(system, found.scores, "", _outputs(vars(found))) for system, found in scores.systems.items()]
        rows.append((f"{next(iter(scores.systems))} - {LEAD}", scores.difference_from_lead, "+", ""))
        yield ""
        yield f"{title:<18}{headings}" + ("" if place else f"{'characters':>14}{'copied':>9}")
        for label, figures, sign, outputs in rows:
            cells = "".join(_figure(figures[name], sign) for name in names)
            yield f"  {label:<16}{cells}" + ("" if place else outputs)
        if place == 0:
            yield f"  {'reference':<72}{_outputs(scores.reference)}"


def _outputs(found: Mapping[str, Any]) -> str:
    return f"{found['mean_characters']:14.1f}{found['copied_percent']:7.0f} %"


def _figure(interval: Interval, sign: str) -> str:
    return f"{interval.value:{sign}8.2f} ±{interval.half_width:4.2f}"


def _lengths(scores: Scores) -> Iterator[str]:
    for side, bins in scores.lengths.items():
        yield ""
        systems = "".join(f"{system:>11}" for system in scores.systems)
        yield f"{f'ROUGE-L by characters of the {side}':<42}{'pairs':>8}{systems}"
        for found in bins:
            span = f"{found.low:,}" if found.low == found.high else f"{found.low:,} – {found.high:,}"
            cells = "".join(f"{figures['rouge-l']:11.2f}" for figures in found.scores.values())
            yield f"  {span:<40}{found.num_pairs:8,}{cells}"
