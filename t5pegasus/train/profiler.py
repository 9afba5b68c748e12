"""Traces of some updates with jax.profiler, announced in the config or asked for while the run goes on."""

import logging
from pathlib import Path

import jax

from t5pegasus.config import TrainConfig

logger = logging.getLogger(__name__)

NUM_ASKED = 5
"""Updates that a request traces."""


class Profiler:
    """Decides which updates are traced; every process traces its own devices."""

    def __init__(self, config: TrainConfig, folder: Path):
        """A profiler that traces nothing yet.

        Args:
            config: `profile_steps`.
            folder: where the traces go, a local one.
        """
        self._range = config.profile_range()
        self._folder = folder
        self._last: int | None = None

    def ask(self, step: int) -> None:
        """Trace the updates behind `step`, unless a trace is under way."""
        if self._last is None:
            self._range = step + 1, step + NUM_ASKED

    def begins(self, step: int) -> bool:
        """Whether a trace begins in front of this update: what runs before it is to be finished first."""
        return self._last is None and self._range is not None and self._range[0] <= step <= self._range[1]

    def ends(self, step: int) -> bool:
        """Whether a trace ends behind this update: it is to be finished first."""
        return self._last is not None and step >= self._last

    def start(self, step: int) -> None:
        """Begin to trace."""
        assert self._range is not None, "begins says so"
        self._last, self._range = self._range[1], None
        jax.profiler.start_trace(self._folder)
        logger.info("tracing updates %d to %d into %s", step, self._last, self._folder)

    def stop(self) -> None:
        """End the trace that is under way, if there is one."""
        if self._last is not None:
            self._last = None
            jax.profiler.stop_trace()
