"""Goodput: which part of its wall time a run spent on updates that it still has, and what took the rest.

The time of one attempt is taken apart by `Control`; this adds up the attempts of a run in RUN/goodput.jsonl, one line
each, without any service. Wall time is the sum of all parts: what an attempt spent, and what passed between attempts.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from t5pegasus.errors import writing
from t5pegasus.train.control import Control

logger = logging.getLogger(__name__)

FILE = "goodput.jsonl"
PARTS = {
    "step": ("step", "device"),
    "data_wait": ("data",),
    "compile": ("compile",),
    "restore": ("restore",),
    "evaluation": ("evaluate",),
    "sampling": ("sample",),
    "save_stall": ("save",),
    "event": ("event",),
}
"""Part → activities (`Control.doing`); all other activities are `other`."""
_KEYS = {"seconds", "lost_seconds", "lost_steps", "down_seconds", "updated"}
"""Of a line, what the sum needs."""
_WRITE_SECONDS = 10.0

Json = dict[str, Any]


def split_time(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by activity → seconds by part; both add up to the same."""
    parts = {part: sum(seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    known = {name for names in PARTS.values() for name in names}
    return parts | {"other": sum(value for name, value in seconds.items() if name not in known)}


def sum_attempts(attempts: Iterable[Json]) -> Json:
    """All attempts of a run together.

    Returns:
        `wall_seconds`; `seconds` by part, which add up to it, with `lost_work` (updates that a later attempt, or one
        behind a rollback, made again) taken out of `step`, and `down` between attempts; `goodput`, the share of `step`;
        `lost_steps`, `num_attempts`.
    """
    attempts = list(attempts)
    seconds: dict[str, float] = {}
    for attempt in attempts:
        for part, value in attempt["seconds"].items():
            seconds[part] = seconds.get(part, 0.0) + value
    lost = sum(attempt["lost_seconds"] for attempt in attempts)
    seconds["step"] = seconds.get("step", 0.0) - lost
    seconds |= {"lost_work": lost, "down": sum(attempt["down_seconds"] for attempt in attempts)}
    wall = sum(seconds.values())
    return {
        "wall_seconds": wall,
        "seconds": seconds,
        "goodput": seconds["step"] / wall if wall > 0 else 0.0,
        "lost_steps": sum(attempt["lost_steps"] for attempt in attempts),
        "num_attempts": len(attempts),
    }


def read_attempts(run_path: Path) -> list[Json]:
    """The lines of goodput.jsonl, but for damaged ones, which are named: the run does not depend on it."""
    path, attempts = run_path / FILE, []
    if not path.exists():
        return []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            attempt = json.loads(line) if line else {}
        except (ValueError, RecursionError):
            attempt = None
        if isinstance(attempt, dict) and attempt.keys() >= _KEYS:
            attempts.append(attempt)
        elif line:
            logger.warning("%s: dropping a damaged line; the time of its attempt is not accounted for", path)
    return attempts


class Goodput:
    """The account of this attempt, written beside those of the earlier ones."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._earlier: list[Json] = []
        self._down = self._lost_seconds = 0.0
        self._lost_steps = 0
        self._first_step: int | None = None
        self._written = -float("inf")

    def begin(self, folder: Path, step: int, control: Control) -> Callable[..., None]:
        """Take up the account; called again when the attempt goes back to a checkpoint.

        Args:
            folder: of the run.
            step: updates that the attempt goes on from.
            control: that counts its time.

        Returns:
            What brings the file up to date at the end, as an exit of `contextlib.ExitStack`.
        """
        if self._path is None:
            self._first_step, self._earlier = step, read_attempts(folder)
            if self._earlier:
                spent = sum(control.spent().values())
                self._down = max(0.0, time.time() - spent - self._earlier[-1]["updated"])
        self._path = folder / FILE

        def end(kind: Any, error: BaseException | None, trace: Any) -> None:
            try:
                self.write(control.activity.step, control.spent(), at_once=True)
            except OSError:
                if error is None:  # what failed first is what is reported
                    raise

        return end

    def lose(self, records: Iterable[Json], step: int) -> None:
        """Count updates behind `step` as lost: those of `train` records that are made again."""
        for record in records:
            if record["kind"] != "train" or not record.get("updates"):
                continue
            updates = record["updates"]  # of one attempt, the last ones of its interval
            again = min(updates, max(0, record["step"] - step))
            self._lost_steps += again
            self._lost_seconds += record["time"]["step"] * again / updates

    def totals(self, step: int, seconds: Mapping[str, float]) -> Json:
        """`sum_attempts` of all attempts up to now."""
        return sum_attempts([*self._earlier, self._line(step, seconds)])

    def write(self, step: int, seconds: Mapping[str, float], *, at_once: bool = False) -> None:
        """Bring the file up to date, at most every ten seconds unless `at_once`."""
        now = time.monotonic()
        if self._path is None or (not at_once and now - self._written < _WRITE_SECONDS):
            return
        self._written = now
        lines = [*self._earlier, self._line(step, seconds)]
        temporary = self._path.with_suffix(".tmp")
        with writing(self._path):
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(self._path)

    def _line(self, step: int, seconds: Mapping[str, float]) -> Json:
        now = time.time()
        return {
            "attempt": len(self._earlier) + 1,
            "began": now - sum(seconds.values()),
            "updated": now,
            "first_step": self._first_step,
            "last_step": step,
            "seconds": split_time(seconds),
            "lost_steps": self._lost_steps,
            "lost_seconds": self._lost_seconds,
            "down_seconds": self._down,
        }
