"""Shape and numerics of the model."""

import dataclasses
import itertools
import math
from typing import Any, Literal

from t5pegasus.config.record import Record, is_of_type, require


@dataclasses.dataclass(frozen=True)
class ModelConfig(Record):
    """Shape and numerics of a T5 encoder-decoder; fields carry the Hugging Face names.

    RMS norm, relative position bias and no biases in all of them. The fields from `feed_forward_proj` to
    `inner_dropout` are the numerics, in which the families differ: `NUMERICS` names their combinations.
    """

    vocab_size: int = 50_000
    d_model: int = 768
    d_kv: int = 64
    d_ff: int = 2048
    num_heads: int = 12
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_attention_boundaries: tuple[int, ...] = ()
    """Ascending distances that split the last bucket of a direction, the one of all distances beyond the formula: from
    each of them on, up to the next, a bucket of its own. Their rows stand behind the formula's, so that a longer list
    leaves the rows of a shorter one in place."""
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    decoder_start_token_id: int = 101
    eos_token_id: int = 102
    feed_forward_proj: Literal["gated-gelu", "gated-gelu-erf", "relu"] = "gated-gelu"
    """gated-gelu takes GELU's tanh form, as Hugging Face's does, gated-gelu-erf the exact one; relu has no gate."""
    tie_word_embeddings: bool = False
    """The token embedding is the output head, too."""
    scale_decoder_outputs: bool = False
    """The head reads the decoder's output times d_model^-0.5."""
    cross_attention_bias: bool = False
    """Cross-attention adds the decoder's relative bias, too, by target minus source position."""
    inner_dropout: bool = True
    """Dropout also of attention weights and feed-forward units, not of what blocks add to the stream only."""
    num_masked_tokens: int = 0
    """The last so many tokens of the vocabulary are not open yet: they can be read, but have probability 0, so that
    all other probabilities are those of a vocabulary without them. No target may hold them."""

    @property
    def num_open_tokens(self) -> int:
        """How many tokens, the first ones, can be written."""
        return self.vocab_size - self.num_masked_tokens

    @property
    def first_clipped_distance(self) -> int:
        """From here on the bucket formula puts all distances into the last bucket of their direction, in both stacks.

        A distance at which the formula depends on the rounding of its float32 logarithm counts as below.
        """

        def of_direction(num_buckets: int) -> int:
            num_exact = num_buckets // 2
            num_logarithmic = num_buckets - num_exact
            growth = self.relative_attention_max_distance / num_exact
            return math.ceil(num_exact * growth ** ((num_logarithmic - 1 + 1e-4) / num_logarithmic))

        buckets = self.relative_attention_num_buckets
        return max(of_direction(buckets // 2), of_direction(buckets))

    @property
    def numerics(self) -> str:
        """The name of its combination of numerics in `NUMERICS`, or `custom`."""
        own = {field: getattr(self, field) for field in NUMERICS["hf-mt5"]}
        return next((name for name, fields in NUMERICS.items() if fields == own), "custom")

    def __post_init__(self) -> None:
        choices = ("gated-gelu", "gated-gelu-erf", "relu")
        require(
            self.feed_forward_proj in choices,
            f"model.feed_forward_proj={self.feed_forward_proj!r} must be one of {', '.join(choices)}",
        )
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers", "num_decoder_layers"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        require(0.0 <= self.dropout_rate < 1.0, f"model.dropout_rate={self.dropout_rate} must lie in [0, 1)")
        require(
            0.0 < self.layer_norm_epsilon < math.inf,
            f"model.layer_norm_epsilon={self.layer_norm_epsilon} must be a positive number",
        )
        buckets = self.relative_attention_num_buckets
        require(
            buckets >= 4 and buckets % 4 == 0,
            f"model.relative_attention_num_buckets={buckets} must be a positive multiple of 4 "
            "(half per direction in the encoder, half of those exact)",
        )
        require(
            self.relative_attention_max_distance > buckets // 2,
            f"model.relative_attention_max_distance={self.relative_attention_max_distance} must exceed "
            f"relative_attention_num_buckets/2={buckets // 2}, the distances that have a bucket of their own",
        )
        self._check_boundaries()
        require(
            0 <= self.num_masked_tokens < self.vocab_size,
            f"model.num_masked_tokens={self.num_masked_tokens} must lie in [0, vocab_size={self.vocab_size})",
        )
        open_tokens = f"vocab_size={self.vocab_size}"
        if self.num_masked_tokens:
            open_tokens = f"{self.num_open_tokens}, the open part of {open_tokens}"
        for name in ("pad_token_id", "decoder_start_token_id", "eos_token_id"):
            require(
                0 <= getattr(self, name) < self.num_open_tokens,
                f"model.{name}={getattr(self, name)} must lie in [0, {open_tokens})",
            )

    def _check_boundaries(self) -> None:
        boundaries = self.relative_attention_boundaries
        what = f"model.relative_attention_boundaries={boundaries!r}"
        require(
            isinstance(boundaries, tuple) and all(is_of_type(each, int) for each in boundaries),
            f"{what} must be whole numbers",
        )
        if not boundaries:
            return
        require(
            all(one < next_one for one, next_one in itertools.pairwise(boundaries)),
            f"{what} must be ascending, each of them once",
        )
        clipped = self.first_clipped_distance
        require(
            clipped < boundaries[0] and boundaries[-1] < 2**31,
            f"{what} must lie above {clipped}, from where the formula (relative_attention_num_buckets="
            f"{self.relative_attention_num_buckets}, max_distance={self.relative_attention_max_distance}) gives all "
            f"distances one bucket, and below 2^31; begin with {2 * clipped}, say",
        )


def _numerics(feed_forward_proj: str, *, tied: bool, scaled: bool, cross_bias: bool, inner_dropout: bool) -> dict:
    return {
        "feed_forward_proj": feed_forward_proj,
        "tie_word_embeddings": tied,
        "scale_decoder_outputs": scaled,
        "cross_attention_bias": cross_bias,
        "inner_dropout": inner_dropout,
    }


NUMERICS: dict[str, dict[str, Any]] = {
    "hf-mt5": _numerics("gated-gelu", tied=False, scaled=False, cross_bias=False, inner_dropout=True),
    "bert4keras": _numerics("gated-gelu-erf", tied=False, scaled=True, cross_bias=True, inner_dropout=False),
    "t5-1.0": _numerics("relu", tied=True, scaled=True, cross_bias=False, inner_dropout=True),
}
"""Numerics by name: mT5 and T5.1.1 as in T5X and Hugging Face (what fresh runs take), the released T5 PEGASUS
models (bert4keras), and the original T5."""
