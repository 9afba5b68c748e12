"""The train step, jitted over the mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import batch_shardings, check_divides
from t5pegasus.train.accumulation import pure_update
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.divergence import judge_update, spike_window
from t5pegasus.train.ema import update_ema
from t5pegasus.train.loss import smooth_labels
from t5pegasus.train.norms import KINDS
from t5pegasus.train.on_mesh import OnMesh, compiler_options
from t5pegasus.train.optimizer import make_schedule
from t5pegasus.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def make_train_step(config: RunConfig, mesh: Mesh) -> OnMesh:
    """The jitted update (state, batch) → (state, metrics); the state it is given is consumed (donated).

    Raises:
        UsageError: if batch or model sizes do not divide over the mesh.
    """
    specs = declare_parameters(config.model)
    check_divides(config, specs, mesh)
    update = pure_train_step(config, specs, resolve_compute_dtype(config))
    kept: dict[str, Any] = {"with_ema": config.train.ema_decay > 0, "window": spike_window(config.train)}
    shardings = state_shardings(specs, mesh, config.optimizer, **kept)
    return OnMesh(
        mesh,
        jax.jit(
            update,
            in_shardings=(shardings, batch_shardings(mesh)),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),  # each process reads the metrics whole
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        ),
    )


def pure_train_step(
    config: RunConfig, specs: Mapping[str, ParamSpec], compute_dtype: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The update as a pure function: found, judged, averaged, and told."""
    schedule = make_schedule(config.optimizer, config.train.steps)
    smoothing = config.train.label_smoothing
    find_update = pure_update(config, specs, compute_dtype)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total_weight = jnp.maximum(1.0, jnp.sum(batch.decoder_loss_weights))
        learning_rate = schedule(state.step)
        parameters, moments, sums, norm, norms = find_update(state, batch, learning_rate)
        rows = state.rows + jnp.uint32(len(batch.row_ids))
        loss = sums.nll / total_weight
        update_norm = jnp.linalg.norm(norms[KINDS.index("update")])
        why, limits, recent = judge_update(config.train, loss, norm, update_norm, state.recent)
        metrics = {
            "rows": rows,
            "why": why,
            **limits,
            "loss": loss,
            "accuracy": sums.correct / total_weight,
            **({"smoothed_loss": smooth_labels(sums, smoothing) / total_weight} if smoothing else {}),
            "z_loss": sums.z / total_weight,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "source_tokens": jnp.sum(batch.encoder_segment_ids > 0),
            "target_tokens": jnp.sum(batch.decoder_loss_weights > 0),
            "examples": jnp.sum(jnp.max(batch.decoder_segment_ids, axis=1)),
            "bad_examples": jnp.zeros(()) if batch.num_bad_examples is None else jnp.sum(batch.num_bad_examples),
            "norms": norms,
            **({} if sums.by_source is None else {"by_source": sums.by_source}),
        }
        ema = update_ema(config.train, state.ema, parameters, state.step)
        after = {"parameters": parameters, "ema": ema, **moments._asdict()}
        if config.train.on_divergence == "skip":
            before = {group: getattr(state, group) for group in after}
            after = jax.tree.map(lambda new, old: jnp.where(why == 0, new, old), after, before)
        return state._replace(step=state.step + 1, rows=rows, recent=recent, **after), metrics

    return train_step
