"""What can happen to a file: bytes that nobody wrote, and bytes, or JSON values, that changed since."""

import contextlib
import copy
import json
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st

from t5pegasus.errors import ArtifactError, DataError, UsageError

RANDOM = st.randoms(use_true_random=False)
STRANGE = (None, True, -1, 0, 2**70, 1e308, "", "x", "\ud800", [], [1], {}, {"a": 1}, [[]])


def mutate(content: bytes, random: Random) -> bytes:
    """One to three edits: bytes replaced, left out, doubled, inserted, or the end cut off."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        start = random.randint(0, len(changed))
        end = min(len(changed), start + random.randint(1, 8))
        match random.randint(0, 4):
            case 0:
                changed[start:end] = random.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:start] = random.randbytes(random.randint(1, 8))
            case _:
                del changed[start:]
    return bytes(changed)


def mutate_json(value: Any, random: Random) -> Any:
    """The value with one key removed, renamed or added, or one part replaced by something strange."""
    changed = copy.deepcopy(value)
    part: Any = changed
    while True:
        keys = list(part) if isinstance(part, dict) else list(range(len(part)))
        if not keys:
            return changed
        key = random.choice(keys)
        if isinstance(part[key], dict | list) and part[key] and random.random() < 0.8:
            part = part[key]
            continue
        match random.randint(0, 2):
            case 0:
                del part[key]
            case 1 if isinstance(part, dict):
                part["".join(random.sample("abcdefg", 3))] = part.pop(key)
            case _:
                part[key] = random.choice(STRANGE)
        return changed


def mutate_json_bytes(content: bytes, random: Random) -> bytes:
    """A JSON file with one value changed, still JSON, or with bytes changed."""
    if random.random() < 0.25:
        return mutate(content, random)
    return json.dumps(mutate_json(json.loads(content), random)).encode("ascii")


def read_or_refuse(read: Callable[..., Any], *arguments: Any) -> bool:
    """Whether it could be read; what could not must be refused in words, and nothing else may happen."""
    with contextlib.suppress(ArtifactError, DataError, UsageError):
        read(*arguments)
        return True
    return False
