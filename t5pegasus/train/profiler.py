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
        announced = config.profile_range()
        self._wanted = [announced] if announced else []
        self._folder = folder
        self._runs = False

    def ask(self, step: int) -> None:
        """Trace the updates behind `step`, beside those announced; a trace that is under way goes on for them."""
        self._wanted.append((step + 1, step + NUM_ASKED))

    def begins(self, step: int) -> bool:
        """Whether a trace begins in front of this update: what runs before it is to be finished first."""
        return not self._runs and self._is_wanted(step)

    def ends(self, step: int) -> bool:
        """Whether a trace ends behind this update: it is to be finished first."""
        return self._runs and not self._is_wanted(step + 1)

    def start(self, step: int) -> None:
        """Begin to trace."""
        jax.profiler.start_trace(self._folder)
        self._runs = True
        logger.info("tracing from update %d on into %s", step, self._folder)

    def stop(self) -> None:
        """End the trace that is under way, if there is one."""
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()

    def _is_wanted(self, step: int) -> bool:
        return any(first <= step <= last for first, last in self._wanted)
