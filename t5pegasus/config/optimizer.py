"""The optimizer and its learning-rate schedule."""

import dataclasses
import itertools
from typing import Literal, get_args

from t5pegasus.config.record import Record, is_positive_number, require

Name = Literal["adamw", "adamw-scaled", "adafactor", "muon", "sgd", "lion"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Record):
    """The optimizer and its learning-rate schedule, both counted in updates."""

    name: Name = "adamw"
    """AdamW (Loshchilov & Hutter 2019), or the same scaled by the RMS of each matrix (nanoT5); Adafactor (Shazeer &
    Stern 2018) as T5 and mT5 were trained with it, whose state is of the size of the rows and columns of matrices;
    Muon (Jordan et al. 2024), with AdamW for all that is not a matrix of a layer; SGD with momentum; or Lion (Chen et
    al. 2023)."""
    learning_rate: float = 1e-3
    """With adamw-scaled, and with Adafactor and --optimizer.scale-by-parameter, relative to the RMS of each matrix: T5
    was pretrained with 0.01 and less, and fine-tuned with 0.001; nanoT5 was trained with 0.02. Muon takes that of
    AdamW, Lion a third to a tenth of it with 3 to 10 times the decay."""
    schedule: Literal["constant", "cosine", "wsd", "piecewise"] = "wsd"
    """After the linear warm-up: constant; cosine to `final_learning_rate_fraction`; or warm-up, stable,
    then linear decay over the last `decay_steps` (wsd). Or piecewise, linear between the `schedule_points`, which
    have a warm-up of their own."""
    schedule_points: tuple[str, ...] = ()
    """UPDATE=FACTOR, with piecewise: what multiplies the learning rate at an update, counted from 1 ('1000=1'
    '50000=0.1'). It rises from 0 to the first point, and is constant behind the last."""
    warmup_steps: int = 1000
    decay_steps: int = 0
    """With wsd: the last so many updates, over which it decays; 0 never does."""
    final_learning_rate_fraction: float = 0.1
    schedule_shift: int = 0
    """Update n takes the learning rate of update n + this one; growth may set it (remapped learning rate)."""
    rewarm_steps: int = 0
    """Above 0, the entries that growth added warm up over so many updates after it, to `rewarm_peak` times the
    learning rate of the others."""
    rewarm_peak: float = 1.3
    beta1: float | None = None
    """Decay of the mean of gradients (momentum); 0 keeps none. Lion: weight of the mean in the update. None: 0.9 with
    AdamW (in Muon, too) and SGD, 0.95 with Lion, 0 with Adafactor."""
    beta2: float = 0.98
    """AdamW: decay of the mean of their squares. (Adafactor's is 1 - t^-0.8 at update t.) Lion: decay of the mean."""
    epsilon: float = 1e-6
    """AdamW: added to the root of that mean."""
    scale_by_parameter: bool = True
    """Adafactor: updates are multiplied by the RMS of what they update, of each layer by itself."""
    clipping_threshold: float = 1.0
    """Adafactor: the RMS that the update of a matrix has at most, before that multiplication."""
    min_dim_size_to_factor: int = 128
    """Adafactor: matrices with fewer rows or columns keep a second moment of each entry."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 halves the memory of the moments (not of Adafactor's rows and columns, which are small); they are read
    as float32 and rounded stochastically when they are written."""
    muon_momentum: float = 0.95
    """Muon: decay of the mean of gradients that is made orthogonal; what AdamW trains has `beta1`."""
    muon_adamw_rate: float = 1.0
    """Muon: multiplies the learning rate of what AdamW trains: embedding, head, relative bias and gains."""
    weight_decay: float = 0.01
    """Decoupled, multiplied by the learning rate; gains are exempt."""
    max_grad_norm: float = 1.0
    accumulate_in_moments: bool = False
    """With --train.accumulation-steps: add micro-batches up in the moments instead of in a gradient of the whole
    model; for adamw, adamw-scaled and sgd with beta1. Each micro-batch's gradient is clipped by itself, and AdamW's
    second moment is the mean of their squares (docs/optimizers.md)."""
    gradient_transforms: tuple[str, ...] = ()
    """PATTERN=scale:X, PATTERN=clip:X or PATTERN=l1:X, done one after the other before all gradients are clipped
    together: multiply those of a group by X, clip their norm to X, or add X·sign(parameter). Patterns are those of
    `rate_factors` ('vocab=clip:0.3', 'decoder.layers[-2:]=scale:0.5')."""
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
        return {"adafactor": 0.0, "lion": 0.95}.get(self.name, 0.9) if self.beta1 is None else self.beta1

    def split_schedule_points(self) -> list[tuple[int, float]]:
        """(update, factor) of each point, beginning with (0, 0) unless the first is of update 0.

        Raises:
            UsageError: if one of them is not UPDATE=FACTOR, or they are not in order.
        """
        points = []
        for each in self.schedule_points:
            update, _, factor = each.partition("=")
            require(
                update.isdecimal() and (is_positive_number(factor) or factor == "0"),
                f"optimizer.schedule_points={each!r} is not UPDATE=FACTOR, e.g. 1000=1",
            )
            points.append((int(update), float(factor)))
        updates = [update for update, _ in points]
        require(
            all(before < after for before, after in itertools.pairwise(updates)),
            f"optimizer.schedule_points has updates {', '.join(map(str, updates))}; give them in rising order",
        )
        return points if updates[:1] == [0] else [(0, 0.0), *points]

    def split_gradient_transforms(self) -> list[tuple[str, str, float]]:
        """(pattern, kind, number) of each transform.

        Raises:
            UsageError: if one of them is not PATTERN=KIND:NUMBER.
        """
        transforms = []
        for each in self.gradient_transforms:
            pattern, _, what = each.rpartition("=")
            kind, _, number = what.partition(":")
            require(
                bool(pattern) and kind in ("scale", "clip", "l1") and is_positive_number(number),
                f"optimizer.gradient_transforms={each!r} is not PATTERN=scale:X, PATTERN=clip:X or PATTERN=l1:X with a "
                "positive number; write 'vocab=clip:0.3', and freeze what is not to be trained",
            )
            transforms.append((pattern, kind, float(number)))
        return transforms

    def refuse_idle_fields(self) -> None:
        """Refuse what a new run would set in vain; configs of earlier runs may hold it, so reading one does not.

        Raises:
            UsageError: naming the field.
        """
        require(
            self.schedule == "wsd" or self.decay_steps == 0,
            f"optimizer.decay_steps={self.decay_steps} has no effect with schedule={self.schedule}, wsd was wanted; "
            "set --optimizer.schedule wsd, or --optimizer.decay-steps 0",
        )

    def __post_init__(self) -> None:
        require(self.name in NAMES, f"optimizer.name={self.name!r} must be one of {', '.join(NAMES)}")
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate} must be positive")
        dtypes = ("float32", "bfloat16")
        require(
            self.moment_dtype in dtypes,
            f"optimizer.moment_dtype={self.moment_dtype!r} must be one of {', '.join(dtypes)}",
        )
        for name in ("warmup_steps", "decay_steps", "rewarm_steps"):
            require(getattr(self, name) >= 0, f"optimizer.{name}={getattr(self, name)} must not be negative")
        for name, value in (("beta1", self.momentum), ("beta2", self.beta2), ("muon_momentum", self.muon_momentum)):
            require(0 <= value < 1, f"optimizer.{name}={value} must lie in [0, 1)")
        for name in ("weight_decay", "final_learning_rate_fraction"):
            require(0 <= getattr(self, name) <= 1, f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]")
        for name in ("epsilon", "max_grad_norm", "rewarm_peak", "clipping_threshold", "muon_adamw_rate"):
            require(getattr(self, name) > 0, f"optimizer.{name}={getattr(self, name)} must be positive")
        require(
            self.min_dim_size_to_factor >= 1,
            f"optimizer.min_dim_size_to_factor={self.min_dim_size_to_factor} must be at least 1",
        )
        require(
            (self.schedule == "piecewise") == bool(self.schedule_points),
            f"optimizer.schedule={self.schedule} with schedule_points={list(self.schedule_points)}: points belong to "
            "piecewise, and it needs some; give both or neither",
        )
        self.split_schedule_points()
        self.split_gradient_transforms()
        require(
            not self.accumulate_in_moments or (self.name in ("adamw", "adamw-scaled", "sgd") and self.momentum > 0),
            f"optimizer.accumulate_in_moments with name={self.name}, beta1={self.momentum}: only adamw, adamw-scaled "
            "and sgd with beta1 above 0 find their update from moments alone; choose one of them, or leave it out",
        )
        require(0 < self.layer_decay <= 1, f"optimizer.layer_decay={self.layer_decay} must lie in (0, 1]")
        for each in self.rate_factors:
            require(
                is_positive_number(each.rpartition("=")[2]),
                f"optimizer.rate_factors={each!r} is not PATTERN=FACTOR with a positive factor; write 'encoder.*=0.5', "
                "and freeze what is not to be trained",
            )
