"""Bootstrap confidence intervals (Efron 1979; Koehn 2004 for BLEU): what another sample of pairs would have given."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from t5pegasus.errors import UsageError
from t5pegasus.evaluate.scores import DEFINITIONS, PairScores

_CHUNK_WEIGHTS = 1 << 22
"""Pairs × resamples in memory at a time: 32 MiB of weights."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure on the pairs there are, and the bounds between which it lies on most resamples of them."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the distance of the bounds, to be written behind ±."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: pairs drawn with replacement, as many as there are, the same ones for all systems."""

    num_resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_resamples < 1:
            raise UsageError(f"num_resamples={self.num_resamples} must be at least 1")

    def resample(self, systems: Mapping[str, PairScores]) -> dict[str, dict[str, np.ndarray]]:
        """System → score → float64[num_resamples] in percent, from the same resamples of the same pairs."""
        (num_pairs,) = {len(scored.values) for scored in systems.values()}
        generator = np.random.default_rng(self.seed)
        parts: dict[str, list[dict[str, np.ndarray]]] = {system: [] for system in systems}
        chunk = max(_CHUNK_WEIGHTS // num_pairs, 1)
        for first in range(0, self.num_resamples, chunk):
            size = min(chunk, self.num_resamples - first)
            drawn = generator.integers(num_pairs, size=(size, num_pairs)) + num_pairs * np.arange(size)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=size * num_pairs).reshape(size, num_pairs)
            for system, scored in systems.items():
                parts[system].append(scored.of_corpora(weights.astype(np.float64)))
        return {
            system: {name: np.concatenate([part[name] for part in made]) for name in DEFINITIONS}
            for system, made in parts.items()
        }

    def bound(self, value: float, resampled: np.ndarray) -> Interval:
        """The interval of the percentiles that leave out (1 - confidence) / 2 at either end."""
        tail = 50 * (1 - self.confidence)
        low, high = np.percentile(resampled, [tail, 100 - tail])
        return Interval(value, float(low), float(high))
