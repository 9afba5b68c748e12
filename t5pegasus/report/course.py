"""What happened on the way: where the time went, updates that were bad, norms by group, and what was written."""

from collections.abc import Sequence
from typing import Any

from t5pegasus.report.chart import Line, draw_lines
from t5pegasus.report.markup import Markup, absent, escape, join, section, show, show_seconds, table
from t5pegasus.report.runs import Json, Run
from t5pegasus.train.goodput import sum_attempts

NUM_COLORS = 5
MAX_SAMPLES = 3
"""Times of which samples are shown: the first, the middle, the last."""
_PARTS = {
    "step": ("updates that the run still has", "有效训练"),
    "lost_work": ("updates made again", "重复训练"),
    "data_wait": ("waiting for data", "等待数据"),
    "compile": ("compiling", "编译"),
    "restore": ("restoring", "恢复"),
    "evaluation": ("evaluating", "评测"),
    "sampling": ("writing samples", "生成样例"),
    "save_stall": ("held up by saving", "保存"),
    "event": ("changing the model", "模型扩展"),
    "other": ("other", "其他"),
    "down": ("between attempts", "停机"),
}


def show_course(runs: Sequence[Run]) -> Markup:
    """Goodput, ledger, norms and samples of the runs that recorded them."""
    goodput = [_goodput(run) for run in runs if run.attempts]
    missing = [
        absent(f"{run.name}: no goodput.jsonl, so its time is not taken apart") for run in runs if not run.attempts
    ]
    return join(
        [
            section("Goodput", "有效时间", *goodput, *missing),
            section("Ledger", "异常记录", *(_ledger(run) for run in runs)),
            *(section("Norms by group", "分组范数", *shown) for shown in [_all_norms(runs)] if shown),
            *(section("Samples while training", "训练中的样例", *shown) for shown in [_all_samples(runs)] if shown),
        ]
    )


def _goodput(run: Run) -> Markup:
    total = sum_attempts(run.attempts)
    wall = max(total["wall_seconds"], 1e-9)
    rows = [
        (f"{_PARTS[part][0]} {_PARTS[part][1]}", show_seconds(seconds), f"{100 * seconds / wall:.1f} %")
        for part in _PARTS
        if (seconds := total["seconds"].get(part, 0.0)) > 0
    ]
    title = (
        f"{run.name}: {100 * total['goodput']:.1f} % goodput of {show_seconds(wall)}, attempts: "
        f"{show(total['num_attempts'])}, updates made again: {show(total['lost_steps'])}"
    )
    return Markup(f"<h3>{escape(title)}</h3>{table(('Spent on', 'Time', 'Share'), rows)}")


def _ledger(run: Run) -> Markup:
    rows: list[tuple[Any, ...]] = []
    for record in run.of_kind("divergence"):
        first, behind = record.get("skipped_rows", record["rows"])
        what = {"skip": "skipped", "rollback": f"back to step {show(record['step'])}"}.get(record["action"], "ended")
        numbers = f"loss {show(record['loss'])}, gradient norm {show(record['grad_norm'])}"
        rows.append((show(record["at_step"]), record["why"], numbers, what, f"rows {show(first)} – {show(behind - 1)}"))
    for record in run.of_kind("bad_examples"):
        for example in record["examples"]:
            where = f"example {show(example['index'])} of {example['shard']}"
            rows.append((show(record["step"]), example["reason"], "", "left out", where))
    if not rows:
        return absent(f"{run.name}: no update was bad, no example was left out")
    head = ("Update", "Why", "Numbers", "What became of it", "Of the data")
    return Markup(f"<h3>{escape(run.name)}</h3>{table(head, rows)}")


def _all_norms(runs: Sequence[Run]) -> list[Markup]:
    shown = []
    for run in runs:
        records = [record for record in run.of_kind("train") if "norms" in record]
        if records:
            shown.append(Markup(f'<div class="panel"><h3>{escape(run.name)}</h3>{join(_norms(records))}</div>'))
    return shown


def _norms(records: Sequence[Json]) -> list[Markup]:
    groups = sorted({group for record in records for group in record["norms"]["gradient"]})

    def lines(value: Any) -> list[Line]:
        return [
            Line(
                group,
                [(each["step"], value(each["norms"], group)) for each in records if group in each["norms"]["gradient"]],
                index % NUM_COLORS,
                dashed=index >= NUM_COLORS,
            )
            for index, group in enumerate(groups)
        ]

    def ratio(norms: Json, group: str) -> float:
        return norms["update"][group] / max(norms["parameter"][group], 1e-30)

    return [
        draw_lines("Gradient norm before clipping", lines(lambda norms, group: norms["gradient"][group]), wide=True),
        draw_lines("Update relative to the parameters", lines(ratio), wide=True),
        draw_lines("Norm of the parameters", lines(lambda norms, group: norms["parameter"][group]), wide=True),
    ]


def _all_samples(runs: Sequence[Run]) -> list[Markup]:
    shown = []
    for run in runs:
        records = [record for record in run.of_kind("sample") if record["samples"]]
        chosen = sorted({0, len(records) // 2, len(records) - 1}) if records else []
        for record in [records[index] for index in chosen][:MAX_SAMPLES]:
            title = f"{run.name}, step {show(record['step'])}"
            last = " open" if record is records[-1] else ""
            shown.append(
                Markup(
                    f'<details class="examples"{last}><summary>{escape(title)}</summary>'
                    f"{join(_sample(sample) for sample in record['samples'])}</details>"
                )
            )
    return shown


def _sample(sample: Json) -> Markup:
    figures = " · ".join(f"{name.upper()} {value:.1f}" for name, value in sample["scores"].items())
    parts = [f'<dt>F1</dt><dd class="figures-of">{escape(figures)}</dd>']
    for key, label in (("source", "Source 原文"), ("reference", "Reference 参考"), ("summary", "Summary 生成")):
        parts.append(f'<dt>{escape(label)}</dt><dd class="{key}" lang="zh">{escape(sample[key] or "（空）")}</dd>')
    return Markup(f'<dl class="sample">{"".join(parts)}</dl>')
