"""The train step, jitted over the mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import batch_shardings, check_divides
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.ema import update_ema
from t5pegasus.train.gradients import pure_gradients
from t5pegasus.train.groups import frozen_parameters, learning_rate_factors
from t5pegasus.train.loss import smooth_labels
from t5pegasus.train.on_mesh import OnMesh
from t5pegasus.train.optimizer import apply_optimizer, keep_frozen, make_schedule, weighted_norm
from t5pegasus.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def make_train_step(config: RunConfig, mesh: Mesh) -> OnMesh:
    """The jitted update (state, batch) → (state, metrics); the state it is given is consumed (donated).

    Raises:
        UsageError: if batch or model sizes do not divide over the mesh.
    """
    check_batch_divides(config.train.batch_size, config.train.accumulation_steps, mesh)
    specs = declare_parameters(config.model)
    update = pure_train_step(config, specs, resolve_compute_dtype(config))
    check_divides(config, specs, mesh)
    shardings = state_shardings(specs, mesh, config.optimizer, with_ema=config.train.ema_decay > 0)
    return OnMesh(
        mesh,
        jax.jit(
            update,
            in_shardings=(shardings, batch_shardings(mesh)),
            out_shardings=(shardings, None),
            donate_argnums=0,
        ),
    )


def pure_train_step(
    config: RunConfig, specs: Mapping[str, ParamSpec], compute_dtype: Any
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The update as a pure function: micro-batch gradients summed, clipped, applied by the optimizer."""
    schedule = make_schedule(config.optimizer, config.train.steps)
    smoothing = config.train.label_smoothing
    factors = learning_rate_factors(config.optimizer, specs)
    frozen = frozen_parameters(factors)
    find_gradients = pure_gradients(config, compute_dtype)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total_weight = jnp.maximum(1.0, jnp.sum(batch.decoder_loss_weights))
        trained = {name: array for name, array in state.parameters.items() if name not in frozen}
        gradients, sums = find_gradients(trained, state.parameters, batch)
        gradients = {name: keep_frozen(gradient, 0.0, factors.get(name)) for name, gradient in gradients.items()}
        norm = weighted_norm(gradients, specs, state.multipliers)
        clip = jnp.minimum(1.0, config.optimizer.max_grad_norm / (norm + 1e-9))
        gradients = {name: clip * gradient for name, gradient in gradients.items()}
        learning_rate = schedule(state.step)
        parameters, moments = apply_optimizer(
            config.optimizer, specs, state.multipliers, state.parameters, gradients, state.moments, state.step,
            learning_rate, factors,
        )  # fmt: skip
        rows = state.rows + jnp.uint32(len(batch.row_ids))
        metrics = {
            "rows": rows,
            "loss": sums.nll / total_weight,
            "accuracy": sums.correct / total_weight,
            **({"smoothed_loss": smooth_labels(sums, smoothing) / total_weight} if smoothing else {}),
            "z_loss": sums.z / total_weight,
            "grad_norm": norm,
            "learning_rate": learning_rate,
            "source_tokens": jnp.sum(batch.encoder_segment_ids > 0),
            "target_tokens": sums.weight,
        }
        ema = update_ema(config.train, state.ema, parameters, state.step)
        after = {"step": state.step + 1, "rows": rows, "parameters": parameters, "ema": ema, **moments._asdict()}
        return state._replace(**after), metrics

    return train_step
