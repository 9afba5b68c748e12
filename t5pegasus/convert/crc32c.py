"""CRC-32C (Castagnoli), the checksum of TensorFlow's checkpoints, in NumPy: lanes side by side, joined at the end.

A CRC that starts at zero is linear over GF(2): zeros in front change nothing, and the CRC of two pieces is that of
the first moved on by the length of the second, XORed with that of the second (Intel's slicing-by-8; zlib's
crc32_combine).
"""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78
"""Bits reversed: the lowest bit is the highest power."""
LANES = 4096
PIECE_BYTES = 1 << 23
"""Bytes per round, small enough for lanes and tables to stay in the cache."""


def crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The CRC-32C of bytes, e.g. 0xE3069283 of b"123456789"."""
    values = np.frombuffer(data, np.uint8)
    # The initial value of all ones is the same as inverting the first four bytes and starting at zero.
    if len(values) >= 4:
        state, values = _linear(values[:4] ^ 0xFF), values[4:]
        for start in range(0, len(values), PIECE_BYTES):
            piece = values[start : start + PIECE_BYTES]
            state = _move(state, len(piece)) ^ _linear(piece)
        return state ^ 0xFFFFFFFF
    state = 0xFFFFFFFF
    for value in values.tolist():
        state = int(_byte_table()[(state ^ value) & 0xFF]) ^ (state >> 8)
    return state ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview | np.ndarray) -> int:
    """The form in which LevelDB and TensorFlow store it: rotated and moved, so that files of CRCs have a sound one."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF


def _linear(values: np.ndarray) -> int:
    """The CRC of uint8 [n] that starts at zero and is not inverted."""
    lanes = LANES if len(values) >= 16 * LANES else 1
    steps = -(-len(values) // (4 * lanes))
    padded = np.zeros(4 * lanes * steps, np.uint8)
    padded[len(padded) - len(values) :] = values
    words = padded.view("<u4").reshape(lanes, steps)
    low, high = _word_tables()
    state = np.zeros(lanes, np.uint32)
    for step in range(steps):
        state ^= words[:, step]
        state = low[state & 0xFFFF] ^ high[state >> 16]
    lane_bytes = 4 * steps
    while len(state) > 1:
        state = _multiply(_zeros_operator(lane_bytes), state[0::2]) ^ state[1::2]
        lane_bytes *= 2
    return int(state[0])


def _move(state: int, num_bytes: int) -> int:
    """The CRC `state` after `num_bytes` zeros more."""
    return int(_multiply(_zeros_operator(num_bytes), np.array([state], np.uint32))[0])


def _multiply(operator: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A 32×32 matrix over GF(2), by its columns uint32 [32], times each of uint32 [n]."""
    product = np.zeros_like(values)
    for bit in range(32):
        product ^= np.where(values >> np.uint32(bit) & np.uint32(1), operator[bit], np.uint32(0))
    return product


@functools.lru_cache(maxsize=256)
def _zeros_operator(num_bytes: int) -> np.ndarray:
    """The matrix that moves a CRC on by that many zero bytes, by squaring."""
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    square = _byte_table()[result & 0xFF] ^ (result >> np.uint32(8))
    while num_bytes:
        if num_bytes & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        num_bytes >>= 1
    return result


@functools.cache
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & np.uint32(1), table >> np.uint32(1) ^ np.uint32(POLYNOMIAL), table >> np.uint32(1))
    return table


@functools.cache
def _word_tables() -> tuple[np.ndarray, np.ndarray]:
    """The CRCs of the four bytes with this low, and with this high half: uint32 [65536] each."""
    halves = np.arange(1 << 16, dtype=np.uint32)
    return _multiply(_zeros_operator(4), halves), _multiply(_zeros_operator(4), halves << np.uint32(16))
