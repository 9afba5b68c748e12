"""Lengths of packed rows and the seed of their order."""

import dataclasses

from t5pegasus.config.record import Record, require


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

    def __post_init__(self) -> None:
        for name in ("max_source_tokens", "max_target_tokens"):
            require(getattr(self, name) >= 2, f"data.{name}={getattr(self, name)} must be at least 2")
        require(0 <= self.seed < 2**32, f"data.seed={self.seed} must lie in [0, 2^32)")
