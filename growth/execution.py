"""A planned growth of a stored checkpoint, out of core: read block by block, written chunk by chunk, resumable."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from growth.journal import Journal, begin_growth, checkpoint_folder
from growth.leaves import GROUPS, begin_statistics, plan_leaf
from growth.moments import grow_records
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

    Raises:
        ArtifactError: if another growth was interrupted there, or the checkpoint has an array that cannot grow.
        OSError: if the disk is full, or fails in another way.
    """
    unfinished = output_path.with_name(output_path.name + ".unfinished")
    folder = checkpoint_folder(unfinished)
    first = jax.process_index() == 0
    with writing(output_path):
        if first:
            begin_growth(unfinished, {**identity, "chunk_bytes": CHUNK_BYTES})
        synchronise(f"begin {output_path}")
        stored = open_arrays(checkpoint_path)
        leaves = plan_leaves(stored, growth, measure_source(stored, growth))
        with Journal(unfinished, jax.process_index()) as journal:
            report = _write(folder, stored, leaves, journal)
        synchronise(f"arrays {output_path}")
        if first:
            try:
                commit_checkpoint(folder, output_path, info, checkpoint_path / "tokenizer", check, journal.read())
            except T5PegasusError:
                shutil.rmtree(unfinished)
                raise
            shutil.rmtree(unfinished)
        synchronise(f"end {output_path}")
    return report


def _write(
    folder: Path, stored: Mapping[str, StoredArray], leaves: Mapping[str, Leaf], journal: Journal
) -> StreamReport:
    index, count = jax.process_index(), jax.process_count()
    with Progress("grow", total=count_bytes(leaves) // count, unit="B", shown=index == 0) as progress:
        return write_leaves(
            folder,
            stored,
            leaves,
            journal,
            process_index=index,
            process_count=count,
            chunk_bytes=CHUNK_BYTES,
            advance=progress.advance,
        )


def measure_source(stored: Mapping[str, StoredArray], growth: ModelGrowth) -> dict[str, LeafStatistics]:
    """What must be known of the source's arrays before they grow, by name; arrays that need nothing are absent."""
    gatherings = {}
    for array_name in stored:
        group, _, name = array_name.partition(".")
        if group in GROUPS:
            gathering = begin_statistics(group, growth.specs[name], growth.plan)
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
        if group in GROUPS:
            spec = growth.specs[name]
            leaves[array_name] = plan_leaf(group, name, spec, growth.plan, statistics.get(array_name), array.dtype)
        elif array_name in ("step", "rows"):
            leaves[array_name] = KnownArray(array.read())
        elif group != "multipliers":
            raise ArtifactError(
                f"the checkpoint has an array {array_name}, which growth does not know; grow it with the version that "
                "wrote it"
            )
    return leaves | _grow_records(stored, growth)


def _grow_records(stored: Mapping[str, StoredArray], growth: ModelGrowth) -> dict[str, Leaf]:
    names = [name.removeprefix("multipliers.") for name in stored if name.startswith("multipliers.")]
    records = {
        axis: AxisMultiplier(*(stored[f"multipliers.{axis}.{field}"].read() for field in AxisMultiplier._fields))
        for axis in sorted({name.rpartition(".")[0] for name in names})
    }
    grown = grow_records(records, growth.plan.maps, growth.plan.step)
    return {
        f"multipliers.{axis}.{field}": KnownArray(np.asarray(array))
        for axis, record in grown.items()
        for field, array in record._asdict().items()
    }
