"""TensorFlow checkpoints (`PREFIX.index` and `PREFIX.data-SSSSS-of-NNNNN`), read without TensorFlow.

The index is a LevelDB table from names to `BundleEntryProto`; the data files hold the raw arrays
(tensorflow/core/protobuf/tensor_bundle.proto). Checksums of blocks and of tensors are verified.
"""

import math
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from t5pegasus.convert.crc32c import masked_crc32c
from t5pegasus.convert.foreign import damaged
from t5pegasus.convert.sstable import read_fields, read_table
from t5pegasus.errors import ArtifactError

DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.float32),
    2: np.dtype(np.float64),
    3: np.dtype(np.int32),
    4: np.dtype(np.uint8),
    5: np.dtype(np.int16),
    6: np.dtype(np.int8),
    9: np.dtype(np.int64),
    10: np.dtype(np.bool_),
    14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype(np.float16),
}
"""By the number in TensorFlow's DataType."""
MAX_INDEX_BYTES = 1 << 24


class _Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    sliced: bool


class TensorBundle:
    """One checkpoint: what it holds, and its arrays on demand.

    Args:
        prefix: path without `.index`.

    Raises:
        ArtifactError: if the index is missing or damaged, or in an order of bytes or with a compression not read here.
    """

    def __init__(self, prefix: Path):
        self._prefix = prefix
        self._index_path = prefix.with_name(prefix.name + ".index")
        if not self._index_path.is_file():
            raise ArtifactError(
                f"{self._index_path} does not exist; a TensorFlow checkpoint has it and its .data files"
            )
        if self._index_path.stat().st_size > MAX_INDEX_BYTES:
            raise damaged(self._index_path, f"more than {MAX_INDEX_BYTES} bytes, which no list of names has")
        try:
            table = read_table(self._index_path.read_bytes())
            header = read_fields(table.pop(b"", b""))
            self._entries = {key.decode("utf-8"): _parse_entry(value) for key, value in table.items()}
            self._num_shards = _integer(header, 1)
            if _integer(header, 2):
                raise ValueError("its arrays are big-endian, little-endian ones were wanted")
        except ValueError as error:
            raise damaged(self._index_path, error) from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by its name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def dtype_name(self, name: str) -> str:
        """What a tensor is stored in, in NumPy's words; TensorFlow's number of a type not read here."""
        number = self._entries[name].dtype
        return DTYPES[number].name if number in DTYPES else f"DataType {number}"

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the dtype it is stored in.

        Raises:
            KeyError: if there is none of that name.
            ArtifactError: if its data file is missing, cut or damaged, or it is of a type without an array.
        """
        entry = self._entries[name]
        path = self._prefix.with_name(f"{self._prefix.name}.data-{entry.shard:05}-of-{self._num_shards:05}")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None or entry.sliced:
            what = "is a partitioned variable" if entry.sliced else f"has TensorFlow's data type {entry.dtype}"
            raise ArtifactError(
                f"{self._index_path}: tensor {name} {what}, which is not read here; save it as a plain one"
            )
        if entry.size != math.prod(entry.shape) * dtype.itemsize:
            raise damaged(
                self._index_path, f"{name} has {entry.size} bytes, shape {entry.shape} of {dtype} was to be held"
            )
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist, and tensor {name} lies in it; copy the whole checkpoint")
        if entry.offset + entry.size > path.stat().st_size:
            raise damaged(path, f"{path.stat().st_size} bytes, {entry.offset + entry.size} were wanted for {name}")
        content = np.fromfile(path, np.uint8, entry.size, offset=entry.offset)
        if masked_crc32c(content) != entry.checksum:
            raise damaged(path, f"tensor {name} does not have its checksum")
        try:
            return content.view(dtype).reshape(entry.shape)
        except ValueError as error:
            raise damaged(self._index_path, f"{name} cannot have shape {entry.shape}: {error}") from None


def _parse_entry(value: bytes) -> _Entry:
    fields = read_fields(value)
    dimensions = [
        read_fields(_message(dimension))
        for shape in fields.get(2, [])
        for dimension in read_fields(_message(shape)).get(2, [])
    ]
    return _Entry(
        dtype=_integer(fields, 1),
        shape=tuple(_integer(dimension, 1) for dimension in dimensions),
        shard=_integer(fields, 3),
        offset=_integer(fields, 4),
        size=_integer(fields, 5),
        checksum=_integer(fields, 6),
        sliced=7 in fields,
    )


def _integer(fields: dict[int, list[int | bytes]], number: int) -> int:
    """A field's value, 0 where it is absent, as protocol buffers leave it out."""
    value = fields.get(number, [0])[-1]
    if not isinstance(value, int) or value >= 1 << 63:
        raise ValueError(f"field {number} is no number of that kind")
    return value


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a message was wanted")
    return value
