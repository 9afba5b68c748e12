"""How long to train, in what portions, and what to keep."""

import dataclasses
import re
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
    remat: Literal["none", "dots", "full", "offload"] = "none"
    """What the backward pass computes anew to save memory: nothing; all but products with weights; all but the layers'
    inputs; the same with these inputs kept in the host's memory."""
    scan_unroll: int = 1
    """Layers per iteration of the loop over layers."""
    attention: Literal["auto", "plain", "cudnn"] = "auto"
    """Kernel of attention: auto takes cuDNN's on a GPU in bfloat16, where head size and lengths admit it."""
    vocab_chunk: int = 0
    """Vocabulary entries, per device, whose logits are there at once; from vocab_size on all of them. 0 chooses: all
    where that takes little memory and the head is not split over fsdp."""
    split_length: bool = True
    """With mesh.tensor, split activations between blocks by length, which shares out norms and their memory."""
    on_divergence: Literal["abort", "skip", "rollback"] = "abort"
    """What to do with an update whose loss, gradient or change of the parameters is not finite, or a spike: abort with
    exit code 45, skip it (the state stays, its rows count as consumed), or go back to the last checkpoint and on
    behind its rows."""
    spike_factor: float = 0.0
    """Above 0, a loss or gradient norm above mean + spike_factor · σ of the last `spike_window` updates is a spike; 6
    is usual. 0 does not look for spikes."""
    spike_window: int = 128
    max_skips: int = 16
    """Updates skipped in a row; one more ends the run with exit code 45."""
    max_rollbacks: int = 10
    """Of the whole run; one more ends it with exit code 45."""
    log_every_steps: int = 20
    evaluate_every_steps: int = 1000
    save_every_steps: int = 1000
    sample_every_steps: int = 0
    """Above 0, write summaries of a few held-out sources into the metrics at these steps and the last."""
    num_samples: int = 4
    """Held-out sources to write them of, the first ones."""
    profile_steps: str = ""
    """FIRST:LAST traces these updates with jax.profiler into RUN/profile, e.g. 100:105; SIGUSR2 the next five."""
    wandb_project: str = ""
    """Also log to this project of Weights & Biases (extra `wandb`); WANDB_MODE=offline needs no network."""
    save_every_seconds: float = 0.0
    """Save also when so much time has passed since the last save, by the first process's clock; 0: never."""
    keep_checkpoints: int = 3
    """The last ones; the best one by --train.keep-best beside them."""
    keep_every_steps: int = 0
    """Keep also each checkpoint whose step is a multiple of this, for ever; 0: none."""
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
            "save_every_steps", "keep_checkpoints", "max_scored_pairs", "num_samples",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        require(
            self.patience == 0 or (self.patience > 0 and self.keep_best is not None),
            f"train.patience={self.patience} counts evaluations without a better score; it must not be negative, and "
            f"keep_best={self.keep_best} must name the score, e.g. loss",
        )
        for name, choices in (
            ("remat", ("none", "dots", "full", "offload")),
            ("attention", ("auto", "plain", "cudnn")),
        ):
            require(
                getattr(self, name) in choices,
                f"train.{name}={getattr(self, name)!r} must be one of {', '.join(choices)}",
            )
        require(self.scan_unroll >= 1, f"train.scan_unroll={self.scan_unroll} must be at least 1")
        require(self.vocab_chunk >= 0, f"train.vocab_chunk={self.vocab_chunk} must not be negative")
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
        require(
            self.on_divergence in ("abort", "skip", "rollback"),
            f"train.on_divergence={self.on_divergence!r} must be abort, skip or rollback",
        )
        for name in (
            "spike_factor", "max_skips", "max_rollbacks", "sample_every_steps", "save_every_seconds",
            "keep_every_steps",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")
        require(self.spike_window >= 2, f"train.spike_window={self.spike_window} must be at least 2")
        self.profile_range()
        require(0 <= self.seed < 2**32, f"train.seed={self.seed} must lie in [0, 2^32)")
        lower = self.batch_size - self.batch_size % self.accumulation_steps
        nearest = [str(size) for size in (lower, lower + self.accumulation_steps) if size]
        require(
            self.batch_size == lower,
            f"train.batch_size={self.batch_size} is not a multiple of accumulation_steps={self.accumulation_steps}; "
            f"nearest: {' or '.join(nearest)}",
        )

    def profile_range(self) -> tuple[int, int] | None:
        """The first and the last update to trace, None for none.

        Raises:
            UsageError: if `profile_steps` is no range.
        """
        if not self.profile_steps:
            return None
        found = re.fullmatch(r"(\d+):(\d+)", self.profile_steps)
        first, last = (int(found[1]), int(found[2])) if found else (0, -1)
        require(
            1 <= first <= last,
            f"train.profile_steps={self.profile_steps!r} must be FIRST:LAST, two updates counted from 1, of which the "
            "last is not before the first, e.g. 100:105",
        )
        return first, last
