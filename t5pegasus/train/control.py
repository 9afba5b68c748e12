"""What a run and the process around it tell each other: requests to it, and what it is doing now.

Signal handlers and watching threads belong to the process (`launch`), and know nothing of training; the run knows
nothing of signals. Both know this object.
"""

import contextlib
import enum
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
    """start, data, step, device, evaluate, save, event or end: see `Control.doing`."""
    began: float
    """On the clock of `time.monotonic`."""
    step: int
    """Updates that the run has sent to the device."""


class Control:
    """Requests to a run from outside, and its activity, for those who watch it."""

    def __init__(self) -> None:
        self._requests = Request(0)
        self.activity = Activity("start", time.monotonic(), 0)
        self.first_step: int | None = None
        """Updates made when the run began or continued; None before it has made a new one."""

    def request(self, what: Request) -> None:
        """Ask; safe from threads and signal handlers."""
        self._requests |= what

    @property
    def requests(self) -> Request:
        """What was asked for and not answered yet."""
        return self._requests

    def answer(self, what: Request) -> None:
        """Take back what has been done."""
        self._requests &= ~what

    @contextlib.contextmanager
    def doing(self, name: str, step: int | None = None) -> Iterator[None]:
        """Say what the run does inside: each activity has a time limit of its own (`launch.watchdog`).

        Args:
            name: `start` (restore, compile), `data` (wait for the next batch), `step` (send an update to the device),
                `device` (wait for its numbers), `evaluate`, `save`, `event` (change the model), `end`.
            step: updates sent to the device, if that has changed.
        """
        before = self.activity
        self.activity = Activity(name, time.monotonic(), before.step if step is None else step)
        try:
            yield
        finally:
            self.activity = Activity(before.name, time.monotonic(), self.activity.step)
