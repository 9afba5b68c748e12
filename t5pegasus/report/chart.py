"""Charts as inline SVG: lines over steps with marked seams, and histograms. Colours come from the style sheet.

Under the pointer a column of the chart lights up and names its values: one invisible group per column, shown by
the style sheet, so the page needs no script.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

from t5pegasus.report.markup import Markup, escape, show

MAX_COLUMNS = 120
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 22, 38
MIN_BINS = 8
"""A histogram has room for so many at least: a single bar as wide as the figure would tell nothing."""
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    color: int
    """Which of the style sheet's colours."""
    dotted: bool = False
    """With its points marked: sparse measurements, such as held-out losses."""
    smooth: bool = False
    """Noisy: drawn faint, with its moving mean in full colour."""
    dashed: bool = False
    """Told apart by this from another line of its colour."""


@dataclasses.dataclass(frozen=True)
class Seam:
    """A vertical line where something happened."""

    step: float
    label: str
    details: Sequence[str] = ()
    """More lines below the label."""


@dataclasses.dataclass(frozen=True)
class _Frame:
    """From data to coordinates."""

    width: int
    height: int
    x_range: Point
    y_range: Point

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)


def draw_lines(
    title: str,
    lines: Sequence[Line],
    seams: Sequence[Seam] = (),
    *,
    from_zero: bool = False,
    wide: bool = False,
    form: Callable[[float], str] = show,
) -> Markup:
    """A figure of curves over training steps.

    Args:
        title: what is shown, with its unit.
        lines: curves; values that are not finite are left out.
        seams: events to mark; their labels stand at the top.
        from_zero: whether the axis must include 0, as rates and shares want.
        wide: over the whole page and with a legend, which the smaller figures below share.
        form: how a value is written.

    Returns:
        The figure, or "" if no line has a point.
    """
    lines = [dataclasses.replace(line, points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    xs = [x for line in lines for x, _ in line.points] + [seam.step for seam in seams]
    ys = [y for line in lines for _, y in line.points] + ([0.0] if from_zero else [])
    y_ticks = nice_ticks(min(ys), max(ys), 5)
    width, height = (760, 284) if wide else (370, 199)
    x_range = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, min(xs) + 1)
    frame = _Frame(width, height, x_range, (min(y_ticks[0], *ys), max(y_ticks[-1], *ys)))
    parts = [
        _draw_axes(frame, y_ticks, "updates", form),
        *(_draw_seam(seam, frame) for seam in seams),
        *(_draw_line(line, frame) for line in lines),
        *_draw_columns(lines, frame, form),
    ]
    names = "".join(
        f'<li class="c{line.color}{" dotted" if line.dotted else ""}{" dashed" if line.dashed else ""}"><i></i>'
        f"{escape(line.label)}</li>"
        for line in lines
    )
    legend = f'<ul class="legend">{names}</ul>' if wide and len(lines) > 1 else ""
    return _figure(title, width, height, "".join(parts), legend, "wide" if wide else "")


def draw_histogram(title: str, unit: str, counts: Sequence[int], bin_size: int, color: int) -> Markup:
    """A figure of counts, the first of 0 … bin_size − 1 of `unit`; "" if there are none."""
    if not counts:
        return Markup("")
    width, height = 520, 204
    y_ticks = nice_ticks(0, max(*counts, 1), 4)
    frame = _Frame(width, height, (0, max(len(counts), MIN_BINS) * bin_size), (0, y_ticks[-1]))
    bars = []
    for index, count in enumerate(counts):
        low, high = frame.x(index * bin_size), frame.x((index + 1) * bin_size)
        readout = f"{index * bin_size}–{(index + 1) * bin_size - 1} {unit}: {count:,}"
        top = frame.y(count)
        bars.append(
            f'<g class="column"><rect class="hit" x="{low:.1f}" y="{TOP}" width="{high - low:.1f}" '
            f'height="{height - TOP - BOTTOM}"/><rect class="bar c{color}" x="{low + 0.5:.1f}" y="{top:.1f}" '
            f'width="{max(high - low - 1, 0.5):.1f}" height="{height - BOTTOM - top:.1f}"/>'
            f'<text class="readout" x="{width - RIGHT}" y="{TOP - 8}">{readout}</text></g>'
        )
    return _figure(title, width, height, _draw_axes(frame, y_ticks, unit, show) + "".join(bars), "", "")


def nice_ticks(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low … high."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def moving_mean(points: Sequence[Point], window: int) -> list[Point]:
    """The mean over `window` points around each, fewer at the ends."""
    half = window // 2
    means = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - half) : index + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def _figure(title: str, width: int, height: int, drawing: str, legend: str, kind: str) -> Markup:
    return Markup(
        f'<figure class="{kind}"><figcaption>{escape(title)}{legend}</figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">{drawing}</svg></figure>'
    )


def _draw_axes(frame: _Frame, y_ticks: Sequence[float], x_label: str, form: Callable[[float], str]) -> str:
    right, bottom = frame.width - RIGHT, frame.height - BOTTOM
    rows = [
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{frame.y(tick):.1f}" y2="{frame.y(tick):.1f}"/>'
        f'<text class="tick y" x="{LEFT - 7}" y="{frame.y(tick) + 3.5:.1f}">{escape(form(tick))}</text>'
        for tick in y_ticks
    ]
    low, high = frame.x_range
    columns = [
        f'<text class="tick x" x="{frame.x(tick):.1f}" y="{bottom + 16}">{escape(show(round(tick)))}</text>'
        for tick in nice_ticks(low, high, 6)
        if low <= tick <= high and tick == round(tick)
    ]
    return (
        "".join(rows + columns)
        + f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
        + f'<text class="tick x" x="{(LEFT + right) / 2:.1f}" y="{bottom + 31}">{escape(x_label)}</text>'
    )


def _draw_seam(seam: Seam, frame: _Frame) -> str:
    x = frame.x(seam.step)
    side, anchor = (-6, "end") if x > frame.width * 0.7 else (6, "start")
    details = (
        f'<text x="{x + side:.1f}" y="{TOP + 12 + 12 * index}" text-anchor="{anchor}">{escape(detail)}</text>'
        for index, detail in enumerate(seam.details)
    )
    return (
        f'<g class="seam"><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{frame.height - BOTTOM}"/>'
        f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle">{escape(seam.label)}</text>{"".join(details)}</g>'
    )


def _draw_line(line: Line, frame: _Frame) -> str:
    window = max(1, len(line.points) // 30) if line.smooth else 1
    kind = f"line c{line.color}" + (" dashed" if line.dashed else "")
    drawn = _path(line.points, frame, kind + (" faint" if window > 1 else ""))
    if window > 1:
        drawn += _path(moving_mean(line.points, window), frame, kind)
    if line.dotted or len(line.points) == 1:
        drawn += "".join(
            f'<circle class="c{line.color}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6"/>'
            for x, y in line.points
        )
    return drawn


def _path(points: Sequence[Point], frame: _Frame, kind: str) -> str:
    coordinates = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{coordinates}"/>'


def _draw_columns(lines: Sequence[Line], frame: _Frame, form: Callable[[float], str]) -> list[str]:
    """Invisible columns that show, under the pointer, the values at their step."""
    steps = sorted({x for line in lines for x, _ in line.points})
    chosen = steps[:: math.ceil(len(steps) / MAX_COLUMNS)]
    borders = [(a + b) / 2 for a, b in itertools.pairwise(chosen)]
    columns = []
    for step, low, high in zip(chosen, [chosen[0], *borders], [*borders, chosen[-1]]):
        values = []
        for line in lines:
            point = _nearest(line.points, step)
            if low <= point[0] <= high:
                values.append(f"{line.label} {form(point[1])}")
        x, left = frame.x(step), frame.x(low)
        columns.append(
            f'<g class="column"><rect class="hit" x="{left:.1f}" y="0" width="{frame.x(high) - left:.1f}" '
            f'height="{frame.height}"/><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}"/>'
            f'<text class="readout" x="{frame.width - RIGHT}" y="{TOP - 8}">'
            f"{escape(' · '.join([f'step {show(step)}', *values]))}</text></g>"
        )
    return columns


def _nearest(points: Sequence[Point], x: float) -> Point:
    index = bisect.bisect_left(points, x, key=lambda point: point[0])
    return min(points[max(0, index - 1) : index + 1], key=lambda point: abs(point[0] - x))
