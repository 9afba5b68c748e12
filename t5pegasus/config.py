"""What a run is made of: frozen dataclasses, validated on creation, with a JSON round trip."""

import dataclasses
import difflib
import itertools
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, Literal, Self

from t5pegasus.errors import UsageError, writing

SCHEMA = 1
"""Version of every JSON file this package writes; readers refuse another one by name."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _is_positive_number(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class _JsonRoundTrip:
    """`to_json` / `from_json` for nested frozen dataclasses; an unknown key names the nearest valid one."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # pyright: ignore[reportArgumentType]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        fields = {field.name: field.type for field in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        hints = typing.get_type_hints(cls)
        for key in value:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                raise UsageError(
                    f"{cls.__name__}: unknown field {key!r}"
                    + (f"; perhaps you meant {near[0]!r}" if near else f"; it has {', '.join(fields)}")
                )
        return cls(**{key: _from_json_value(hints[key], item, f"{cls.__name__}.{key}") for key, item in value.items()})


def _from_json_value(hint: Any, value: Any, name: str) -> Any:
    if isinstance(value, dict) and isinstance(hint, type) and issubclass(hint, _JsonRoundTrip):
        return hint.from_json(value)
    if isinstance(value, list) and typing.get_origin(hint) is tuple:
        return tuple(value)
    if isinstance(hint, types.UnionType) and isinstance(value, dict):
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        return _from_json_value(inner, value, name)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        _require(value in options, f"{name}={value!r} must be one of {', '.join(map(str, options))}")
    else:
        _require(_is_of_type(value, hint), f"{name}={value!r} must be of type {getattr(hint, '__name__', hint)}")
    return value


def _is_of_type(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_of_type(value, arm) for arm in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.get_origin(hint) or hint)


@dataclasses.dataclass(frozen=True)
class ModelConfig(_JsonRoundTrip):
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
        _require(
            self.feed_forward_proj in choices,
            f"model.feed_forward_proj={self.feed_forward_proj!r} must be one of {', '.join(choices)}",
        )
        for name in ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_encoder_layers", "num_decoder_layers"):
            _require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        _require(0.0 <= self.dropout_rate < 1.0, f"model.dropout_rate={self.dropout_rate} must lie in [0, 1)")
        _require(
            0.0 < self.layer_norm_epsilon < math.inf,
            f"model.layer_norm_epsilon={self.layer_norm_epsilon} must be a positive number",
        )
        buckets = self.relative_attention_num_buckets
        _require(
            buckets >= 4 and buckets % 4 == 0,
            f"model.relative_attention_num_buckets={buckets} must be a positive multiple of 4 "
            "(half per direction in the encoder, half of those exact)",
        )
        _require(
            self.relative_attention_max_distance > buckets // 2,
            f"model.relative_attention_max_distance={self.relative_attention_max_distance} must exceed "
            f"relative_attention_num_buckets/2={buckets // 2}, the distances that have a bucket of their own",
        )
        self._check_boundaries()
        _require(
            0 <= self.num_masked_tokens < self.vocab_size,
            f"model.num_masked_tokens={self.num_masked_tokens} must lie in [0, vocab_size={self.vocab_size})",
        )
        open_tokens = f"vocab_size={self.vocab_size}"
        if self.num_masked_tokens:
            open_tokens = f"{self.num_open_tokens}, the open part of {open_tokens}"
        for name in ("pad_token_id", "decoder_start_token_id", "eos_token_id"):
            _require(
                0 <= getattr(self, name) < self.num_open_tokens,
                f"model.{name}={getattr(self, name)} must lie in [0, {open_tokens})",
            )

    def _check_boundaries(self) -> None:
        boundaries = self.relative_attention_boundaries
        what = f"model.relative_attention_boundaries={boundaries!r}"
        _require(
            isinstance(boundaries, tuple) and all(_is_of_type(each, int) for each in boundaries),
            f"{what} must be whole numbers",
        )
        if not boundaries:
            return
        _require(
            all(one < next_one for one, next_one in itertools.pairwise(boundaries)),
            f"{what} must be ascending, each of them once",
        )
        clipped = self.first_clipped_distance
        _require(
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


@dataclasses.dataclass(frozen=True)
class DataConfig(_JsonRoundTrip):
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
            _require(getattr(self, name) >= 2, f"data.{name}={getattr(self, name)} must be at least 2")
        _require(0 <= self.seed < 2**32, f"data.seed={self.seed} must lie in [0, 2^32)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_JsonRoundTrip):
    """The optimizer and its learning-rate schedule, both counted in updates."""

    name: Literal["adamw", "sgd", "adafactor"] = "adamw"
    """AdamW (Loshchilov & Hutter 2019); SGD with momentum; or Adafactor (Shazeer & Stern 2018) as T5 and mT5 were
    trained with it, whose state is of the size of the rows and columns of matrices."""
    learning_rate: float = 1e-3
    """With Adafactor and --optimizer.scale-by-parameter, relative to the RMS of each matrix: T5 was pretrained with
    0.01 and less, and fine-tuned with 0.001."""
    schedule: Literal["constant", "cosine", "wsd"] = "wsd"
    """After the linear warm-up: constant; cosine to `final_learning_rate_fraction`; or warm-up, stable,
    then linear decay over the last `decay_steps` (wsd)."""
    warmup_steps: int = 1000
    decay_steps: int = 0
    final_learning_rate_fraction: float = 0.1
    schedule_shift: int = 0
    """Update n takes the learning rate of update n + this one; growth may set it (remapped learning rate)."""
    rewarm_steps: int = 0
    """Above 0, the entries that growth added warm up over so many updates after it, to `rewarm_peak` times the
    learning rate of the others."""
    rewarm_peak: float = 1.3
    beta1: float | None = None
    """Decay of the mean of gradients (momentum); 0 keeps none. None: 0.9 with AdamW and SGD, 0 with Adafactor."""
    beta2: float = 0.98
    """AdamW: decay of the mean of their squares. (Adafactor's is 1 - t^-0.8 at update t.)"""
    epsilon: float = 1e-6
    """AdamW: added to the root of that mean."""
    scale_by_parameter: bool = True
    """Adafactor: updates are multiplied by the RMS of what they update, of each layer by itself."""
    clipping_threshold: float = 1.0
    """Adafactor: the RMS that the update of a matrix has at most, before that multiplication."""
    min_dim_size_to_factor: int = 128
    """Adafactor: matrices with fewer rows or columns keep a second moment of each entry."""
    weight_decay: float = 0.01
    """Decoupled, multiplied by the learning rate; gains are exempt."""
    max_grad_norm: float = 1.0
    layer_decay: float = 1.0
    """Each layer's learning rate is this times that of the layer above it, down to the token embedding."""
    rate_factors: tuple[str, ...] = ()
    """PATTERN=FACTOR: multiplies the learning rate of parameters ('encoder.*=0.5') or of those with an axis
    ('vocab=0.1', 'decoder.layers[-2:]=2'); the factors of all patterns that fit multiply."""
    freeze: tuple[str, ...] = ()
    """Patterns of the same kind ('encoder.*', 'vocab', 'encoder.layers[:6]') for what is not trained: no update, no
    decay, no part in the gradient norm. Moments are kept, at zero, so memory is saved for gradients only."""

    @property
    def momentum(self) -> float:
        """`beta1` as it is in force."""
        return (0.0 if self.name == "adafactor" else 0.9) if self.beta1 is None else self.beta1

    def __post_init__(self) -> None:
        choices = ("adamw", "sgd", "adafactor")
        _require(self.name in choices, f"optimizer.name={self.name!r} must be one of {', '.join(choices)}")
        _require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        for name in ("warmup_steps", "decay_steps", "rewarm_steps"):
            _require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name, value in (("beta1", self.momentum), ("beta2", self.beta2)):
            _require(0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)")
        for name in ("weight_decay", "final_learning_rate_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("epsilon", "max_grad_norm", "rewarm_peak", "clipping_threshold"):
            _require(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)} must be positive")
        _require(
            self.min_dim_size_to_factor >= 1,
            f"optimizer.min_dim_size_to_factor={self.min_dim_size_to_factor} must be at least 1",
        )
        _require(0 < self.layer_decay <= 1, f"optimizer.layer_decay={self.layer_decay} must lie in (0, 1]")
        for each in self.rate_factors:
            _require(
                _is_positive_number(each.rpartition("=")[2]),
                f"optimizer.rate_factors={each!r} is not PATTERN=FACTOR with a positive factor; write 'encoder.*=0.5', "
                "and freeze what is not to be trained",
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig(_JsonRoundTrip):
    """Devices along each mesh axis; -1 takes all that the others leave (one axis at most)."""

    data: int = -1
    """Replicates the parameters, splits the batch."""
    fsdp: int = 1
    """Splits parameters and batch."""
    tensor: int = 1
    """Splits heads, feed-forward units and vocabulary."""

    def __post_init__(self) -> None:
        sizes = (self.data, self.fsdp, self.tensor)
        _require(
            all(size >= 1 or size == -1 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh data={self.data} fsdp={self.fsdp} tensor={self.tensor}: sizes must be positive, one may be -1",
        )

    def resolve(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) whose product is `num_devices`.

        Raises:
            UsageError: if the sizes do not multiply to the number of devices.
        """
        sizes = [self.data, self.fsdp, self.tensor]
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and num_devices % known == 0:
            sizes[sizes.index(-1)] = num_devices // known
        _require(
            math.prod(sizes) == num_devices,
            f"mesh data={self.data} × fsdp={self.fsdp} × tensor={self.tensor} does not use exactly the "
            f"{num_devices} devices there are; set one axis to -1 or choose sizes whose product is {num_devices}",
        )
        return sizes[0], sizes[1], sizes[2]


@dataclasses.dataclass(frozen=True)
class TrainConfig(_JsonRoundTrip):
    """How long to train, in what portions, and what to keep."""

    steps: int = 100_000
    """The run is complete when the state has made this many updates (a grown one goes on counting)."""
    batch_size: int = 256
    """Packed rows per update, over all devices and micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches per update; they give the same update as one batch."""
    z_loss: float = 1e-4
    """Weight of log(Z)², which keeps the logits' normaliser near 1 (Mesh TensorFlow)."""
    label_smoothing: float = 0.0
    """ε of the training target (1 − ε)·token + ε·uniform over the vocabulary; reported losses stay plain NLL."""
    decoder_noise_rate: float = 0.0
    """Probability with which a decoder input is another token than the one before: the decoder learns to read its
    own mistakes (exposure bias). Targets and start tokens stay."""
    decoder_noise_examples: float = 1.0
    """Share of the examples that get this noise, drawn anew in every epoch."""
    decoder_noise_source: Literal["vocabulary", "target"] = "vocabulary"
    """Where the other tokens come from: the vocabulary without pad, start and end, or the same example's target."""
    ema_decay: float = 0.0
    """Above 0, also keep an exponential moving average of the parameters: ema·decay + parameters·(1 − decay) after each
    update. It is what is evaluated, summarized with, converted and fine-tuned from."""
    ema_warmup: bool = True
    """After n updates the decay is (1 + n) / (10 + n) at most, so that short runs do not average their start."""
    seed: int = 0
    """Of initialisation, dropout and decoder noise."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto = bfloat16 on TPU/GPU, float32 on CPU, where it is the faster one."""
    log_every_steps: int = 20
    evaluate_every_steps: int = 1000
    save_every_steps: int = 1000
    keep_checkpoints: int = 3
    """The last ones; the best one by --train.keep-best beside them."""
    keep_best: str | None = None
    """A score of the evaluations (loss, accuracy; in fine-tuning also rouge-l and the others of `t5pegasus evaluate`):
    the checkpoint that is best at it is kept, and is the one meant by the run's name."""
    patience: int = 0
    """With --train.keep-best: stop after so many evaluations without a better one; 0 never does."""
    max_scored_pairs: int = 500
    """Held-out pairs that summaries are written of when --train.keep-best is a score of summaries, the first ones."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "accumulation_steps", "log_every_steps", "evaluate_every_steps",
            "save_every_steps", "keep_checkpoints", "max_scored_pairs",
        ):  # fmt: skip
            _require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        _require(
            self.patience == 0 or (self.patience > 0 and self.keep_best is not None),
            f"train.patience={self.patience} counts evaluations without a better score; it must not be negative, and "
            f"keep_best={self.keep_best} must name the score, e.g. loss",
        )
        _require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative")
        for name in ("label_smoothing", "decoder_noise_rate", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)} must lie in [0, 1)")
        _require(
            0 < self.decoder_noise_examples <= 1,
            f"train.decoder_noise_examples={self.decoder_noise_examples} must lie in (0, 1]; "
            "to switch the noise off set decoder_noise_rate=0",
        )
        _require(
            self.decoder_noise_source in ("vocabulary", "target"),
            f"train.decoder_noise_source={self.decoder_noise_source!r} must be vocabulary or target",
        )
        _require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2^32)")
        _require(
            self.batch_size % self.accumulation_steps == 0,
            f"train.batch_size={self.batch_size} is not a multiple of accumulation_steps={self.accumulation_steps}",
        )


@dataclasses.dataclass(frozen=True)
class RunConfig(_JsonRoundTrip):
    """Everything that decides what a training run computes; written as JSON into the run and each checkpoint."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        optimizer, steps = self.optimizer, self.train.steps
        _require(
            optimizer.decay_steps == 0 or optimizer.warmup_steps + optimizer.decay_steps <= steps,
            f"optimizer.warmup_steps={optimizer.warmup_steps} and decay_steps={optimizer.decay_steps} do not fit into "
            f"train.steps={steps}; shorten them, or train longer",
        )


def check_schema(value: dict[str, Any], path: Path) -> None:
    """Refuse a JSON artifact of another schema version, naming both."""
    if value.get("schema") != SCHEMA:
        raise UsageError(
            f"{path}: schema is {value.get('schema')!r}, this version reads schema {SCHEMA}; "
            "write it anew with this version, or install the version that wrote it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UsageError: if the file is missing, not UTF-8 or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, a JSON file was wanted") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path} is not valid JSON ({error}); correct it, or if it was cut off, write it anew"
        ) from None
    _require(isinstance(value, dict), f"{path} holds a JSON {type(value).__name__}, an object was wanted")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object so that the file is whole or absent: temporary name, flush to disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path), temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
