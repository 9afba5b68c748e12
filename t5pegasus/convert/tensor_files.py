"""All tensors of a Hugging Face folder, by their names there, without torch."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from t5pegasus.errors import ArtifactError

WEIGHTS = "model.safetensors"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a folder, in the dtype it is stored in.

    Raises:
        ArtifactError: if the file is missing or damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise ArtifactError(
            f"{path} does not exist; save the model as one {WEIGHTS} "
            '(transformers: save_pretrained(…, safe_serialization=True, max_shard_size="1TB"))'
        )
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except SafetensorError as error:
        raise ArtifactError(f"{path} is damaged ({error}); copy it anew from where it is whole") from None
