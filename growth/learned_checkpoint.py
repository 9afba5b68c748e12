"""Learned growth of a stored checkpoint: weights and their maps in memory, moments out of core like any other."""

import contextlib
import logging
from collections.abc import Generator, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from growth.dense_maps import MAPS, load_maps, save_maps
from growth.evidence import open_rows
from growth.learned import apply_maps, find_batch_size, train_maps
from growth.leaves import WEIGHTS, grow_arrays
from growth.t5 import ModelGrowth
from t5pegasus.arrays import load_arrays
from t5pegasus.batch import Batch
from t5pegasus.checkpoint import CheckpointInfo, synchronise
from t5pegasus.config import MeshConfig, RunConfig
from t5pegasus.data.loader import load_batches
from t5pegasus.errors import UsageError
from t5pegasus.sharding import make_mesh

logger = logging.getLogger(__name__)


def identify_learning(
    checkpoint_path: Path, info: CheckpointInfo, growth: ModelGrowth, examples_path: Path | None
) -> dict[str, str]:
    """What learned maps hang on beside plan and source, for the lineage: nothing where there are none.

    Raises:
        UsageError: if the plan has learned maps, and there are no examples, or they have another tokenizer.
    """
    if growth.plan.choices.learned is None:
        return {}
    if examples_path is None:
        raise UsageError(
            "the plan has learned maps, which are trained on examples: give those of the checkpoint's run by "
            "--examples-path, or leave `learned` out of the plan"
        )
    with open_rows(checkpoint_path, info, examples_path) as rows:
        return {"examples_fingerprint": rows.shards.fingerprint}


def learn_arrays(
    checkpoint_path: Path, info: CheckpointInfo, growth: ModelGrowth, examples_path: Path, folder: Path
) -> dict[str, np.ndarray]:
    """The grown parameters, and their moving average, by array name; every process calls it and gets all of them.

    The maps learn from the rows that the run would train on next, on the run's mesh where that fits the devices there
    are, else with all of them along `data`. They are kept in the folder as `maps.npz`, so that an interrupted growth
    goes on with the very same ones.

    Args:
        checkpoint_path: of the source.
        info: what it is.
        growth: the plan.
        examples_path: to learn from.
        folder: of the unfinished checkpoint.

    Raises:
        UsageError: if the examples have another tokenizer, or the mesh does not divide a size.
        DivergedError: if the loss is not finite.
    """
    stored = load_arrays(checkpoint_path, tuple(f"{group}." for group in WEIGHTS))
    source = {group: {name: stored[f"{group}.{name}"] for name in growth.specs if f"{group}.{name}" in stored}
              for group in WEIGHTS}  # fmt: skip
    lossless = {
        group: grow_arrays(group, arrays, growth.specs, growth.lossless.plan) for group, arrays in source.items()
    }
    if (folder / MAPS).is_file():
        deltas = load_maps(folder / MAPS)
    else:
        mesh = choose_mesh(info.config)
        with _open_batches(checkpoint_path, info, growth, examples_path) as batches:
            deltas, training = train_maps(
                source["parameters"], lossless["parameters"], growth, info.config, batches, mesh
            )
        if jax.process_index() == 0:
            logger.info("%s", training)
            save_maps(folder / MAPS, deltas)
    synchronise(f"maps {folder}")
    return {
        f"{group}.{name}": array
        for group, arrays in source.items()
        if arrays
        for name, array in apply_maps(arrays, lossless[group], growth, deltas).items()
    }


def choose_mesh(config: RunConfig) -> Mesh:
    """The run's mesh where it fits the devices there are, else all of them along `data`."""
    try:
        config.mesh.resolve(jax.device_count())
    except UsageError:
        logger.warning("the run's mesh %s does not fit %d devices: maps are trained with all along data", config.mesh,
                       jax.device_count())  # fmt: skip
        return make_mesh(MeshConfig())
    return make_mesh(config.mesh)


@contextlib.contextmanager
def _open_batches(
    checkpoint_path: Path, info: CheckpointInfo, growth: ModelGrowth, examples_path: Path
) -> Generator[Iterator[Batch]]:
    with (
        open_rows(checkpoint_path, info, examples_path) as rows,
        contextlib.closing(load_batches(rows, find_batch_size(growth, info.config), info.rows)) as batches,
    ):
        yield batches
