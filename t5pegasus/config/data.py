"""Lengths of packed rows and the seed of their order."""

import dataclasses

from t5pegasus.config.record import Record, is_positive_number, require


@dataclasses.dataclass(frozen=True)
class DataConfig(Record):
    """Lengths of one packed row and the seed of its order."""

    max_source_tokens: int = 512
    """Width of the encoder's rows; longer sources lose their end."""
    max_target_tokens: int = 128
    """Width of the decoder's rows; longer targets lose their end, but not the end token."""
    pack: bool = True
    """Several examples share a row, kept apart by segment ids; False gives one example per row."""
    seed: int = 0
    """Of the order of the rows, and of what span corruption cuts out."""
    mixture: tuple[str, ...] = ()
    """Several folders of examples with their weights, FOLDER=0.7 OTHER=0.3: the shares of the rows that come from each.
    Weights may change when a run continues, and folders may be added; 0 leaves one out from then on."""
    max_bad_examples: int = 100
    """Examples that cannot be read are left out of their rows and named; with more of them, since it began, the run
    ends."""

    def __post_init__(self) -> None:
        for name in ("max_source_tokens", "max_target_tokens"):
            require(getattr(self, name) >= 2, f"data.{name}={getattr(self, name)} must be at least 2")
        require(0 <= self.seed < 2**32, f"data.seed={self.seed} must lie in [0, 2^32)")
        require(self.max_bad_examples >= 0, f"data.max_bad_examples={self.max_bad_examples} must not be negative")
        weights = self.mixture_weights()
        require(not weights or any(weights.values()), "data.mixture: every weight is 0; give one above it")

    def mixture_weights(self) -> dict[str, float]:
        """Folder, without a slash at its end → weight, in the order given.

        Raises:
            UsageError: naming the entry that is no FOLDER=WEIGHT.
        """
        weights: dict[str, float] = {}
        for entry in self.mixture:
            folder, equals, text = entry.rpartition("=")
            folder = folder.rstrip("/")
            require(
                bool(folder and equals) and (is_positive_number(text) or text in ("0", "0.0")),
                f"data.mixture: {entry!r} is no FOLDER=WEIGHT with a weight of 0 or more, e.g. examples=0.7",
            )
            require(folder not in weights, f"data.mixture names {folder} twice; give each folder once")
            weights[folder] = float(text)
        return weights
