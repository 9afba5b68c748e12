"""Curves over training steps: one panel per axis of steps, runs in colours, growths as seams."""

from collections.abc import Callable, Sequence

from t5pegasus.report.chart import Line, Seam, draw_lines
from t5pegasus.report.markup import Markup, absent, escape, join, section, show, show_short
from t5pegasus.report.overview import describe_growth, describe_sizes
from t5pegasus.report.runs import Run, group_runs

NUM_COLORS = 5


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
    short = [Seam(seam.step, seam.label) for seam in seams]

    def color(run: Run) -> int:
        return list(runs).index(run) % NUM_COLORS

    def lines(field: str, *, smooth: bool = False, scale: float = 1.0) -> list[Line]:
        return [Line(run.name, _scaled(run.curve("train", field), scale), color(run), smooth=smooth) for run in trained]

    def with_heldout(field: str, scale: float = 1.0) -> list[Line]:
        heldout = [
            Line(f"{run.name} held out", _scaled(run.curve("heldout", field), scale), color(run), dotted=True)
            for run in trained
        ]
        return [*lines(field, smooth=True, scale=scale), *heldout]

    def speed(title: str, field: str, scale: float = 1.0, form: Callable[[float], str] = show) -> Markup:
        return draw_lines(title, lines(field, scale=scale), short, from_zero=True, form=form)

    figures = [
        draw_lines("Loss, nats per target token", with_heldout("loss"), seams, wide=True),
        draw_lines("Accuracy of the next token, %", with_heldout("accuracy", 100), short, from_zero=True),
        draw_lines("Learning rate", lines("learning_rate"), short, from_zero=True),
        draw_lines("Gradient norm before clipping", lines("grad_norm", smooth=True), short, from_zero=True),
        speed("Throughput, tokens per second", "tokens_per_second", form=show_short),
        speed("Model FLOPs utilisation, %", "mfu", 100),
        speed("Time spent waiting for data, %", "data_wait_fraction", 100),
    ]
    return Markup(f'<div class="panel">{title}{join(missing)}<div class="figures">{join(figures)}</div></div>')


def _scaled(points: list[tuple[float, float]], scale: float) -> list[tuple[float, float]]:
    return [(step, value * scale) for step, value in points]
