"""The held-out loss of parameters, jitted over the mesh."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.sharding import batch_shardings, param_shardings, place_batch
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.execution import resolve_execution
from t5pegasus.train.head_loss import sum_model_losses
from t5pegasus.train.loss import LossSums
from t5pegasus.train.on_mesh import OnMesh


def make_heldout_loss(
    config: RunConfig, mesh: Mesh
) -> Callable[[dict[str, jax.Array], Iterable[Batch]], dict[str, float]]:
    """A function (parameters, whole batches, the same in each process) → mean loss and accuracy per target token."""
    specs = declare_parameters(config.model)
    compute_dtype = resolve_compute_dtype(config)

    def sums(parameters: dict[str, jax.Array], batch: Batch) -> LossSums:
        model = bind(config.model, parameters, compute_dtype, resolve_execution(config, compute_dtype))
        return sum_model_losses(model, batch, config)

    jitted = OnMesh(mesh, jax.jit(sums, in_shardings=(param_shardings(specs, mesh), batch_shardings(mesh))))

    def heldout_loss(parameters: dict[str, jax.Array], batches: Iterable[Batch]) -> dict[str, float]:
        total = np.zeros(4)
        for batch in batches:
            rows = np.arange(len(batch.row_ids))
            placed = place_batch(batch, rows, len(rows), mesh)
            total += np.array(jax.device_get(jitted(parameters, placed)[:4]), np.float64)
        nll, _, correct, weight = total
        return {"loss": float(nll / weight), "accuracy": float(correct / weight)}

    return heldout_loss
