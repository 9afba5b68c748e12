"""How to search for an output, and what a search returns."""

import dataclasses
import math
from typing import Any, NamedTuple

from t5pegasus.errors import UsageError


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Greedy by default; `num_beams` above 1 is beam search, `temperature` above 0 is sampling."""

    max_new_tokens: int = 64
    """Tokens written at most, the end token among them."""
    num_beams: int = 1
    """Hypotheses kept at each step."""
    length_penalty: float = 1.0
    """A score is Σ log p / length ** length_penalty; above 0 it favours longer outputs."""
    temperature: float = 0.0
    """Sample from softmax(logits / temperature); 0 takes the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that have this probability together."""
    seed: int = 0
    """Of sampling: output i depends on the seed, i and its source only, not on its batch."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if not math.isfinite(self.length_penalty):
            raise UsageError(f"length_penalty={self.length_penalty} must be finite")
        if not (0 <= self.temperature < math.inf):
            raise UsageError(f"temperature={self.temperature} must be 0 (no sampling) or positive")
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} must be 0 (all tokens) or positive")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must lie in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed={self.seed} must lie in [0, 2^32)")
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
            raise UsageError(
                f"top_k={self.top_k} and top_p={self.top_p} choose among sampled tokens, but temperature=0 takes "
                "the likeliest; set temperature, e.g. 1.0"
            )
        if self.temperature > 0 and self.num_beams > 1:
            raise UsageError(
                f"temperature={self.temperature} samples, num_beams={self.num_beams} searches; set only one of them"
            )


class Generated(NamedTuple):
    """What a search found for each of B rows; T is `max_new_tokens`, K the hypotheses kept."""

    tokens: Any
    """int32 [B, K, T], best first: without the start id, with the end id where it was reached, then the pad id."""
    lengths: Any
    """int32 [B, K]: tokens written, the end token among them."""
    scores: Any
    """float32 [B, K]: Σ log p / length ** length_penalty under the model itself (without temperature, top-k,
    top-p); -inf where there are fewer than K hypotheses, 0 in an empty row."""
