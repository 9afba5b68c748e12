"""What a run does between two updates: read their numbers, evaluate, write samples, save, and stop if it is asked to.

All of it follows from the step, the history and the requests that all processes agreed on. A stop in the middle leaves
in the checkpoint what is still owed, so that the run that goes on from there is the one that was never stopped.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from t5pegasus.config import RunConfig
from t5pegasus.data.quarantine import BadExample
from t5pegasus.errors import PreemptedError
from t5pegasus.train.agreement import Agreement, Check, StopAgreedError, make_check, no_check
from t5pegasus.train.control import Control, Request
from t5pegasus.train.course import Course
from t5pegasus.train.early_stopping import History, has_stopped, judge
from t5pegasus.train.logbook import Logbook
from t5pegasus.train.meter import read_numbers
from t5pegasus.train.profiler import Profiler
from t5pegasus.train.state import TrainState

NOTHING = Request(0)


class Hooks(NamedTuple):
    """What the loop calls but does not know: they bring held-out losses, summaries and disks."""

    evaluate: Callable[[TrainState, Check], dict[str, float]] | None
    """State → {loss, accuracy, perhaps more scores} on held-out text; None where there is none."""
    save: Callable[[TrainState, Course], None]
    """Write a checkpoint. It may still be writing when it returns, but has no more need of the state; behind a save
    that failed it waits, and raises if this one fails, too."""
    finish_saves: Callable[[], None] = lambda: None
    """Wait until all checkpoints are on the disk."""
    ends_phase: Callable[[int, History], bool] = lambda *_: False
    """(step, history) of a checkpoint → whether the model changes behind it, so that the loop returns."""
    sample: Callable[[TrainState, Check], list[dict[str, Any]]] | None = None
    """State → summaries of held-out sources; None where none are wanted."""
    find_bad_examples: Callable[[Sequence[int]], list[BadExample]] = lambda _: []
    """Rows of the stream → the examples among them that cannot be used, for an update that had some."""


class Outside(NamedTuple):
    """What asks the loop for something from outside."""

    control: Control
    """What the process asks of the run."""
    agreement: Agreement
    """Of all processes on that."""
    profiler: Profiler


def is_boundary(config: RunConfig, step: int, history: History, boundary: int | None) -> bool:
    """Whether a run saves at this step of itself; only there may its model change.

    Args:
        config: `save_every_steps`, `steps`.
        step: updates made.
        history: evaluations so far; a step that is the best is saved.
        boundary: a step that an event asks for.
    """
    is_best = bool(history) and history[-1]["step"] == step and history[-1].get("best", False)
    return is_due(config, config.train.save_every_steps, step) or step == boundary or is_best


def is_due(config: RunConfig, every_steps: int, step: int) -> bool:
    """Whether a step is one of these, or the last; 0 is none."""
    return every_steps > 0 and (step == config.train.steps or step % every_steps == 0)


class Visit:
    """What the loop does at a step, sharing what it knows: the course, and the update that is on its way."""

    def __init__(
        self,
        config: RunConfig,
        hooks: Hooks,
        logbook: Logbook,
        outside: Outside,
        course: Course,
        *,
        boundary: int | None,
        is_last_phase: bool,
    ):
        """See `loop.run`."""
        self.config, self.hooks, self.logbook, self.outside = config, hooks, logbook, outside
        self.boundary, self.is_last_phase = boundary, is_last_phase
        self.course = course
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self._last_save = time.monotonic()
        self._saved: tuple[int, tuple[str, ...]] | None = None

    def settle(self) -> None:
        """Read the numbers of the update that is on its way, waiting for the device to have them.

        Raises:
            DivergedError: if the run is to end with it.
            RollbackNeededError: if the run is to go back.
            DataError: if more examples cannot be used than allowed.
        """
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        is_logged = is_due(self.config, self.config.train.log_every_steps, step)
        numbers = read_numbers(self.config, values, with_norms=is_logged)
        if numbers["bad_examples"]:
            rows = range(numbers["rows"] - self.config.train.batch_size, numbers["rows"])
            found = self.hooks.find_bad_examples(rows)
            self.logbook.bad_examples(step, found)
            self.course = self.course.with_bad_examples(found)
        self.course = self.logbook.judge(step, numbers, self.course)
        self.logbook.meter.add(numbers)
        if is_logged:
            self.logbook.report(step)

    def remind(self) -> None:
        """Ask for a checkpoint if the last one is too long ago, on the first process's clock."""
        seconds = self.config.train.save_every_seconds
        if seconds and jax.process_index() == 0 and time.monotonic() - self._last_save >= seconds:
            self.outside.control.request(Request.SAVE)

    def due(self, step: int) -> tuple[str, ...]:
        """What is to be done at a step, in this order."""
        train, hooks = self.config.train, self.hooks
        evaluates = hooks.evaluate is not None and is_due(self.config, train.evaluate_every_steps, step)
        samples = hooks.sample is not None and is_due(self.config, train.sample_every_steps, step)
        return ("evaluate",) * evaluates + ("sample",) * samples

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due at a step, as far as that is known before it is evaluated."""
        return is_boundary(self.config, step, (), self.boundary)

    def __call__(self, state: TrainState, step: int, due: Sequence[str], agreed: Request = NOTHING) -> bool:
        """Do what is due at a step, then save.

        Args:
            state: behind the step.
            step: updates made.
            due: of `due`, or what a stop cut off here.
            agreed: what the run is asked for. A stop in front of the last step ends it; at the last step it does what
                is due, which is saved as owed before.

        Returns:
            Whether the run, or its phase, ends here.

        Raises:
            PreemptedError: if the run was to stop, and is saved.
        """
        owed = list(due)
        is_last = step == self.config.train.steps
        try:
            if Request.STOP in agreed and (owed or not is_last):
                raise StopAgreedError
            self._do(state, step, owed, make_check(self.outside.agreement, self.outside.control))
        except StopAgreedError:
            self._save(state, step, tuple(owed))
            self.hooks.finish_saves()
            if not is_last:
                raise PreemptedError(
                    f"asked to stop: step {step} of {self.config.train.steps} is saved; the same command goes on"
                ) from None
            self._do(state, step, owed, no_check)
        history = self.course.history
        at_boundary = is_boundary(self.config, step, history, self.boundary)
        stops = self.is_last_phase and has_stopped(self.config.train, history)
        ends = at_boundary and self.hooks.ends_phase(step, history)
        if ends and self.logbook.meter.updates:  # what is measured of one model is not mixed with the next one's
            self.logbook.report(step)
        if at_boundary or stops or Request.SAVE in agreed:
            self._save(state, step, ())
        return stops or ends

    def _do(self, state: TrainState, step: int, owed: list[str], check: Check) -> None:
        """Do what is owed; what is done is taken from the list."""
        doing = self.outside.control.doing
        while owed:
            with doing(owed[0], step):
                check()
                if owed[0] == "evaluate" and self.hooks.evaluate:
                    scores = self.hooks.evaluate(state, check)
                    self.logbook.evaluation(step, scores)
                    history = self.course.history
                    history = (*history, judge(self.config.train, step, scores, history))
                    self.course = self.course._replace(history=history)
                elif owed[0] == "sample" and self.hooks.sample:
                    self.logbook.samples(step, self.hooks.sample(state, check))
            del owed[0]

    def _save(self, state: TrainState, step: int, owed: tuple[str, ...]) -> None:
        if self._saved == (step, owed):
            return
        meter = self.logbook.meter
        self.course = self.course._replace(owed=owed, flops=meter.flops, interval=meter.interval())
        with self.outside.control.doing("save", step):
            self.hooks.save(state, self.course)
        self.course = self.course._replace(owed=(), interval={})
        self._saved, self._last_save = (step, owed), time.monotonic()
