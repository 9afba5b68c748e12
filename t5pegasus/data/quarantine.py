"""Examples that cannot be used: left out of their rows, named once, and no more of them than is allowed."""

import logging
import threading
from collections.abc import Iterable
from typing import NamedTuple

from t5pegasus.errors import DataError

logger = logging.getLogger(__name__)


class BadExample(NamedTuple):
    """One example that cannot be used, and why."""

    shard: str
    """The file it lies in, with its folder."""
    index: int
    """Its number among all examples of the folder."""
    reason: str
    examples: str
    """Fingerprint of the folder: it may lie elsewhere another time."""


class Quarantine:
    """The bad examples that a run has met, as far as this process knows; safe between threads."""

    def __init__(self, max_bad_examples: int) -> None:
        self._max = max_bad_examples
        self._met: set[tuple[str, int]] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._met)

    def recall(self, examples: str, indices: Iterable[int]) -> None:
        """Count examples of this fingerprint that the run met before it was stopped; they have been named."""
        with self._lock:
            self._met.update((examples, index) for index in indices)

    def admit(self, bad: BadExample) -> None:
        """Take one in; one that is there already changes nothing.

        Raises:
            DataError: if these are more than allowed.
        """
        with self._lock:
            if (bad.examples, bad.index) in self._met:
                return
            self._met.add((bad.examples, bad.index))
            count = len(self._met)
        logger.warning("%s: example %d is left out: %s", bad.shard, bad.index, bad.reason)
        if count > self._max:
            raise DataError(
                f"{count} examples cannot be used, data.max_bad_examples={self._max} are allowed; the last of them: "
                f"example {bad.index} of {bad.shard}, {bad.reason}. Copy the folder again from where it is whole, "
                "build it again, or allow more"
            )
