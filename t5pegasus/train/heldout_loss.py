"""The held-out loss of parameters, jitted over the mesh."""

from collections.abc import Callable, Iterable, Sequence

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
    config: RunConfig, mesh: Mesh, sources: Sequence[str] = ()
) -> Callable[[dict[str, jax.Array], Iterable[Batch]], dict[str, float]]:
    """A function (parameters, whole batches, the same in each process) → mean loss and accuracy per target token.

    Where there are several sources, each batch is of one of them, and `loss/NAME` is the mean over those of a source.
    """
    specs = declare_parameters(config.model)
    compute_dtype = resolve_compute_dtype(config)

    def sums(parameters: dict[str, jax.Array], batch: Batch) -> LossSums:
        model = bind(config.model, parameters, compute_dtype, resolve_execution(config, compute_dtype))
        return sum_model_losses(model, batch, config)

    jitted = OnMesh(mesh, jax.jit(sums, in_shardings=(param_shardings(specs, mesh), batch_shardings(mesh))))

    def heldout_loss(parameters: dict[str, jax.Array], batches: Iterable[Batch]) -> dict[str, float]:
        totals = np.zeros((max(1, len(sources)), 4))
        for batch in batches:
            rows = np.arange(len(batch.row_ids))
            placed = place_batch(batch, rows, len(rows), mesh)
            source = int(batch.source_ids[0]) if len(sources) > 1 else 0
            totals[source] += np.array(jax.device_get(jitted(parameters, placed)[:4]), np.float64)
        nll, _, correct, weight = totals.sum(axis=0)
        by_source = totals[:, 0] / np.maximum(totals[:, 3], 1)
        named = {f"loss/{name}": loss for name, loss in zip(sources, by_source.tolist())} if len(sources) > 1 else {}
        return {"loss": float(nll / weight), "accuracy": float(correct / weight), **named}

    return heldout_loss
