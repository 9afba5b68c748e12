"""Scores by length: whether a system does worse on long texts, or for long references."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from t5pegasus.evaluate.scores import PairScores

NUM_BINS = 4


@dataclasses.dataclass(frozen=True)
class LengthBin:
    """The pairs with a length between `low` and `high` characters, both included."""

    low: int
    high: int
    num_pairs: int
    scores: dict[str, dict[str, float]]
    """System → score in percent on these pairs."""


def score_by_length(lengths: Sequence[int], systems: Mapping[str, PairScores]) -> list[LengthBin]:
    """Scores in bins of about equally many pairs; fewer than `NUM_BINS` where many lengths are equal.

    Args:
        lengths: of each pair, in characters.
        systems: scores of the same pairs.
    """
    values = np.asarray(lengths)
    edges = np.unique(np.quantile(values, np.arange(1, NUM_BINS + 1) / NUM_BINS, method="lower"))
    places = np.searchsorted(edges, values)
    bins = []
    for place in range(len(edges)):
        members = (places == place).astype(np.float64)
        scores = {
            system: {name: float(figure) for name, (figure,) in scored.of_corpora(members[None]).items()}
            for system, scored in systems.items()
        }
        inside = values[places == place]
        bins.append(LengthBin(int(inside.min()), int(inside.max()), len(inside), scores))
    return bins
