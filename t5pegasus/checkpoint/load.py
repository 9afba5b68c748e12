"""Arrays out of checkpoints: the weights to use, whatever names are asked for, and a state on all processes or none."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5pegasus.arrays import list_arrays, load_arrays
from t5pegasus.checkpoint.folder import find_process, has_ema
from t5pegasus.errors import UsageError
from t5pegasus.manifest import DamagedError


def load_parameters(
    path: Path,
    names: Collection[str] | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """The weights to use a checkpoint with, by dotted name.

    This is the one place that decides which they are: the exponential moving average where the run kept one, else the
    trained parameters. Summarizing, evaluating, converting and fine-tuning all take them; continuing a run takes both.

    Args:
        path: a checkpoint folder, verified by the caller.
        names: only these.
        shardings: by name, as in `load_arrays`.
    """
    group = "ema." if has_ema(path) else "parameters."
    prefixes = (group,) if names is None else tuple(group + name for name in names)
    placed = None if shardings is None else {group + name: sharding for name, sharding in shardings.items()}
    arrays = load_arrays(path, prefixes, placed)
    loaded = {name.removeprefix(group): array for name, array in arrays.items()}
    return loaded if names is None else {name: loaded[name] for name in names}


def load_matching(
    path: Path, patterns: Sequence[str], shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, Any]:
    """Part of a checkpoint: only the files of arrays whose names match are read, and each is verified.

    Args:
        path: a checkpoint folder.
        patterns: of dotted names, e.g. `parameters.encoder.*` or `*.mlp.wo`, as in a shell.
        shardings: where the arrays shall lie, by name; None gives NumPy arrays.

    Raises:
        UsageError: if no array matches one of the patterns; the nearest way to find one is named.
        DamagedError: if a file is not as it was written.
    """
    stored = list_arrays(path)
    matches = {pattern: fnmatch.filter(stored, pattern) for pattern in patterns}
    for pattern, names in matches.items():
        if not names:
            raise UsageError(
                f"checkpoint {path}: no array matches {pattern!r}; t5pegasus checkpoint list {path} names them all"
            )
    names = {name for each in matches.values() for name in each}
    if shardings is not None:
        return load_arrays(path, shardings={name: shardings[name] for name in names})
    return {name: array for name, array in load_arrays(path, tuple(names)).items() if name in names}


def load_together(path: Path, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, jax.Array]:
    """Arrays on the devices of all processes, or the same kind of error in all of them.

    Each process reads and verifies what its own devices hold, so that one may meet a damaged file which others do not
    read; every process calls this.

    Raises:
        DamagedError: if one of them did.
        ArtifactError: if an array is absent.
    """
    damage: DamagedError | None = None
    arrays: dict[str, jax.Array] = {}
    try:
        arrays = load_arrays(path, shardings=shardings)
    except DamagedError as error:
        damage = error
    if find_process()[1] > 1:
        found = np.asarray(multihost_utils.process_allgather(np.array(damage is not None)))
        if found.any() and damage is None:
            raise DamagedError(path, f"process {int(np.argmax(found))} found a damaged file, which it names")
    if damage is not None:
        raise damage
    return arrays
