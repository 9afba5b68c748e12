"""Writes TensorFlow checkpoints by the published formats, sharing no code with their reader."""

import struct
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

TENSORFLOW_DTYPES = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "int64": 9, "bool": 10,
    "bfloat16": 14, "float16": 19,
}  # fmt: skip
assert np.dtype(ml_dtypes.bfloat16).name == "bfloat16"

_CRC_TABLE = []
for _byte in range(256):
    _crc = _byte
    for _ in range(8):
        _crc = _crc >> 1 ^ (0x82F63B78 if _crc & 1 else 0)
    _CRC_TABLE.append(_crc)


def crc32c_by_bytes(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state = _CRC_TABLE[(state ^ byte) & 0xFF] ^ state >> 8
    return state ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def field(number: int, value: int | bytes) -> bytes:
    """One protocol-buffer field; zero is left out as proto3 does."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value) if value else b""


def entry(array: np.ndarray, shard: int, offset: int, content: bytes) -> bytes:
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    return (
        field(1, TENSORFLOW_DTYPES[array.dtype.name])
        + field(2, shape)
        + field(3, shard)
        + field(4, offset)
        + field(5, len(content))
        + b"\x35"
        + struct.pack("<I", masked(crc32c_by_bytes(content)))
    )


def block(entries: Iterable[tuple[bytes, bytes]], restart_every: int = 16, compression: int = 0) -> bytes:
    """A block of a LevelDB table with its trailer."""
    out, restarts, last = bytearray(), [], b""
    for index, (key, value) in enumerate(entries):
        shared = 0
        if index % restart_every == 0:
            restarts.append(len(out))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    out += b"".join(struct.pack("<I", place) for place in restarts or [0]) + struct.pack("<I", len(restarts) or 1)
    out.append(compression)
    return bytes(out) + struct.pack("<I", masked(crc32c_by_bytes(bytes(out))))


def table(entries: list[tuple[bytes, bytes]], per_block: int = 5, compression: int = 0) -> bytes:
    """A LevelDB table; `entries` are written in the order given."""
    out, index = bytearray(), []
    for start in range(0, len(entries), per_block):
        chunk = entries[start : start + per_block]
        written = block(chunk, restart_every=3, compression=compression)
        index.append((chunk[-1][0] + b"\x00", varint(len(out)) + varint(len(written) - 5)))
        out += written
    handles = b""
    for written in (block([]), block(index, restart_every=1)):
        handles += varint(len(out)) + varint(len(written) - 5)
        out += written
    return bytes(out) + handles.ljust(40, b"\x00") + bytes.fromhex("57fb808b247547db")


def write_bundle(
    prefix: Path, arrays: dict[str, np.ndarray], num_shards: int = 1, *, header: bytes | None = None, **options
) -> None:
    """`PREFIX.index` and `PREFIX.data-…`; arrays go to the shards in turn."""
    shards = [bytearray(b"gap") for _ in range(num_shards)]
    entries = []
    for index, name in enumerate(sorted(arrays, key=str.encode)):
        content, shard = np.ascontiguousarray(arrays[name]).tobytes(), index % num_shards
        entries.append((name.encode(), entry(arrays[name], shard, len(shards[shard]), content)))
        shards[shard] += content
    if header is None:
        header = field(1, num_shards) + field(3, field(1, 1))
    for index, content in enumerate(shards):
        prefix.with_name(f"{prefix.name}.data-{index:05}-of-{num_shards:05}").write_bytes(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(table([(b"", header), *entries], **options))
