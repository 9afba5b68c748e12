"""All tensors of a Hugging Face folder by torch's names, whichever framework wrote them, without torch.

Taken is the first that is there of safetensors, torch's files and Flax's msgpack, each in one file or in shards.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from t5pegasus.convert.flax_msgpack import flatten_arrays, read_tree
from t5pegasus.convert.foreign import damaged
from t5pegasus.convert.torch_file import read_torch
from t5pegasus.errors import ArtifactError
from t5pegasus.json_files import read_json

INDEX_SUFFIX = ".index.json"
"""Behind the name of the whole file: where a sharded model lists which shard holds what."""


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Read every tensor of a folder, in the dtype it is stored in.

    Raises:
        UsageError: if an index of shards is no JSON.
        ArtifactError: if no file is there, a shard is missing, a file is damaged, or an index and its shards disagree.
    """
    for name, read in READERS.items():
        if (folder / name).is_file():
            tensors = read(folder / name)
        elif (folder / (name + INDEX_SUFFIX)).is_file():
            tensors = _read_shards(folder / (name + INDEX_SUFFIX), read)
        else:
            continue
        return _name_like_torch(tensors) if read is _read_flax else tensors
    others = [name for name in ("tf_model.h5", "rust_model.ot") if (folder / name).is_file()]
    raise ArtifactError(
        f"{folder} has none of {', '.join(READERS)} nor an {INDEX_SUFFIX[1:]} of one"
        + (f"; {others[0]} is not read here" if others else "")
        + "; save the model as safetensors (transformers: model.save_pretrained(FOLDER))"
    )


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, AttributeError, TypeError, ValueError) as error:  # the last three: types without an array
        raise damaged(path, error) from None


def _read_flax(path: Path) -> dict[str, np.ndarray]:
    """Names are joined by `/`, as in Flax's own index of shards."""
    return flatten_arrays(read_tree(path), path)


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    "model.safetensors": _read_safetensors,
    "pytorch_model.bin": read_torch,
    "flax_model.msgpack": _read_flax,
}
"""Names of whole files in the order of preference; what cannot run code comes first, what has float32 only last."""


def _read_shards(index_path: Path, read: Callable[[Path], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The tensors of all shards that an index names."""
    shard_of = read_json(index_path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise ArtifactError(f"{index_path} has no weight_map from tensors to files; copy it anew")
    shards = {shard: index_path.parent / shard for shard in sorted(set(shard_of.values()))}
    for shard, path in shards.items():
        if Path(shard).name != shard or "\\" in shard:
            raise ArtifactError(f"{index_path} names the shard {shard[:200]!r}; a file beside it was wanted")
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist, and {index_path.name} names it; copy all shards of the model")
    tensors: dict[str, np.ndarray] = {}
    for shard, path in shards.items():
        wanted = {name for name in shard_of if shard_of[name] == shard}
        held = read(path)
        if wanted != held.keys():
            name = min(wanted ^ held.keys())
            does = ("names", "does not hold") if name in wanted else ("does not name", "holds")
            raise ArtifactError(
                f"{index_path.name} {does[0]} tensor {name}, {path} {does[1]} it; index and shards are of different "
                "models: copy them anew from one place"
            )
        tensors |= held
    return tensors


def _name_like_torch(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Flax's `a/b/kernel` [in, out] → torch's `a.b.weight` [out, in]; embeddings and norms have the same layout."""
    tensors = {}
    for name, array in arrays.items():
        prefix, _, last = name.rpartition("/")
        tensors[f"{prefix}.weight".replace("/", ".")] = array.T if last == "kernel" else array
    return tensors
