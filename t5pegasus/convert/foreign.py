"""What every reader of another program's model gives."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError


class Foreign(NamedTuple):
    """A model read from another program's files, in our terms."""

    model: ModelConfig
    parameters: dict[str, np.ndarray]
    """By dotted name, float32, exactly those that `declare_parameters(model)` lists."""
    vocabulary_path: Path | None
    """A `vocab.txt` or `spiece.model` that lies beside it."""
    assumed: tuple[str, ...] = ()
    """What the files do not say and was taken for true; one sentence each, to be shown to the user."""
    stored_dtype: str = "float32"
    """In what the files hold the weights; several names if they differ."""


def damaged(path: Path, what: object) -> ArtifactError:
    """The error of a file that is cut, changed, or does not say what its format demands."""
    return ArtifactError(f"{path} is damaged ({what}); copy it anew from where it is whole")
