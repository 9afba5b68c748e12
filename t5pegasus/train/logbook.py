"""Where the loop writes down what it does: records, an interval's sums, the account of time, the terminal's line."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from t5pegasus.config import RunConfig
from t5pegasus.data.quarantine import BadExample
from t5pegasus.errors import DivergedError
from t5pegasus.progress import Progress, format_count
from t5pegasus.train.control import Control
from t5pegasus.train.course import Course
from t5pegasus.train.divergence import RollbackNeededError, Why
from t5pegasus.train.goodput import Goodput
from t5pegasus.train.meter import Meter
from t5pegasus.train.metrics import MetricsWriter

logger = logging.getLogger(__name__)

_WAY_OUT = (
    "lower optimizer.learning_rate, lengthen warmup_steps, or look at the data; --train.on-divergence skip or rollback "
    "goes on by itself"
)


class Logbook:
    """That of one phase, in which the model stays the same."""

    def __init__(self, config: RunConfig, metrics: MetricsWriter, control: Control, goodput: Goodput, course: Course):
        self.train, self.metrics, self.control, self.goodput = config.train, metrics, control, goodput
        self.meter = Meter(config, control, course, metrics.peak[0])
        self._progress = Progress("train", total=self.train.steps, unit="steps", shown=jax.process_index() == 0)

    @contextlib.contextmanager
    def progress(self, step: int) -> Iterator[None]:
        """Show the terminal's line inside."""
        with self._progress as progress:
            progress.skip(step)
            yield

    def advance(self) -> None:
        """One more update is on its way."""
        self._progress.advance(1)

    def report(self, step: int) -> None:
        """Write what was measured since the last report."""
        record = self.meter.report()
        if self.control.stragglers:
            record["slow_processes"] = list(self.control.stragglers)
        totals = self.goodput.totals(step, self.control.spent())
        self.metrics.write("train", step, **record, goodput=totals["goodput"])
        loss = f"loss {record['loss']:.3f}" if "loss" in record else "no update applied"
        speed = f"{format_count(record['tokens_per_second'])} tokens/s, MFU {100 * record['mfu']:.1f} %"
        self._progress.detail = f"{loss}, {speed}"
        self.goodput.write(step, self.control.spent())

    def judge(self, step: int, numbers: Mapping[str, Any], course: Course) -> Course:
        """Write down a bad update, and decide what becomes of the run.

        Args:
            step: that the update led to.
            numbers: as `read_numbers` gives them.
            course: in front of it.

        Returns:
            The course behind it: it was skipped, or is a good one.

        Raises:
            RollbackNeededError: if the run is to go back.
            DivergedError: if it is to end.
        """
        why: Why = numbers["why"]
        if not why:
            return course._replace(skips=0)
        rows, size = numbers["rows"], self.meter.batch_size
        record = {"at_step": step, "rows": [rows - size, rows], "why": why.describe()}
        for name in ("loss", "grad_norm", "loss_limit", "grad_norm_limit"):
            if name in numbers:  # JSON has no infinity
                record[name] = numbers[name] if math.isfinite(numbers[name]) else str(numbers[name])
        policy, train = self.train.on_divergence, self.train
        what = f"update {step}: {record['why']} (loss={record['loss']}, grad_norm={record['grad_norm']})"
        if policy == "skip" and course.skips < train.max_skips:
            self.metrics.write("divergence", step, action="skip", **record)
            logger.warning("%s; skipped, with rows %d to %d", what, rows - size, rows - 1)
            return course._replace(skips=course.skips + 1)
        if policy == "rollback" and course.rollbacks < train.max_rollbacks:
            raise RollbackNeededError({"rollback": course.rollbacks + 1, **record})
        self.metrics.write("divergence", step, action="abort", **record)
        limit = {
            "skip": f", behind train.max_skips={train.max_skips} updates skipped in a row",
            "rollback": f", behind train.max_rollbacks={train.max_rollbacks} rollbacks",
        }.get(policy, "")
        raise DivergedError(f"{what}{limit}; the last checkpoint is intact: {_WAY_OUT}")

    def bad_examples(self, step: int, found: Sequence[BadExample]) -> None:
        """Write down which examples of an update could not be used, and why."""
        named = [{"shard": bad.shard, "index": bad.index, "reason": bad.reason} for bad in found]
        self.metrics.write("bad_examples", step, examples=named)

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write the scores of an evaluation."""
        self.metrics.write("heldout", step, **scores)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write summaries of held-out sources, with what they are held against."""
        self.metrics.write("sample", step, samples=list(samples))
        for index, sample in enumerate(samples):
            scores = ", ".join(f"{name} {value:.1f}" for name, value in sample["scores"].items())
            lines = [f"**{title}** {sample[title]}" for title in ("source", "reference", "summary")]
            self.metrics.write_text(step, f"sample/{index}", "\n\n".join([*lines, scores]))
