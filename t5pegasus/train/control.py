"""What a run and the process around it tell each other: requests to it, and what it is doing now.

Signal handlers and watching threads belong to the process (`launch`), and know nothing of training; the run knows
nothing of signals. Both know this object.
"""

import contextlib
import enum
import functools
import operator
import time
from collections.abc import Iterator
from typing import NamedTuple


class Request(enum.IntFlag):
    """What a run can be asked for from outside; it acts between two updates."""

    STOP = 1
    """Save, and end."""
    SAVE = 2
    """Save, and go on."""
    PROFILE = 4
    """Trace the next updates."""


class Activity(NamedTuple):
    """What a run is doing; replaced as a whole, so that another thread may read it at any time."""

    name: str
    """See `Control.doing`."""
    began: float
    """On the clock of `time.monotonic`."""
    step: int
    """Updates that the run has sent to the device."""


class Control:
    """Requests to a run from outside, and its activity, for those who watch it."""

    def __init__(self) -> None:
        self._asked: set[Request] = set()
        self.activity = Activity("start", time.monotonic(), 0)
        self.seconds: dict[str, float] = {}
        """Spent in each activity so far; what runs inside another counts as itself alone."""
        self.first_step: int | None = None
        """Updates made when the loop began to ask for data: from here on there is something new to save."""
        self.failing: BaseException | None = None
        """What ended the last activity, until another one begins: a run that is on its way out."""
        self.part_seconds = 900.0
        """How long a save waits for another process's part of the checkpoint."""
        self.stragglers: tuple[int, ...] = ()
        """Processes whose own part of a step takes much longer than that of the others; process 0 learns of them."""

    def request(self, what: Request) -> None:
        """Ask; safe from threads and signal handlers: each flag is put in, and taken out, in one step."""
        self._asked.update(what)

    @property
    def requests(self) -> Request:
        """What was asked for and not answered yet."""
        return functools.reduce(operator.or_, (flag for flag in Request if flag in self._asked), Request(0))

    def answer(self, what: Request) -> None:
        """Take back what has been done."""
        self._asked.difference_update(what)

    @contextlib.contextmanager
    def doing(self, name: str, step: int | None = None) -> Iterator[None]:
        """Say what the run does inside: each activity has a time limit of its own (`launch.watchdog`).

        Args:
            name: `start` (what nothing else names), `build` (examples of pairs, to fine-tune on), `restore`,
                `compile`, `data` (wait for the next batch), `step` (send an update to the device), `device` (wait for
                its numbers), `evaluate`, `sample`, `save`, `event` (change the model).
            step: updates sent to the device, if that has changed.
        """
        before = self.activity
        self.failing = None
        self._turn_to(name, before.step if step is None else step)
        if name == "data" and self.first_step is None:
            self.first_step = self.activity.step
        try:
            yield
        except BaseException as error:
            self.failing = error
            raise
        finally:
            self._turn_to(before.name, self.activity.step)

    def spent(self) -> dict[str, float]:
        """`seconds`, with those of the activity that goes on."""
        now, current = time.monotonic(), self.activity
        return self.seconds | {current.name: self.seconds.get(current.name, 0.0) + now - current.began}

    def _turn_to(self, name: str, step: int) -> None:
        before, now = self.activity, time.monotonic()
        self.seconds[before.name] = self.seconds.get(before.name, 0.0) + now - before.began
        self.activity = Activity(name, now, step)
