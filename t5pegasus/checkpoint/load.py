"""Arrays out of checkpoints: the weights to use, whatever names are asked for, and a state on all processes or none."""

import fnmatch
import logging
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t5pegasus.arrays import list_arrays, load_arrays
from t5pegasus.checkpoint.folder import find_process, has_ema, list_checkpoints, require_manifest
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.manifest import DamagedError, verify_manifest

logger = logging.getLogger(__name__)


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
        shardings: by name, where they shall lie; then every process calls this, as `load_together`.
    """
    group = "ema." if has_ema(path) else "parameters."
    if shardings is None:
        arrays = load_arrays(path, (group,) if names is None else tuple(group + name for name in names))
    else:
        wanted = shardings if names is None else {name: shardings[name] for name in names}
        arrays = load_together(path, {group + name: sharding for name, sharding in wanted.items()})
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


def find_together(run_path: Path, find: Callable[[Collection[Path]], Path | None]) -> Path | None:
    """The checkpoint of a run that all processes find; every process calls it.

    Each looks for itself. One that cannot read what the others can, or whose view of a shared disk lags behind, would
    go on from another step: then all take the oldest of what they found.

    Args:
        run_path: the run's folder.
        find: the last good checkpoint but these, None if there is none; see `find_last_good`.

    Raises:
        ArtifactError: if some find one and others none.
    """
    passed_over: set[Path] = set()
    while True:
        found = find(passed_over)
        if find_process()[1] == 1:
            return found
        steps = np.asarray(multihost_utils.process_allgather(np.int32(-1 if found is None else int(found.name))))
        if (steps == steps[0]).all():
            return found
        last, first = int(np.argmax(steps)), int(np.argmin(steps))
        if steps[first] < 0:
            raise ArtifactError(
                f"{run_path}: process {last} finds the checkpoint of step {steps[last]} there, process {first} finds "
                "none; all processes must see the same folder: put it on a shared disk, or in a bucket"
            )
        logger.warning(
            "%s: process %d finds the checkpoint of step %d, process %d that of step %d; all go back to that one",
            run_path, last, steps[last], first, steps[first],
        )  # fmt: skip
        passed_over |= {path for path in list_checkpoints(run_path) if int(path.name) > steps[first]}


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
    _raise_together(path, damage)
    return arrays


def verify_together(path: Path) -> None:
    """`verify_checkpoint`, each process its share of the files, or the same kind of error in all; all call it.

    Raises:
        DamagedError: if a file is missing, surplus, of another size or of other content.
        ArtifactError: if it is no finished checkpoint.
    """
    (index, count), damage = find_process(), None
    require_manifest(path)
    try:
        verify_manifest(path, contents=lambda name: zlib.crc32(name.encode()) % count == index)
    except DamagedError as error:
        damage = error
    _raise_together(path, damage)


def _raise_together(path: Path, damage: DamagedError | None) -> None:
    if find_process()[1] > 1:
        found = np.asarray(multihost_utils.process_allgather(np.array(damage is not None)))
        if found.any() and damage is None:
            raise DamagedError(path, f"process {int(np.argmax(found))} found a damaged file, which it names")
    if damage is not None:
        raise damage
