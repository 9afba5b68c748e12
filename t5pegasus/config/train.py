"""How long to train, in what portions, and what to keep."""

import dataclasses
from typing import Literal

from t5pegasus.config.record import Record, require


@dataclasses.dataclass(frozen=True)
class TrainConfig(Record):
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
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        require(
            self.patience == 0 or (self.patience > 0 and self.keep_best is not None),
            f"train.patience={self.patience} counts evaluations without a better score; it must not be negative, and "
            f"keep_best={self.keep_best} must name the score, e.g. loss",
        )
        require(self.z_loss >= 0, f"train.z_loss={self.z_loss} must not be negative")
        for name in ("label_smoothing", "decoder_noise_rate", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)} must lie in [0, 1)")
        require(
            0 < self.decoder_noise_examples <= 1,
            f"train.decoder_noise_examples={self.decoder_noise_examples} must lie in (0, 1]; "
            "to switch the noise off set decoder_noise_rate=0",
        )
        require(
            self.decoder_noise_source in ("vocabulary", "target"),
            f"train.decoder_noise_source={self.decoder_noise_source!r} must be vocabulary or target",
        )
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2^32)")
        require(
            self.batch_size % self.accumulation_steps == 0,
            f"train.batch_size={self.batch_size} is not a multiple of accumulation_steps={self.accumulation_steps}",
        )
