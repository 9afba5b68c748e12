"""Which program's model lies at a path, and its reader."""

from pathlib import Path

from t5pegasus.convert.bert4keras import HDF5_SUFFIXES, is_bert4keras_folder, read_bert4keras
from t5pegasus.convert.foreign import Foreign
from t5pegasus.convert.hf import is_hf_folder, read_hf
from t5pegasus.convert.t5x import is_t5x, read_t5x
from t5pegasus.errors import UsageError


def is_foreign(path: Path) -> bool:
    """Whether a path is another program's model; what is not may be a checkpoint or run of ours.

    Raises:
        UsageError: if it is a file that belongs to such a model, and the folder was meant; or Keras weights alone.
    """
    if path.is_file():
        if path.suffix in HDF5_SUFFIXES:
            raise UsageError(
                f"{path} holds Keras weights in HDF5; load them in bert4keras (build_transformer_model, load_weights), "
                "call save_weights_as_checkpoint('model.ckpt'), and give the folder with config.json and vocab.txt"
            )
        if path.suffix in (".index", ".bin", ".safetensors") or ".data-" in path.name:
            raise UsageError(f"{path} is one file of a model; give its folder {path.parent}, with config.json")
    return is_hf_folder(path) or is_bert4keras_folder(path) or is_t5x(path)


def describe_kind(path: Path) -> str:
    """What a foreign path is, in words."""
    if is_hf_folder(path):
        return "Hugging Face folder"
    return "bert4keras folder" if is_bert4keras_folder(path) else "T5X checkpoint"


def open_source(path: Path, numerics: str | None = None) -> tuple[Foreign, Path]:
    """Read another program's model; also the file that states its ids and sizes, for messages.

    Args:
        path: a Hugging Face or bert4keras folder, or a T5X file or folder, see `is_foreign`.
        numerics: a name of `NUMERICS` for Hugging Face folders whose config is not that of their training.

    Raises:
        UsageError: if it is none of these, or our model would compute something else.
        ArtifactError: if files or tensors are missing or damaged.
    """
    if is_hf_folder(path):
        return read_hf(path, numerics), path / "config.json"
    if numerics is not None:
        raise UsageError(f"--numerics is for Hugging Face folders; {path} says itself what it computes: leave it out")
    if is_bert4keras_folder(path):
        return read_bert4keras(path), path / "vocab.txt"
    if is_t5x(path):
        return read_t5x(path), path
    raise UsageError(
        f"{path} is no model that can be converted; a Hugging Face folder (config.json with a model_type, weights), a "
        "bert4keras folder (config.json, model.ckpt.*, vocab.txt), or a T5X checkpoint was wanted"
    )
