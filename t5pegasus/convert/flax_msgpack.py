"""Flax's msgpack files: trees of dicts with arrays as leaves, nothing executed (flax.serialization).

Extension type 1 is an array and 3 a scalar, both msgpack of (shape, dtype name, bytes); an array above 1 GiB is a dict
with the key `__msgpack_chunked_array__`, its shape and its flat pieces.
"""

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

from t5pegasus.convert.foreign import damaged
from t5pegasus.errors import ArtifactError

ARRAY, SCALAR = 1, 3
CHUNKED = "__msgpack_chunked_array__"
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name) for name in ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
} | {name: np.dtype(name) for name in ("float16", "float32", "float64")}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)
MAX_SEQUENCE = 1 << 16
"""Shapes are the only sequences there are."""
MAX_ENTRIES = 1 << 22
MAX_RANK = 32
MAX_DEPTH = 64


def read_tree(path: Path) -> dict[str, Any]:
    """The tree in a file; leaves are arrays, or plain msgpack values where the writer had some.

    Raises:
        ArtifactError: if it is damaged, no msgpack of a dict, or an array of a type not read here.
    """
    try:
        tree = msgpack.unpackb(
            path.read_bytes(),
            ext_hook=_read_extension,
            max_array_len=MAX_SEQUENCE,
            max_map_len=MAX_ENTRIES,
        )
        tree = _join_chunks(tree, 0)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise damaged(path, str(error) or type(error).__name__) from None
    if not isinstance(tree, dict):
        raise ArtifactError(f"{path} holds a msgpack {type(tree).__name__}, a dict of arrays was wanted")
    return tree


def flatten_arrays(tree: dict[str, Any], path: Path) -> dict[str, np.ndarray]:
    """The arrays of a tree by their keys joined with `/`.

    Raises:
        ArtifactError: naming a leaf that is no array.
    """
    arrays: dict[str, np.ndarray] = {}

    def visit(node: Any, name: str) -> None:
        if isinstance(node, np.ndarray):
            arrays[name] = node
        elif isinstance(node, dict):
            for key, child in node.items():
                visit(child, f"{name}/{key}" if name else key)
        else:
            raise ArtifactError(f"{path}: {name} holds a {type(node).__name__}, an array was wanted")

    visit(tree, "")
    return arrays


def _read_extension(code: int, data: bytes) -> np.ndarray:
    if code not in (ARRAY, SCALAR):
        raise ValueError(f"msgpack extension type {code}; only Flax's arrays, type {ARRAY}, are read")
    content = msgpack.unpackb(data, max_array_len=MAX_SEQUENCE)
    if not (isinstance(content, list) and len(content) == 3 and isinstance(content[2], bytes)):
        raise ValueError("an array is not (shape, dtype, bytes)")
    shape, name, values = content
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"an array is of {str(name)[:40]!r}, which is no number type known here")
    shape = _check_shape(shape)
    if math.prod(shape) * DTYPES[name].itemsize != len(values):
        raise ValueError(f"an array of shape {shape} and {name} has {len(values)} bytes")
    return np.frombuffer(values, DTYPES[name]).reshape(shape)


def _check_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise ValueError("an array has no shape")
    if not all(type(size) is int and 0 <= size < 1 << 62 for size in shape):
        raise ValueError("an array's shape holds something else than sizes")
    return tuple(shape)


def _join_chunks(node: Any, depth: int) -> Any:
    if not isinstance(node, dict):
        return node
    if depth > MAX_DEPTH or not all(isinstance(key, str) for key in node):
        raise ValueError("a dict lies too deep, or has keys that are no names")
    if CHUNKED not in node:
        return {key: _join_chunks(child, depth + 1) for key, child in node.items()}
    shape, chunks = (
        [node[part][str(index)] for index in range(len(node[part]))]
        if isinstance(node.get(part), dict) and set(node[part]) == set(map(str, range(len(node[part]))))
        else None
        for part in ("shape", "chunks")
    )
    if not chunks or not all(isinstance(chunk, np.ndarray) and chunk.ndim == 1 for chunk in chunks):
        raise ValueError("a chunked array has no flat pieces")
    shape = _check_shape(shape)
    if math.prod(shape) != sum(map(len, chunks)):
        raise ValueError(f"a chunked array's pieces do not fill its shape {shape}")
    return np.concatenate(chunks).reshape(shape)
