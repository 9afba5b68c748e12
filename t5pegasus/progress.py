"""Progress of long work on stderr: what is done, how fast, and how long it will still take."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_TERMINAL_INTERVAL_SECONDS = 0.2
_LINE_INTERVAL_SECONDS = 10.0


def format_seconds(seconds: float) -> str:
    """A duration for people: `8 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_count(number: float) -> str:
    """A number for people: `950`, `12.5k`, `3.2M`, `1.1G`; rates below ten keep a decimal."""
    for limit, divisor, suffix in ((1e4, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if number < limit:
            scaled = number / divisor
            return f"{scaled:.1f}{suffix}" if suffix or (scaled < 10 and scaled % 1) else f"{scaled:.0f}"
    return f"{number / 1e9:.1f}G"


class Progress:
    """Counts work and reports it: one rewriting line on a terminal, else at most a line per 10 seconds.

    ```
    with Progress("build", total=len(units), unit="units") as progress:
        progress.advance(1)
    ```
    Work shorter than the first interval prints nothing when stderr is not a terminal.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = "items",
        *,
        stream: TextIO | None = None,
        shown: bool = True,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self.detail = ""
        """Free text behind the rate, e.g. `loss 3.21`."""
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._interval = _TERMINAL_INTERVAL_SECONDS if self._terminal else _LINE_INTERVAL_SECONDS
        self._start = self._last = time.monotonic()
        self._skipped = 0
        self._shown = shown
        self._width = 0
        self._said: int | None = None
        self._is_long = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_long and (self._terminal or self._said != self.done):
            self._write(self._describe(time.monotonic()), final=True)

    def skip(self, count: int) -> None:
        """Count work that an earlier try has done; it is no part of the rate."""
        self._skipped += count
        self.done += count

    def advance(self, count: int = 1) -> None:
        """Count finished work, and report if it is time to."""
        self.done += count
        now = time.monotonic()
        if self._shown and now - self._last >= self._interval:
            self._last, self._is_long = now, True
            # What is done at the end is said once, on leaving, when the detail that goes with it is known.
            if self._terminal or self.done != self.total:
                self._write(self._describe(now), final=False)

    @property
    def seconds(self) -> float:
        """Wall time since the beginning."""
        return time.monotonic() - self._start

    def _describe(self, now: float) -> str:
        rate = (self.done - self._skipped) / max(now - self._start, 1e-9)
        is_within = self.total is not None and 0 < self.total >= self.done  # an estimate may prove too low
        of_total = f"/{format_count(self.total)}" if self.total and is_within else ""
        share = f" ({100 * self.done / self.total:.0f} %)" if self.total and is_within else ""
        parts = [f"{format_count(self.done)}{of_total} {self.unit}{share}", f"{format_count(rate)}/s"]
        if self.total is not None and rate > 0 and self.done < self.total:
            parts.append(f"{format_seconds((self.total - self.done) / rate)} left")
        else:
            parts.append(format_seconds(now - self._start))
        return f"{self.label}: " + ", ".join(parts + ([self.detail] if self.detail else []))

    def _write(self, text: str, *, final: bool) -> None:
        if self._terminal:
            self._stream.write("\r" + text.ljust(self._width) + ("\n" if final else ""))
        else:
            self._stream.write(text + "\n")
        self._width = len(text)
        self._said = self.done
        self._stream.flush()
