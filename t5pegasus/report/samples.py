"""What a model writes: its best and its worst summaries, and some between them."""

from collections.abc import Sequence

from t5pegasus.report.markup import Markup, absent, escape, join, section, show
from t5pegasus.report.runs import Evaluation, Json
from t5pegasus.report.scores import show_scores

_TEXTS = (("source", "Source", "原文"), ("reference", "Reference", "参考"), ("summary", "Summary", "生成"))
_FIGURES = (("rouge-l", "ROUGE-L"), ("rouge-1", "ROUGE-1"), ("rouge-2", "ROUGE-2"))


def show_samples(evaluations: Sequence[Evaluation], num_examples: int) -> Markup:
    """Scores and examples of every evaluation that has them; `num_examples` of the best, the middle and the worst."""
    parts = []
    for evaluation in evaluations:
        parts += [show_scores(evaluation), *_examples(evaluation, num_examples)]
    if not any(evaluation.scores for evaluation in evaluations):
        parts.append(absent("No run has a scores.json: write one with t5pegasus evaluate."))
    if not any(evaluation.summaries for evaluation in evaluations):
        parts.append(absent("No run has a summaries.jsonl: t5pegasus evaluate writes it beside the scores."))
    return section("Summaries", "摘要样例", *parts)


def _examples(evaluation: Evaluation, num_examples: int) -> list[Markup]:
    summaries = evaluation.summaries
    if not all("scores" in record for record in summaries):
        shown = summaries[:num_examples]
        title = f"The first {show(len(shown))} of the {show(len(summaries))} summaries of {evaluation.name}"
        return [_group(title, "", shown, is_open=True)]
    ranked = sorted(summaries, key=lambda record: -record["scores"]["rouge-l"])
    if len(ranked) <= 3 * num_examples:
        groups = [("All summaries", "全部", ranked)]
    else:
        middle = (len(ranked) - num_examples) // 2
        groups = [
            ("The best summaries", "最好", ranked[:num_examples]),
            ("Summaries around the median", "居中", ranked[middle : middle + num_examples]),
            ("The worst summaries", "最差", ranked[-1 : -num_examples - 1 : -1]),
        ]
    return [
        _group(f"{title} of {evaluation.name}, by ROUGE-L", chinese, shown, is_open=place != 1)
        for place, (title, chinese, shown) in enumerate(groups)
        if shown
    ]


def _group(title: str, chinese: str, shown: Sequence[Json], *, is_open: bool) -> Markup:
    attributes = 'class="examples"' + " open" * is_open
    return Markup(
        f'<details {attributes}><summary>{escape(title)} <span lang="zh">{escape(chinese)}</span></summary>'
        f"{join(_sample(record) for record in shown)}</details>"
    )


def _sample(record: Json) -> Markup:
    parts = []
    if "scores" in record:
        figures = [f"{label} {record['scores'][name]:.1f}" for name, label in _FIGURES]
        copied = f"{record['copied_percent']:.0f} % copied from the source"
        parts.append(
            f'<dt>{escape(record["id"])}</dt><dd class="figures-of">{escape(" · ".join([*figures, copied]))}</dd>'
        )
    for key, title, chinese in _TEXTS:
        if key in record:
            label = f'{escape(title)} <span lang="zh">{escape(chinese)}</span>'
            parts.append(f'<dt>{label}</dt><dd class="{key}" lang="zh">{escape(record[key] or "（空）")}</dd>')
    return Markup(f'<dl class="sample">{"".join(parts)}</dl>')
