"""What the model writes, and how near it is to the references."""

from collections.abc import Sequence
from typing import NamedTuple

from t5pegasus.report.markup import Markup, absent, escape, join, section, show, table
from t5pegasus.report.runs import Json, Run

MAX_SAMPLES = 8
METRICS = ("rouge-1", "rouge-2", "rouge-l")
DETAILS = ("dropped", "generation")
"""Parts of scores.json that are objects themselves."""


class Rouge(NamedTuple):
    """ROUGE-1 / 2 / L in one line each."""

    model: str
    lead: str


def read_rouge(scores: Json | None) -> Rouge | None:
    """The ROUGE figures of a scores.json, None if there are none."""
    if scores is None:
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
    """ROUGE by system, then whatever else the evaluation says, in its own words."""
    systems = scores["mean_characters"]
    rouge = table(
        ("System", "ROUGE-1", "ROUGE-2", "ROUGE-L", "Characters"),
        (
            (system, *(_figure(scores["rouge"].get(system), metric) for metric in METRICS), f"{characters:.1f}")
            for system, characters in systems.items()
        ),
    )
    rest = [(name, value) for name, value in scores.items() if not isinstance(value, dict) and name != "schema"]
    rest += [
        (name, ", ".join(f"{key} {show(item)}" for key, item in scores[name].items()) or "none") for name in DETAILS
    ]
    return Markup(
        f'<div class="panel"><h3>{escape(run.name)}</h3>{rouge}{table(("Evaluation", ""), rest, "facts")}</div>'
    )


def _figure(figures: dict[str, float] | None, metric: str) -> str:
    return "" if figures is None else f"{figures[metric]:.2f}"


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
