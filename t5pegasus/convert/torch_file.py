"""Torch's files of tensors (`pytorch_model.bin`), read without torch and without running what they hold.

Since torch 1.6 such a file is a zip archive: `data.pkl`, a pickle whose tensors are strided views of storages, and
`data/KEY`, the bytes of each storage, uncompressed.
"""

import errno
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from t5pegasus.convert.foreign import damaged
from t5pegasus.convert.pickle_data import Global, read_pickle
from t5pegasus.errors import ArtifactError

STORAGES: dict[str, np.dtype] = {
    f"torch.{name}Storage": np.dtype(dtype)
    for name, dtype in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16, "BFloat16": ml_dtypes.bfloat16,
        "Long": np.int64, "Int": np.int32, "Short": np.int16, "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_,
    }.items()
}  # fmt: skip
MAX_PICKLE_BYTES = 1 << 24
MAX_RANK = 32
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OverflowError)
"""What Python's zipfile raises for archives that are damaged, encrypted or of a kind it does not know."""


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    num_elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Like the offset, in elements."""


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name, in the dtype they are stored in; views that share memory may overlap.

    Raises:
        ArtifactError: if the file is missing, damaged, written by a torch before 1.6, no dict of tensors, or names
            anything else than tensors need, which could run code elsewhere.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; copy all files of the model")
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        raise ArtifactError(
            f"{path} is no zip archive, which torch writes since version 1.6; with torch, write it anew: "
            'torch.save(torch.load("pytorch_model.bin", weights_only=True), "pytorch_model.bin")'
        )
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except (*ZIP_ERRORS, ValueError) as error:
        raise damaged(path, str(error) or type(error).__name__) from None
    except OSError as error:
        if error.errno == errno.EINVAL:  # a member before the file's beginning
            raise damaged(path, error) from None
        raise


def _read_archive(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    pickles = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"{len(pickles)} members data.pkl, one was wanted")
    folder = pickles[0].filename.removesuffix("data.pkl")
    members = {info.filename: info for info in archive.infolist()}
    if pickles[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle has {pickles[0].file_size} bytes, which no list of tensors has")
    for info in members.values():
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its member {info.filename} is compressed, which torch never does")
    if sum(info.file_size for info in members.values()) > path.stat().st_size:
        raise ValueError("its members are larger than it is")
    byte_order = f"{folder}byteorder"
    if byte_order in members and archive.read(byte_order) != b"little":
        raise ValueError("its numbers are big-endian, little-endian ones were wanted")

    functions = dict.fromkeys(STORAGES) | {
        "collections.OrderedDict": _empty_dict,
        "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
        "torch._utils._rebuild_parameter": _rebuild_parameter,
    }
    state = read_pickle(archive.read(pickles[0]), functions, _read_storage_id, path)
    if not isinstance(state, dict):
        raise ArtifactError(f"{path} holds a {type(state).__name__}, a dict of tensors by name was wanted")
    storages: dict[str, bytes] = {}
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ArtifactError(
                f"{path}: {str(name)[:200]} is a {type(value).__name__}, a tensor was wanted; "
                "save the model alone, with torch.save(model.state_dict(), …)"
            )
        key = value.storage.key
        if key not in storages:
            if f"{folder}data/{key}" not in members:
                raise ValueError(f"it lacks the numbers of {name}")
            storages[key] = archive.read(f"{folder}data/{key}")
        tensors[name] = _view(name, value, storages[key])
    return tensors


def _empty_dict(arguments: tuple) -> dict:
    if arguments:
        raise ValueError("its pickle makes a dict of something")
    return {}


def _rebuild_parameter(arguments: tuple) -> _Tensor:
    if not arguments or not isinstance(arguments[0], _Tensor):
        raise ValueError("its pickle makes a parameter of something else than a tensor")
    return arguments[0]


def _rebuild_tensor(arguments: tuple) -> _Tensor:
    if len(arguments) not in (6, 7):
        raise ValueError("its pickle makes a tensor of too few or too many things")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, _Storage) or not _is_sizes((offset,)) or not _is_sizes(shape) or not _is_sizes(strides):
        raise ValueError("its pickle makes a tensor without sizes")
    return _Tensor(storage, offset, shape, strides)


def _read_storage_id(value: Any) -> _Storage:
    if not isinstance(value, tuple) or len(value) != 5 or value[0] != "storage":
        raise ValueError("its pickle refers to something else than a storage")
    _, kind, key, _, num_elements = value
    if not isinstance(kind, Global) or kind.name not in STORAGES or not isinstance(key, str):
        raise ValueError("its pickle refers to a storage without a type or key")
    if not _is_sizes((num_elements,)):
        raise ValueError("its pickle refers to a storage without a size")
    return _Storage(key, STORAGES[kind.name], num_elements)


def _is_sizes(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_RANK
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
    )


def _view(name: str, tensor: _Tensor, content: bytes) -> np.ndarray:
    """The tensor as a strided view; nothing outside of the storage can be reached through it."""
    dtype, num_elements = tensor.storage.dtype, tensor.storage.num_elements
    if len(content) != num_elements * dtype.itemsize:
        raise ValueError(f"{name} lies in {len(content)} bytes, {num_elements} numbers of {dtype} were wanted there")
    if len(tensor.shape) != len(tensor.strides):
        raise ValueError(f"{name} has {len(tensor.shape)} sizes and {len(tensor.strides)} strides")
    flat = np.frombuffer(content, dtype)
    if math.prod(tensor.shape) == 0:
        return np.zeros(tensor.shape, dtype)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    # The second: a tensor repeated along a stride of zero would be larger than all that is stored.
    if last >= num_elements or math.prod(tensor.shape) > num_elements:
        raise ValueError(f"{name} of shape {tensor.shape} reaches beyond its {num_elements} stored numbers")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
