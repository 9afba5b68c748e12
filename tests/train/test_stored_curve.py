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
    5.5822439, 5.3782892, 4.7402439, 4.3793802, 4.1901612, 3.7572236, 3.8588526,
    3.7223849, 3.4215832, 3.2589216, 3.3369048, 3.1337452, 3.1935811, 2.8999913,
    2.6024997, 2.6754978, 2.6179802, 2.3131404, 2.3205557, 2.1510589,
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
