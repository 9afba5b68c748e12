"""What a growth will do and promises, decided or refused before a byte is read."""

import dataclasses
import hashlib
import json
from typing import Any

from t5pegasus.config import SCHEMA, ModelConfig
from t5pegasus.errors import UsageError

GROWING_FIELDS = ("d_model", "d_ff", "num_heads", "d_kv", "num_encoder_layers", "num_decoder_layers")
"""The config fields that growth can make larger."""


@dataclasses.dataclass(frozen=True)
class FieldGrowth:
    """One config field on its way from source to target."""

    field: str
    source: int
    target: int
    rule: str
    """What happens to the entries, in words."""
    function_class: str
    """B: bitwise the same logits where kernels keep the order of old sums, R: the same but for rounding."""
    breaker: str
    """What sets the new capacity in motion, so that it does not stay a copy or at zero for ever."""


@dataclasses.dataclass(frozen=True)
class GrowthPlan:
    """A growth from one model to another. Create it through `plan_growth`, which checks it."""

    source: ModelConfig
    target: ModelConfig
    seed: int
    noise: float
    """Standard deviation of new random entries in units of the old ones' RMS; with 0 new widths stay idle."""

    @property
    def fields(self) -> tuple[FieldGrowth, ...]:
        """The fields that grow, in the order of `GROWING_FIELDS`."""
        return tuple(
            _describe(field, getattr(self.source, field), getattr(self.target, field), self.noise)
            for field in GROWING_FIELDS
            if getattr(self.source, field) != getattr(self.target, field)
        )

    @property
    def function_class(self) -> str:
        """The weakest promise among the fields."""
        return max(each.function_class for each in self.fields)

    def to_json(self) -> dict[str, Any]:
        """The plan as written into receipts and lineages."""
        return {
            "schema": SCHEMA,
            "source": self.source.to_json(),
            "target": self.target.to_json(),
            "seed": self.seed,
            "noise": self.noise,
            "function_class": self.function_class,
            "fields": [dataclasses.asdict(each) for each in self.fields],
        }

    @property
    def hash(self) -> str:
        """sha256 of the plan's JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def plan_growth(source: ModelConfig, target: ModelConfig, seed: int, noise: float = 1.0) -> GrowthPlan:
    """The plan that takes a model of one config to exactly another.

    Args:
        source: config of the trained model.
        target: config to reach.
        seed: of the new random entries, in [0, 2³²).
        noise: their standard deviation in units of the old entries' RMS.

    Raises:
        UsageError: if a field would shrink, a field that growth does not touch differs, nothing grows, or the
            growth would change the function of a model with these numerics.
    """
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed} must lie in [0, 2^32)")
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(source, field.name), getattr(target, field.name)
        if field.name in GROWING_FIELDS:
            if new < old:
                raise UsageError(
                    f"{field.name}={new} is smaller than the checkpoint's {old}, and growth never shrinks; "
                    f"give {field.name}={old} or more"
                )
        elif new != old:
            raise UsageError(
                f"{field.name}={new} differs from the checkpoint's {old}, and growth changes only "
                f"{', '.join(GROWING_FIELDS)}; give {field.name}={old}"
            )
    if source == target:
        raise UsageError(
            "nothing to grow: the target equals the checkpoint's model ("
            + ", ".join(f"{field}={getattr(source, field)}" for field in GROWING_FIELDS)
            + "); make at least one of them larger"
        )
    _check_numerics(source, target)
    return GrowthPlan(source, target, seed, noise)


def _check_numerics(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse what the operators for untied, unscaled heads and independent cross heads would get wrong."""
    if source.cross_attention_bias:
        raise UsageError(
            f"the model's numerics are {source.numerics} (cross_attention_bias=True), which couples cross-attention's "
            "heads to the decoder's; growth knows models without it: grow one of numerics hf-mt5 or t5-1.0"
        )
    if source.d_model != target.d_model and (source.tie_word_embeddings or source.scale_decoder_outputs):
        raise UsageError(
            f"d_model={target.d_model} differs from the checkpoint's {source.d_model}, and growing it would change "
            f"the logits of numerics {source.numerics} (tie_word_embeddings={source.tie_word_embeddings}, "
            f"scale_decoder_outputs={source.scale_decoder_outputs}); give d_model={source.d_model} and grow "
            f"{', '.join(field for field in GROWING_FIELDS if field != 'd_model')}"
        )


_RULES = {
    "d_model": ("padded, kept entries × √(D/d): RMS and ε stay", "random rows of the readers"),
    "d_ff": ("units added, read with 0", "random columns of wi_0 and wi_1"),
    "num_heads": ("heads added, read with 0", "random query, key, value and bias columns"),
    "d_kv": ("entries added to every head, read with 0", "random key and value columns"),
    "num_encoder_layers": ("copies interposed evenly, writing 0", "copied readers"),
    "num_decoder_layers": ("copies interposed evenly, writing 0", "copied readers"),
}


def _describe(field: str, source: int, target: int, noise: float) -> FieldGrowth:
    rule, breaker = _RULES[field]
    if noise == 0 and "random" in breaker:
        breaker = "none: without noise the new entries stay zero"
    bitwise = field != "d_kv" and (field != "d_model" or _is_power_of_four(target, source))
    return FieldGrowth(field, source, target, rule, "B" if bitwise else "R", breaker)


def _is_power_of_four(target: int, source: int) -> bool:
    """Whether √(target/source) is a power of two, so that scaling by it does not round."""
    ratio, rest = divmod(target, source)
    return rest == 0 and ratio.bit_count() == 1 and ratio.bit_length() % 2 == 1
