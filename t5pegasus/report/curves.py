"""Curves over training steps: one panel per axis of steps, runs in colours, growths as seams."""

import itertools
from collections.abc import Callable, Sequence

from t5pegasus.config import DataConfig
from t5pegasus.report.chart import Line, Seam, draw_lines
from t5pegasus.report.markup import Markup, absent, escape, join, section, show, show_short
from t5pegasus.report.overview import describe_growth, describe_sizes
from t5pegasus.report.runs import Json, Run, group_runs

NUM_COLORS = 5
"""Of runs; held-out lines have as many of their own behind these."""


def show_curves(runs: Sequence[Run]) -> Markup:
    """A panel for each group of runs that count steps together."""
    panels = [_panel(group, runs) for group in group_runs(runs)]
    return section("Training", "训练曲线", *panels)


def _panel(group: Sequence[Run], runs: Sequence[Run]) -> Markup:
    title = Markup(f"<h3>{escape(' → '.join(run.name for run in group))}</h3>")
    trained = [run for run in group if run.of_kind("train")]
    missing = [
        absent(f"{run.name}: no training record in metrics.jsonl, so it has no curves")
        for run in group
        if run not in trained
    ]
    missing += [
        absent(f"{run.name}: no held-out loss; give held-out examples when training")
        for run in trained
        if not run.curve("heldout", "loss")
    ]
    missing += [
        absent(f"{run.name}: unreadable lines of metrics.jsonl, left out: {run.num_unreadable_lines}")
        for run in group
        if run.num_unreadable_lines
    ]
    growths = [growth for run in group for growth in run.growths]
    seams = [Seam(growth.step, "grown", describe_growth(growth)) for growth in growths]
    seams += [
        Seam(record["step"], "grown", describe_sizes(record["source"], record["target"]))
        for run in group
        for record in run.own_growths
    ]
    seams += [seam for run in group for seam in _weight_changes(run)]
    short = [Seam(seam.step, seam.label) for seam in seams]

    def color(run: Run) -> int:
        return list(runs).index(run) % NUM_COLORS

    def lines(field: str, *, smooth: bool = False, scale: float = 1.0) -> list[Line]:
        return [Line(run.name, _scaled(run.curve("train", field), scale), color(run), smooth=smooth) for run in trained]

    def with_heldout(field: str, scale: float = 1.0) -> list[Line]:
        heldout = [
            Line(
                f"{run.name} held out",
                _scaled(run.curve("heldout", field), scale),
                NUM_COLORS + color(run),
                dotted=True,
            )
            for run in trained
        ]
        return [*lines(field, smooth=True, scale=scale), *heldout]

    def speed(title: str, field: str, scale: float = 1.0, form: Callable[[float], str] = show) -> Markup:
        return draw_lines(title, lines(field, scale=scale), short, from_zero=True, form=form)

    figures = [
        draw_lines("Loss, nats per target token", with_heldout("loss"), seams, wide=True),
        draw_lines("Loss by source, nats per target token", _by_source(trained), seams, wide=True),
        draw_lines("Accuracy of the next token, %", with_heldout("accuracy", 100), short, from_zero=True),
        draw_lines("Learning rate", lines("learning_rate"), short, from_zero=True),
        draw_lines("Gradient norm before clipping", lines("grad_norm", smooth=True), short, from_zero=True),
        speed("Throughput, tokens per second", "tokens_per_second", form=show_short),
        speed("Model FLOPs utilisation, %", "mfu", 100),
        speed("Time spent waiting for data, %", "data_wait_fraction", 100),
    ]
    return Markup(f'<div class="panel">{title}{join(missing)}<div class="figures">{join(figures)}</div></div>')


def _by_source(runs: Sequence[Run]) -> list[Line]:
    """The training loss on each folder of a mixture."""
    named = [(run, name) for run in runs for name in _sources(run)]
    several = len({run.path for run, _ in named}) > 1
    return [
        Line(
            f"{run.name}: {name}" if several else name,
            [
                (record["step"], record["loss_by_source"][name])
                for record in run.of_kind("train")
                if record.get("loss_by_source", {}).get(name) is not None
            ],
            index % NUM_COLORS,
            smooth=True,
            dashed=index >= NUM_COLORS,
        )
        for index, (run, name) in enumerate(named)
    ]


def _sources(run: Run) -> list[str]:
    return list({name: None for record in run.of_kind("train") for name in record.get("loss_by_source", {})})


def _weight_changes(run: Run) -> list[Seam]:
    """Where the run went on with other weights of its mixture than before."""
    starts = [(record["step"], _weights(record)) for record in run.of_kind("start") if "config" in record]
    return [
        Seam(step, "weights", [f"{name} {show(old.get(name, 0.0))} → {show(new.get(name, 0.0))}" for name in changed])
        for (_, old), (step, new) in itertools.pairwise(starts)
        if (changed := [name for name in {**old, **new} if old.get(name, 0.0) != new.get(name, 0.0)])
    ]


def _weights(start: Json) -> dict[str, float]:
    """By the last part of each folder's path, or, where two have the same, by the whole of it."""
    weights = DataConfig(mixture=tuple(start["config"]["data"]["mixture"])).mixture_weights()
    names = [folder.rpartition("/")[2] for folder in weights]
    return {
        name if names.count(name) == 1 else folder: weight for (folder, weight), name in zip(weights.items(), names)
    }


def _scaled(points: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
    return [(step, value * scale) for step, value in points]
