"""What is measured between two records: losses as the mean of the updates, speeds over the time they took."""

import math
from collections.abc import Mapping
from typing import Any

import jax

from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.control import Control
from t5pegasus.train.course import Course
from t5pegasus.train.data_sources import name_sources
from t5pegasus.train.divergence import WATCHED, Why
from t5pegasus.train.goodput import split_time
from t5pegasus.train.metrics import count_flops
from t5pegasus.train.norms import name_norms

Numbers = dict[str, Any]
_COUNTED = ("source_tokens", "target_tokens", "examples", "bad_examples")
"""Of which speeds are made; the other numbers of an update are averaged."""
_LIMITS = tuple(f"{name}_limit" for name in WATCHED)
"""Those of the interval's last update are reported, once there are any."""


class Meter:
    """Sums over one logging interval, which may have begun in an earlier attempt."""

    def __init__(self, config: RunConfig, control: Control, course: Course, peak: float):
        """A meter that goes on with the interval of a course.

        Args:
            config: of the run.
            control: time is what it has counted.
            course: the interval so far.
            peak: FLOP/s of one device, to which MFU is a ratio.
        """
        self.config, self._control = config, control
        self.batch_size = config.train.batch_size
        self.flops_per_step = count_flops(config, self.batch_size)
        self.flops = course.flops
        """Spent on training this model and those it came from, up to the last update added."""
        self.peak = peak * jax.device_count()
        self.rows = 0
        self._reset()
        self.updates = course.interval.get("updates", 0)
        self._applied = course.interval.get("applied", 0)
        self._sums = dict(course.interval.get("sums", {}))
        self._by_source = {name: list(pair) for name, pair in course.interval.get("by_source", {}).items()}

    def _reset(self) -> None:
        self.updates = self._applied = self._own_updates = 0
        self._sums: dict[str, float] = {}
        self._counts = dict.fromkeys(_COUNTED, 0.0)
        self._by_source: dict[str, list[float]] = {}
        self._last: Mapping[str, Any] = {}
        self._began = split_time(self._control.spent())

    def add(self, values: Mapping[str, Any]) -> None:
        """Take in the numbers of one update (`read_numbers`); of one that was skipped only tokens and time count."""
        self.rows = int(values["rows"])
        self.updates += 1
        self._own_updates += 1
        self.flops += self.flops_per_step
        for name in _COUNTED:
            self._counts[name] += values[name]
        if values["why"]:
            return
        self._applied += 1
        self._last = values
        for name, number in values.items():
            if name not in (*_COUNTED, *_LIMITS, "rows", "why", "norms", "by_source"):
                self._sums[name] = self._sums.get(name, 0.0) + number
        for name, pair in values.get("by_source", {}).items():
            before = self._by_source.get(name, [0.0, 0.0])
            self._by_source[name] = [before[0] + pair[0], before[1] + pair[1]]

    def interval(self) -> dict[str, Any]:
        """What a checkpoint keeps of the interval; empty behind a report."""
        kept = {"updates": self.updates, "applied": self._applied, "sums": dict(self._sums)}
        if self._by_source:
            kept["by_source"] = dict(self._by_source)
        return kept if self.updates else {}

    def report(self) -> dict[str, Any]:
        """The record of the interval; the next one begins. Speeds are those of its updates in this attempt."""
        spent = split_time(self._control.spent())
        parts = {part: value - self._began[part] for part, value in spent.items()}
        seconds = max(1e-9, parts["step"] + parts["data_wait"])
        tokens = self._counts["source_tokens"] + self._counts["target_tokens"]
        losses = {name: nll / weight for name, (nll, weight) in self._by_source.items() if weight > 0}
        record = {
            "rows": self.rows,
            "updates": self._own_updates,
            **{name: total / self._applied for name, total in self._sums.items()},
            **({"loss_by_source": losses} if losses else {}),
            **{name: self._last[name] for name in _LIMITS if math.isfinite(self._last.get(name, math.inf))},
            **({"norms": self._last["norms"]} if "norms" in self._last else {}),
            **({"bad_examples": int(self._counts["bad_examples"])} if self._counts["bad_examples"] else {}),
            **({"skipped": self.updates - self._applied} if self._applied < self.updates else {}),
            "seconds": seconds,
            "time": parts,
            "tokens_per_second": tokens / seconds,
            "rows_per_second": self._own_updates * self.batch_size / seconds,
            "examples_per_second": self._counts["examples"] / seconds,
            "mfu": self.flops_per_step * self._own_updates / seconds / self.peak,
            "data_wait_fraction": parts["data_wait"] / seconds,
            "flops": self.flops,
        }
        self._reset()
        return record


def read_numbers(config: RunConfig, values: Mapping[str, jax.Array], *, with_norms: bool) -> Numbers:
    """The numbers of one update, waiting for the device to have them; norms are fetched where they are reported."""
    scalars = jax.device_get({name: value for name, value in values.items() if name != "norms"})
    numbers: Numbers = {name: float(value) for name, value in scalars.items() if name != "by_source"}
    if "by_source" in scalars:
        numbers["by_source"] = dict(zip(name_sources(config.data), scalars["by_source"].T.tolist()))
    numbers |= {"rows": int(scalars["rows"]), "why": Why(int(scalars["why"]))}
    if with_norms:
        numbers["norms"] = name_norms(declare_parameters(config.model), jax.device_get(values["norms"]))
    return numbers
