"""Training computes what it has always computed: the losses of 20 steps of `tiny` are stored here."""

import contextlib
import dataclasses

import jax
import numpy as np

from t5pegasus.config import MeshConfig
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.sharding import make_mesh, place_batch
from t5pegasus.train.state import init_state
from t5pegasus.train.step import make_train_step

WRITTEN_BY = "0.10"
"""The line of jax whose compiler made the numbers; another one orders its sums differently."""
LOSSES = [
    5.6267667, 5.3259034, 4.8252792, 4.4618826, 4.2064762, 3.8677378, 3.9124517,
    3.7854691, 3.4504292, 3.4308150, 3.3741622, 3.1980736, 3.2029068, 2.9794006,
    2.4853017, 2.6859720, 2.6591465, 2.4546938, 2.3381760, 2.2660046,
]  # fmt: skip


def test_losses_follow_the_stored_curve(many_examples_path, run_config):
    """Initialisation, order of the data, packing, dropout, model, loss, clipping, schedule and AdamW are all in it.

    Whoever changes one of them on purpose stores the new numbers, which the failure shows.
    """
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, steps=20))
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state, train_step, losses = init_state(config.model, 0, mesh), make_train_step(config, mesh), []
    with (
        PackedRows(many_examples_path, config.data, 0, 101) as rows,
        contextlib.closing(load_batches(rows, 8, start_row=0)) as batches,
    ):
        for _ in range(20):
            state, metrics = train_step(state, place_batch(next(batches), np.arange(8), 8, mesh))
            losses.append(float(metrics["loss"]))
    tolerance = 1e-5 if jax.__version__.startswith(f"{WRITTEN_BY}.") else 1e-3
    np.testing.assert_allclose(losses, LOSSES, rtol=tolerance, err_msg=f"got {losses}")
