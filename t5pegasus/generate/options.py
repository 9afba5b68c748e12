"""How to search for an output, and what a search returns."""

import dataclasses
import math
from typing import Any, Literal, NamedTuple, get_args

from t5pegasus.errors import UsageError

Finalisation = Literal["exact", "huggingface", "huggingface-early", "huggingface-never", "bert4keras"]
"""Which ended hypotheses beam search keeps, and when it stops; `t5pegasus.generate.finalisation` says how each does."""


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
    """Greedy by default; `num_beams` above 1 is beam search, `temperature` above 0 is sampling."""

    max_new_tokens: int = 64
    """Tokens written at most, the end token among them, a forced prefix not."""
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
    min_new_tokens: int = 0
    """So many tokens come before the end token, those of a forced prefix not counted."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens is written twice, start token and prefix counting as written; 0 allows all."""
    finalisation: Finalisation = "exact"
    """How beam search ends; greedy search and sampling end with the end token."""
    num_return: int = 1
    """Outputs of a source: the best of beam search's hypotheses, or as many samples."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )
        if self.no_repeat_ngram_size < 0:
            raise UsageError(f"no_repeat_ngram_size={self.no_repeat_ngram_size} must be 0 (allow all) or positive")
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
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
            raise UsageError(
                f"top_k={self.top_k} and top_p={self.top_p} choose among sampled tokens, but temperature=0 takes "
                "the likeliest; set temperature, e.g. 1.0"
            )
        if self.temperature > 0 and self.num_beams > 1:
            raise UsageError(
                f"temperature={self.temperature} samples, num_beams={self.num_beams} searches; set only one of them"
            )
        if self.finalisation not in get_args(Finalisation):
            raise UsageError(
                f"finalisation={self.finalisation!r} must be one of {', '.join(map(repr, get_args(Finalisation)))}"
            )
        if self.temperature > 0 and self.finalisation != "exact":
            raise UsageError(
                f"finalisation={self.finalisation!r} ends beam search, but temperature={self.temperature} samples; "
                "set only one of them"
            )
        if self.temperature == 0 and self.num_return > self.num_beams:
            raise UsageError(
                f"num_return={self.num_return} outputs were wanted of num_beams={self.num_beams} hypotheses; set "
                f"num_beams={self.num_return} or more, or a temperature to sample"
            )
        if self.finalisation == "bert4keras" and self.num_return > 1:
            raise UsageError(
                f"finalisation='bert4keras' keeps one hypothesis only, num_return={self.num_return} were wanted; "
                "set num_return=1, or another finalisation"
            )


class Generated(NamedTuple):
    """What a search found for each of B rows.

    T is the length of the prefix plus `max_new_tokens`. K are the hypotheses kept: `num_beams` (1 where bert4keras
    ends the search), or `num_return` samples.
    """

    tokens: Any
    """int32 [B, K, T], best first: without the start id, from the prefix on, with the end id where it was reached,
    then the pad id."""
    lengths: Any
    """int32 [B, K]: tokens of prefix and output, the end token among them; 0 where there is no hypothesis."""
    scores: Any
    """float32 [B, K], descending: Σ log p / length ** length_penalty over the tokens after the prefix, under the model
    itself (without temperature, top-k, top-p and what is forbidden); -inf where there are fewer than K hypotheses, 0
    in an empty row."""
