"""Writing a safetensors file tensor by tensor.

The library's own writer wants all tensors in memory and copies them; a large model would need three times its size.
The format (huggingface/safetensors, README): the header's length as a 64-bit little-endian number, the header as
JSON, then the bytes of the tensors without gaps.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

_ALIGNMENT = 8


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray]) -> None:
    """Write float32 tensors.

    Args:
        path: the file.
        shapes: of every tensor by name, in the order in which they are written.
        arrays: the tensors in this order; one at a time is held.

    Raises:
        ValueError: if an array has another shape, or there are fewer or more.
    """
    # transformers refuses a file that does not say which framework's layout it has.
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for (name, shape), array in zip(shapes.items(), arrays, strict=True):
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, {shape} was announced")
            file.write(np.ascontiguousarray(array, "<f4").data)
        file.flush()
        os.fsync(file.fileno())
