"""What the model writes, and how near it is to the references."""

from collections.abc import Sequence
from typing import NamedTuple

from t5pegasus.report.markup import Markup, absent, escape, join, section, show, table
from t5pegasus.report.runs import Json, Run

MAX_SAMPLES = 8
METRICS = ("rouge-1", "rouge-2", "rouge-l")


class Rouge(NamedTuple):
    """ROUGE-1 / 2 / L in one line each."""

    model: str
    lead: str


def read_rouge(scores: Json | None) -> Rouge | None:
    """The ROUGE figures of a scores.json, None if there are none."""
    if scores is None or "rouge" not in scores:
        return None
    rouge = scores["rouge"]
    return Rouge(*(" / ".join(f"{rouge[system][metric]:.1f}" for metric in METRICS) for system in ("model", "lead")))


def show_samples(runs: Sequence[Run]) -> Markup:
    """Scores and sample summaries of every run that has them."""
    parts = []
    for run in runs:
        if run.scores is not None:
            parts.append(_scores(run, run.scores))
        if run.summaries:
            parts.append(_summaries(run))
    if not any(run.scores for run in runs):
        parts.append(absent("No run has a scores.json: write one with t5pegasus evaluate."))
    if not any(run.summaries for run in runs):
        parts.append(absent("No run has a summaries.jsonl: t5pegasus evaluate writes it beside the scores."))
    return section("Summaries", "摘要样例", *parts)


def _scores(run: Run, scores: Json) -> Markup:
    rows = [(name, value) for name, value in scores.items() if not isinstance(value, dict)]
    return Markup(f'<div class="panel"><h3>{escape(run.name)}</h3>{table(("Score", ""), rows, "facts")}</div>')


def _summaries(run: Run) -> Markup:
    shown = run.summaries[:MAX_SAMPLES]
    count = f"{show(len(shown))} of the {show(len(run.summaries))} summaries that {run.name} wrote"
    return join([Markup(f"<p>{escape(count)}</p>"), *(_sample(sample) for sample in shown)])


def _sample(sample: Json) -> Markup:
    parts = []
    for key, title, chinese in (
        ("source", "Source", "原文"),
        ("reference", "Reference", "参考"),
        ("summary", "Summary", "生成"),
    ):
        if key in sample:
            label = f'{escape(title)} <span lang="zh">{escape(chinese)}</span>'
            parts.append(f'<dt>{label}</dt><dd class="{key}" lang="zh">{escape(sample[key])}</dd>')
    return Markup(f'<dl class="sample">{"".join(parts)}</dl>')
