"""LevelDB's table format and protocol-buffer fields, as far as TensorFlow's checkpoint index uses them.

Formats: leveldb/doc/table_format.md; protobuf.dev/programming-guides/encoding. Every function raises ValueError with
a phrase for the user, and none trusts a length.
"""

from collections.abc import Iterator

from t5pegasus.convert.crc32c import masked_crc32c

MAGIC = bytes.fromhex("57fb808b247547db")
FOOTER_BYTES = 48
TRAILER_BYTES = 5
"""Behind each block: its compression, and the checksum of both."""
MAX_KEY_BYTES = 4096


def read_table(data: bytes) -> dict[bytes, bytes]:
    """All entries of a table, in the order of their keys."""
    if len(data) < FOOTER_BYTES or data[-8:] != MAGIC:
        raise ValueError("it does not end like a LevelDB table")
    footer = data[-FOOTER_BYTES:]
    _, position = _read_handle(footer, 0)
    index, _ = _read_handle(footer, position)
    entries: dict[bytes, bytes] = {}
    last: bytes | None = None
    for _, value in _block_entries(_read_block(data, index)):
        for key, content in _block_entries(_read_block(data, _read_handle(value, 0)[0])):
            # The order also bounds the work: no block can be listed twice.
            if last is not None and key <= last:
                raise ValueError("its keys are not in order")
            entries[key] = content
            last = key
    return entries


def read_fields(data: bytes) -> dict[int, list[int | bytes]]:
    """The fields of one protocol-buffer message by number; messages within stay bytes."""
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        match tag & 7:
            case 0:
                value, position = _read_varint(data, position)
            case 2:
                length, position = _read_varint(data, position)
                value, position = _cut(data, position, length)
            case 1 | 5 as wire_type:
                content, position = _cut(data, position, 8 if wire_type == 1 else 4)
                value = int.from_bytes(content, "little")
            case wire_type:
                raise ValueError(f"a field has the unknown wire type {wire_type}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number is cut off or too long")


def _cut(data: bytes, position: int, length: int) -> tuple[bytes, int]:
    if length > len(data) - position:
        raise ValueError("an entry is longer than what holds it")
    return data[position : position + length], position + length


def _read_handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    """Offset and size of a block, and where they end."""
    offset, position = _read_varint(data, position)
    size, position = _read_varint(data, position)
    return (offset, size), position


def _read_block(data: bytes, handle: tuple[int, int]) -> bytes:
    offset, size = handle
    if offset + size + TRAILER_BYTES > len(data) - FOOTER_BYTES:
        raise ValueError("a block lies beyond its end")
    content, compression = data[offset : offset + size], data[offset + size]
    stored = int.from_bytes(data[offset + size + 1 : offset + size + TRAILER_BYTES], "little")
    if masked_crc32c(data[offset : offset + size + 1]) != stored:
        raise ValueError("a block does not have its checksum")
    if compression != 0:
        name = {1: "Snappy", 2: "Zstandard"}.get(compression, f"method {compression}")
        raise ValueError(
            f"a block is compressed with {name}, which TensorFlow stopped doing in 1.2; "
            "load and save the checkpoint with a newer TensorFlow"
        )
    return content


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(block) < 4:
        raise ValueError("a block is too short")
    end = len(block) - 4 * (int.from_bytes(block[-4:], "little") + 1)
    if end < 0:
        raise ValueError("a block has more restart points than room")
    key, position = b"", 0
    while position < end:
        shared, position = _read_varint(block, position)
        unshared, position = _read_varint(block, position)
        length, position = _read_varint(block, position)
        if shared > len(key) or shared + unshared > MAX_KEY_BYTES:
            raise ValueError("a key shares more than there is, or is too long")
        suffix, position = _cut(block[:end], position, unshared)
        value, position = _cut(block[:end], position, length)
        key = key[:shared] + suffix
        yield key, value
