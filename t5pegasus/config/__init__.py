"""What a run is made of: frozen dataclasses, validated on creation, with a JSON round trip."""

from t5pegasus.config.data import DataConfig
from t5pegasus.config.mesh import MeshConfig
from t5pegasus.config.model import NUMERICS, ModelConfig
from t5pegasus.config.optimizer import OptimizerConfig
from t5pegasus.config.run import RunConfig
from t5pegasus.config.train import TrainConfig

__all__ = ["NUMERICS", "DataConfig", "MeshConfig", "ModelConfig", "OptimizerConfig", "RunConfig", "TrainConfig"]
