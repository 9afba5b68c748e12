"""A planned growth of a stored checkpoint, out of core: read block by block, written chunk by chunk, resumable."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from growth.journal import Journal, begin_growth, checkpoint_folder
from growth.leaves import begin_statistics, grow_arrays, plan_leaf
from growth.moments import factor_second_moment, grow_records
from growth.statistics import LeafStatistics
from growth.stream import KnownArray, Leaf, StreamReport, count_bytes, gather_statistics, write_leaves
from growth.t5 import ModelGrowth
from t5pegasus.arrays import open_arrays
from t5pegasus.axes import AxisMultiplier
from t5pegasus.checkpoint import CheckpointInfo, commit_checkpoint, synchronise
from t5pegasus.chunks import CHUNK_BYTES, StoredArray
from t5pegasus.errors import ArtifactError, T5PegasusError, writing
from t5pegasus.progress import Progress


def execute_growth(
    checkpoint_path: Path,
    growth: ModelGrowth,
    output_path: Path,
    info: CheckpointInfo,
    identity: Mapping[str, Any],
    check: Callable[[Path], None] | None = None,
    learn: Callable[[Path], Mapping[str, np.ndarray]] | None = None,
    tokenizer_path: Path | None = None,
) -> StreamReport:
    """Write the grown checkpoint; every process of a multi-process run calls it and writes its share of the chunks.

    Killed at any point, the same call again goes on where it was, and ends with the same bytes.

    Args:
        checkpoint_path: of the source, verified by the caller.
        growth: what to do.
        output_path: folder to create.
        info: what the grown checkpoint is.
        identity: what decides every byte of the result; an unfinished growth of another one is refused.
        check: called by the first process with the unfinished checkpoint, which lacks nothing but its manifest. It may
            add files; what it raises ends the growth, and if that is an error of this package nothing is left.
        learn: called by every process with the unfinished checkpoint before anything is written; gives arrays of the
            grown checkpoint that are made in another way, and may add files, which must be the same when called again.
        tokenizer_path: tokenizer folder of the grown checkpoint; None: the source's.

    Raises:
        ArtifactError: if another growth was interrupted there, or the checkpoint has an array that cannot grow.
        OSError: if the disk is full, or fails in another way.
    """
    unfinished = output_path.with_name(output_path.name + ".unfinished")
    folder = checkpoint_folder(unfinished)
    process_index, process_count = _find_process()
    first = process_index == 0
    with writing(output_path):
        if first:
            begin_growth(unfinished, {**identity, "chunk_bytes": CHUNK_BYTES})
        synchronise(f"begin {output_path}")
        stored = open_arrays(checkpoint_path)
        try:
            known = {} if learn is None else learn(folder)
        except T5PegasusError:
            if first:
                shutil.rmtree(unfinished)
            raise
        others = {name: array for name, array in stored.items() if name not in known}
        leaves = plan_leaves(others, growth, measure_source(others, growth))
        leaves |= {name: KnownArray(array) for name, array in known.items()}
        with (
            Journal(unfinished, process_index) as journal,
            Progress("grow", total=count_bytes(leaves) // process_count, unit="B", shown=first) as progress,
        ):
            report = write_leaves(
                folder,
                stored,
                leaves,
                journal,
                process_index=process_index,
                process_count=process_count,
                chunk_bytes=CHUNK_BYTES,
                advance=progress.advance,
            )
        synchronise(f"arrays {output_path}")
        if first:
            try:
                commit_checkpoint(
                    folder, output_path, info, tokenizer_path or checkpoint_path / "tokenizer", check, journal.read()
                )
            except T5PegasusError:
                shutil.rmtree(unfinished)
                raise
            shutil.rmtree(unfinished)
        synchronise(f"end {output_path}")
    return report


def count_stored_bytes(folder: Path) -> int:
    """The size of all arrays of a checkpoint."""
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in open_arrays(folder).values())


def _find_process() -> tuple[int, int]:
    """Index and number of processes; devices, whose threads take memory, are not started to know them."""
    if jax.distributed.is_initialized():
        return jax.process_index(), jax.process_count()
    return 0, 1


def measure_source(stored: Mapping[str, StoredArray], growth: ModelGrowth) -> dict[str, LeafStatistics]:
    """What must be known of the source's arrays before they grow, by name; arrays that need nothing are absent."""
    gatherings = {}
    for array_name in stored:
        group, _, name = array_name.partition(".")
        if name in growth.parts.get(group, ({}, 0))[0]:
            gathering = begin_statistics(group, growth.parts[group][0][name], growth.plan)
            if gathering is not None:
                gatherings[array_name] = gathering
    return gather_statistics(stored, gatherings)


def plan_leaves(
    stored: Mapping[str, StoredArray], growth: ModelGrowth, statistics: Mapping[str, LeafStatistics]
) -> dict[str, Leaf]:
    """How every array of the grown checkpoint is made of the source's, in the order in which they are written.

    Args:
        stored: the source's arrays by name.
        growth: what to do.
        statistics: of `measure_source`.

    Raises:
        ArtifactError: if there is an array that growth does not know.
    """
    leaves: dict[str, Leaf] = {}
    for array_name, array in stored.items():
        group, _, name = array_name.partition(".")
        specs, power = growth.parts.get(group, ({}, 0))
        if name in specs:
            known = statistics.get(array_name)
            leaves[array_name] = plan_leaf(group, name, specs[name], growth.plan, known, array.dtype, power=power)
        elif group == "second_moment" and name in growth.refactored:
            leaves |= _grow_factors(name, array.read(), growth)
        elif array_name in ("step", "rows"):
            leaves[array_name] = KnownArray(array.read())
        elif group not in ("multipliers", "recent"):  # what spikes are known by begins anew
            raise ArtifactError(
                f"the checkpoint has an array {array_name}, which growth does not know; grow it with the version that "
                "wrote it"
            )
    return leaves | _grow_records(stored, growth)


def _grow_factors(name: str, second_moment: np.ndarray, growth: ModelGrowth) -> dict[str, Leaf]:
    """The factors that a second moment becomes which is kept whole only because it is small."""
    factors = zip(("row_moment", "column_moment"), factor_second_moment(second_moment, growth.specs[name]))
    return {
        f"{group}.{name}": KnownArray(grow_arrays(group, {name: factor}, growth.parts[group][0], growth.plan)[name])
        for group, factor in factors
    }


def _grow_records(stored: Mapping[str, StoredArray], growth: ModelGrowth) -> dict[str, Leaf]:
    names = [name.removeprefix("multipliers.") for name in stored if name.startswith("multipliers.")]
    records = {
        axis: AxisMultiplier(*(stored[f"multipliers.{axis}.{field}"].read() for field in AxisMultiplier._fields))
        for axis in sorted({name.rpartition(".")[0] for name in names})
    }
    grown = grow_records(records, growth.plan.maps, growth.plan.born)
    return {
        f"multipliers.{axis}.{field}": KnownArray(np.asarray(array))
        for axis, record in grown.items()
        for field, array in record._asdict().items()
    }
