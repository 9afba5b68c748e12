"""What every reader of another program's model gives."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5pegasus.config import ModelConfig


class Foreign(NamedTuple):
    """A model read from another program's files, in our terms."""

    model: ModelConfig
    parameters: dict[str, np.ndarray]
    """By dotted name, float32, exactly those that `declare_parameters(model)` lists."""
    vocabulary_path: Path | None
    """A `vocab.txt` or `spiece.model` that lies beside it."""
    assumed: tuple[str, ...] = ()
    """What the files do not say and was taken for true; one sentence each, to be shown to the user."""
