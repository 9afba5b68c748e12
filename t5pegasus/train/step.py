"""The train step and the held-out loss, jitted over the mesh in this one place."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.sharding import batch_shardings, check_batch_divides, param_shardings, place_batch
from t5pegasus.train.ema import update_ema
from t5pegasus.train.groups import frozen_parameters, learning_rate_factors
from t5pegasus.train.loss import LossSums, smooth_labels, sum_losses
from t5pegasus.train.noise import disturb_decoder_inputs
from t5pegasus.train.optimizer import apply_optimizer, keep_frozen, make_schedule, weighted_norm
from t5pegasus.train.state import TrainState, state_shardings

Metrics = dict[str, jax.Array]


def resolve_compute_dtype(config: RunConfig) -> Any:
    """`auto` is bfloat16 on TPU and GPU, float32 on CPU (whose bfloat16 is the slower one)."""
    name = config.train.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_train_step(config: RunConfig, mesh: Mesh) -> "OnMesh":
    """The jitted update (state, batch) → (state, metrics); the state it is given is consumed (donated).

    Raises:
        UsageError: if batch or model sizes do not divide over the mesh.
    """
    check_batch_divides(config.train.batch_size, config.train.accumulation_steps, mesh)
    specs = declare_parameters(config.model)
    update = pure_train_step(config, specs, resolve_compute_dtype(config))
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


def pure_gradients(
    config: RunConfig, compute_dtype: Any
) -> Callable[[dict[str, jax.Array], Mapping[str, jax.Array], Batch], tuple[dict[str, jax.Array], LossSums]]:
    """A pure function (trained parameters, all parameters, batch) → (gradients of the training loss, its sums).

    The loss is the mean over the batch's target tokens, with smoothing, z-loss, dropout and decoder noise as
    configured; micro-batches are summed.
    """
    smoothing = config.train.label_smoothing

    def find_gradients(
        trained: dict[str, jax.Array], parameters: Mapping[str, jax.Array], batch: Batch
    ) -> tuple[dict[str, jax.Array], LossSums]:
        total_weight = jnp.maximum(1.0, jnp.sum(batch.decoder_loss_weights))

        def objective(trained: dict[str, jax.Array], micro: Batch) -> tuple[jax.Array, LossSums]:
            micro = disturb_decoder_inputs(micro, config)
            logits = bind(config.model, {**parameters, **trained}, compute_dtype)(micro, dropout_seed=config.train.seed)
            targets, weights = micro.decoder_target_tokens, micro.decoder_loss_weights
            num_masked = config.model.num_masked_tokens
            sums = sum_losses(logits, targets, weights, with_uniform=smoothing > 0, num_masked_tokens=num_masked)
            return (smooth_labels(sums, smoothing) + config.train.z_loss * sums.z) / total_weight, sums

        def accumulate(carry: Any, micro: Batch) -> tuple[Any, None]:
            gradients, sums = jax.grad(objective, has_aux=True)(trained, micro)
            return jax.tree.map(jnp.add, carry, (gradients, sums)), None

        zeros = jax.tree.map(jnp.zeros_like, trained), LossSums(*(jnp.zeros(()),) * (5 if smoothing else 4))
        return jax.lax.scan(accumulate, zeros, _split_micro(batch, config.train.accumulation_steps))[0]

    return find_gradients


def _split_micro(batch: Batch, count: int) -> Batch:
    """[B, …] → [count, B/count, …], every device giving an equal part of its rows to each micro-batch."""
    return Batch(*(field.reshape(-1, count, *field.shape[1:]).swapaxes(0, 1) for field in batch))


def make_heldout_loss(
    config: RunConfig, mesh: Mesh
) -> Callable[[dict[str, jax.Array], Iterable[Batch]], dict[str, float]]:
    """A function (parameters, whole batches, the same in each process) → mean loss and accuracy per target token."""
    specs = declare_parameters(config.model)
    compute_dtype = resolve_compute_dtype(config)

    def sums(parameters: dict[str, jax.Array], batch: Batch) -> LossSums:
        logits = bind(config.model, parameters, compute_dtype)(batch)
        return sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)

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


class OnMesh:
    """A jitted function with the mesh in context, so that activations can be constrained by axis names."""

    def __init__(self, mesh: Mesh, jitted: Any):
        self.mesh, self.jitted = mesh, jitted

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """The program for arguments of these shapes, types and shardings, to be called instead."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args).compile()
