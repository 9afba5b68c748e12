"""The few pieces of HTML that all sections are made of; every text goes through `escape`."""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any


class Markup(str):
    """Text that is HTML already."""


def escape(value: Any) -> Markup:
    """A value as HTML text or attribute; what is Markup already stays as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(show(value)))


def join(parts: Iterable[str], separator: str = "") -> Markup:
    """Pieces of markup, one behind the other."""
    return Markup(separator.join(escape(part) for part in parts))


def section(title: str, chinese: str, *parts: str) -> Markup:
    """A section of the page, with its title in both languages."""
    anchor = title.lower().replace(" ", "-")
    heading = f'<h2>{escape(title)} <span lang="zh">{escape(chinese)}</span></h2>'
    return Markup(f'<section id="{anchor}">{heading}{join(parts)}</section>')


def absent(what: str) -> Markup:
    """A part that the files do not have, named."""
    return Markup(f'<p class="absent">{escape(what)}</p>')


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], kind: str = "") -> Markup:
    """A table; cells are escaped, numbers shown by `show`."""
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return Markup(
        f'<div class="scroll"><table class="{escape(kind)}"><thead><tr>{_cells("th", head)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cells(tag: str, cells: Sequence[Any]) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)


def show(value: Any) -> str:
    """A value for people: thousands separated, four significant digits, small numbers with an exponent."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e9):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{exponent}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"


def show_difference(value: float) -> str:
    """A small difference with its sign: +2.4e-09, or a plain 0."""
    return f"{value:+.1e}" if value else "0"


def show_short(value: float) -> str:
    """A large number in three digits: 12.3k, 1.20M, 275M."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / {"G": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return f"{scaled:.3g}{suffix}"
    return show(value)


def show_seconds(seconds: float) -> str:
    """A duration: 8 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )
