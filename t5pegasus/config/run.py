"""Everything that decides what a training run computes."""

import dataclasses

from t5pegasus.config.data import DataConfig
from t5pegasus.config.mesh import MeshConfig
from t5pegasus.config.model import ModelConfig
from t5pegasus.config.optimizer import OptimizerConfig
from t5pegasus.config.record import Record, require
from t5pegasus.config.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class RunConfig(Record):
    """Everything that decides what a training run computes; written as JSON into the run and each checkpoint."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        optimizer, steps = self.optimizer, self.train.steps
        require(
            optimizer.decay_steps == 0 or optimizer.warmup_steps + optimizer.decay_steps <= steps,
            f"optimizer.warmup_steps={optimizer.warmup_steps} and decay_steps={optimizer.decay_steps} do not fit into "
            f"train.steps={steps}; shorten them, or train longer",
        )
        require(
            not (optimizer.accumulate_in_moments and self.train.on_divergence == "skip"),
            "train.on_divergence=skip with optimizer.accumulate_in_moments: the moments of before would have to be "
            "kept until the loss is known, which takes more memory than is saved; choose abort or rollback, or leave "
            "accumulate_in_moments out",
        )
