"""Learned growth: the maps of a plan are trained for some updates before they make the grown model (LiGO).

The maps begin at the lossless ones, only they are trained, with the loss, the optimizer's form and the data that
training has, and all parameters of the grown model follow from them and the source's. What comes out is another
function than the source's; in exchange its loss begins lower. LiGO: Wang et al. 2023, “Learning to Grow Pretrained
Models for Efficient Transformer Training”, ICLR; there the maps begin elsewhere and nothing is kept without loss.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from growth.choices import LearnedMaps
from growth.dense_maps import Deltas, count_map_flops, deviate, init_deltas
from growth.leaves import WEIGHTS
from growth.state import grow_state
from growth.t5 import ModelGrowth
from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import OptimizerConfig, RunConfig
from t5pegasus.errors import DivergedError, UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.progress import Progress
from t5pegasus.sharding import (
    batch_shardings,
    check_batch_divides,
    local_batch_rows,
    param_shardings,
    place_batch,
)
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.gradients import pure_gradients
from t5pegasus.train.metrics import count_flops
from t5pegasus.train.on_mesh import OnMesh
from t5pegasus.train.optimizer.adamw import adamw_direction
from t5pegasus.train.state import TrainState

Parameters = Mapping[str, Any]
_ADAM = OptimizerConfig(beta1=0.9, beta2=0.98, epsilon=1e-8)
_MATRIX = ParamSpec(axes=(), contracted=(), gain=False, shape=())
"""Of the maps: no axis that grew, so that the optimizer's multipliers are ones."""


@dataclasses.dataclass(frozen=True)
class MapTraining:
    """What training the maps was, and cost."""

    steps: int
    batch_size: int
    num_maps: int
    """Entries of all matrices."""
    losses: tuple[float, ...]
    """Nats per target token before each update, each on its own batch; the first one is the lossless growth's."""
    lossless_loss: float
    """Of the lossless growth on the batch of the last update, whose loss is `losses[-1]`."""
    flops: int
    """Spent on it (`count_training_flops`)."""

    def __str__(self) -> str:
        return (
            f"maps of {self.num_maps:,} entries trained for {self.steps} updates of {self.batch_size} rows; "
            f"loss on the last of them {self.losses[-1]:.4f}, without learning {self.lossless_loss:.4f}; "
            f"{self.flops:.3g} FLOPs"
        )


class LearnedState(NamedTuple):
    """What `learn_growth` gives."""

    state: TrainState
    training: MapTraining


def learn_growth(
    state: TrainState, growth: ModelGrowth, config: RunConfig, batches: Iterable[Batch], mesh: Mesh
) -> LearnedState:
    """Grow a state by maps that are trained first; all of it is held in the host's memory.

        growth = plan_growth(model, target, {"learned": {"steps": 100}})
        state, training = learn_growth(state, growth, config, batches, mesh)

    Parameters and their moving average come from the trained maps. Moments and the record of multipliers are those of
    the lossless growth by the plan's state policy: the gradients of a changed function have no exact rule.

    Args:
        state: of the source model, NumPy arrays or arrays that this process can read.
        growth: where to, with `choices.learned`.
        config: of the source's run: loss, dropout, micro-batches and precision of the training.
        batches: whole batches of `find_batch_size(growth, config)` rows, at least as many as there are updates. With
            several processes each gives all rows of the same batches.
        mesh: where to train; source and grown model must divide over it.

    Returns:
        The grown state, NumPy arrays, and what its training was.

    Raises:
        UsageError: if the plan has no learned maps, the mesh does not divide a size, or there are too few batches.
        DivergedError: if the loss is not finite.
    """
    lossless = grow_state(state, growth.lossless)
    deltas, training = train_maps(state.parameters, lossless.parameters, growth, config, batches, mesh)
    groups = {
        group: apply_maps(getattr(state, group), getattr(lossless, group), growth, deltas)
        for group in WEIGHTS
        if getattr(state, group)
    }
    return LearnedState(lossless._replace(**groups), training)


def find_batch_size(growth: ModelGrowth, config: RunConfig) -> int:
    """Rows of each batch: the plan's, or else those of the source's run."""
    return _learned(growth).batch_size or config.train.batch_size


def count_training_flops(growth: ModelGrowth, config: RunConfig) -> int:
    """FLOPs of training the maps: the grown model's own training steps, and the products that make its parameters.

    One update more than there are is counted: that of the lossless growth, for comparison.

    Args:
        growth: the plan.
        config: of the source's run.
    """
    steps, batch_size = _learned(growth).steps + 1, find_batch_size(growth, config)
    of_model = count_flops(dataclasses.replace(config, model=growth.target), steps * batch_size)
    return of_model + 3 * steps * count_map_flops(growth.specs, growth.plan.maps)  # back twice as much as forward


def apply_maps(
    source: Parameters, lossless: Mapping[str, np.ndarray], growth: ModelGrowth, deltas: Deltas
) -> dict[str, np.ndarray]:
    """The parameters that trained maps make, on the host.

    Args:
        source: the source's parameters, or their average.
        lossless: the same, grown without loss.
        growth: the plan.
        deltas: what training added to its maps.
    """
    grown = dict(lossless)
    for name, spec in growth.specs.items():
        moved = deviate(np.asarray(source[name]), spec, growth.plan.maps, deltas)
        if moved is not None:
            grown[name] = (lossless[name] + moved).astype(lossless[name].dtype)
    return grown


def train_maps(
    source: Parameters, lossless: Parameters, growth: ModelGrowth, config: RunConfig, batches: Iterable[Batch],
    mesh: Mesh,
) -> tuple[Deltas, MapTraining]:  # fmt: skip
    """Train the maps of a plan on a mesh: source and grown parameters are split over it, the maps on every device.

    Args:
        source: the source's parameters.
        lossless: grown without loss.
        growth: the plan.
        config: see `learn_growth`.
        batches: see `learn_growth`.
        mesh: see `learn_growth`.

    Returns:
        What training added to the maps, NumPy arrays, and what it was.

    Raises:
        UsageError: if the plan has no learned maps, the mesh does not divide a size, or there are too few batches.
        DivergedError: if the loss is not finite.
    """
    choices, batch_size = _learned(growth), find_batch_size(growth, config)
    config = dataclasses.replace(config, model=growth.target)
    check_batch_divides(batch_size, config.train.accumulation_steps, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    layouts = param_shardings(growth.specs, mesh), param_shardings(declare_parameters(growth.target), mesh)
    placed = tuple(
        {name: jax.device_put(np.asarray(each[name]), layout[name]) for name in layout}
        for each, layout in zip((source, lossless), layouts)
    )
    dtype = np.result_type(*(array.dtype for array in placed[0].values()))
    deltas = init_deltas(growth.specs, growth.plan.maps, dtype)

    def begin() -> MapState:
        return jax.device_put(MapState(*(jax.tree.map(np.zeros_like, deltas) for _ in range(3))), everywhere)

    state, whole = begin(), None

    update = OnMesh(
        mesh,
        jax.jit(
            pure_map_step(growth, config, resolve_compute_dtype(config)),
            in_shardings=(everywhere, *layouts, batch_shardings(mesh), everywhere),
            out_shardings=(everywhere, everywhere),
            donate_argnums=0,
        ),
    )
    rows, losses, batches = local_batch_rows(batch_size, mesh), [], iter(batches)
    with Progress("maps", total=choices.steps, unit="updates", shown=jax.process_index() == 0) as progress:
        for step in range(choices.steps):
            batch = next(batches, None)
            if batch is None:
                raise UsageError(f"learned: {step} batches were given, {choices.steps} are wanted, one for each update")
            if len(batch.row_ids) != batch_size:
                raise UsageError(f"learned: a batch has {len(batch.row_ids)} rows, {batch_size} were wanted")
            whole = place_batch(jax.tree.map(lambda field: np.asarray(field)[rows], batch), rows, batch_size, mesh)
            state, loss = update(state, *placed, whole, np.int32(step))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise DivergedError(
                    f"learned: the loss is {losses[-1]} at update {step} of the maps; give a "
                    f"learned.learning_rate below {choices.learning_rate:g}"
                )
            progress.advance(1)
    _, lossless_loss = update(begin(), *placed, whole, np.int32(0))
    found = jax.tree.map(np.asarray, state.deltas)
    training = MapTraining(
        steps=choices.steps,
        batch_size=batch_size,
        num_maps=sum(each.size for each in jax.tree.leaves(found)),
        losses=tuple(losses),
        lossless_loss=float(lossless_loss),
        flops=count_training_flops(growth, config),
    )
    return found, training


class MapState(NamedTuple):
    """The maps and their optimizer's state, by axis and role."""

    deltas: Deltas
    first_moment: Deltas
    second_moment: Deltas


def pure_map_step(growth: ModelGrowth, config: RunConfig, compute_dtype: Any) -> Any:
    """The update (map state, source, lossless parameters, batch, step) → (map state, loss) as a pure function.

    Adam, its rate falling linearly to 0. A row of a map has an entry for each of the d entries of the source's axis,
    and what it makes moves with their sum: the rate is divided by √d, so that it is the length that a row of about
    length 1 moves by, whatever the size.
    """
    choices, find_loss = _learned(growth), pure_map_gradients(growth, config, compute_dtype)

    def update(
        state: MapState, source: Parameters, lossless: Parameters, batch: Batch, step: jax.Array
    ) -> tuple[MapState, jax.Array]:
        loss, gradients = find_loss(state.deltas, source, lossless, batch)
        rate = choices.learning_rate * (1 - step / choices.steps)
        count = (step + 1).astype(jnp.result_type(float))

        def move(delta: jax.Array, gradient: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, ...]:
            before = {"first_moment": first, "second_moment": second}
            direction, after = adamw_direction(_ADAM, _MATRIX, {}, delta, gradient, before, count)
            moved = delta - rate / math.sqrt(delta.shape[1]) * direction
            return tuple(each.astype(delta.dtype) for each in (moved, after["first_moment"], after["second_moment"]))

        leaves, structure = jax.tree.flatten(state.deltas)
        others = (jax.tree.leaves(each) for each in (gradients, state.first_moment, state.second_moment))
        moved = [move(*each) for each in zip(leaves, *others)]
        return MapState(*(jax.tree.unflatten(structure, each) for each in zip(*moved))), loss

    return update


def pure_map_gradients(growth: ModelGrowth, config: RunConfig, compute_dtype: Any) -> Any:
    """(maps, source, lossless parameters, batch) → (loss in nats per target token, gradients of the maps)."""
    find_gradients = pure_gradients(config, compute_dtype)

    def find_loss(deltas: Deltas, source: Parameters, lossless: Parameters, batch: Batch) -> tuple[jax.Array, Deltas]:
        def make(deltas: Deltas) -> dict[str, jax.Array]:
            moved = {name: deviate(source[name], spec, growth.plan.maps, deltas) for name, spec in growth.specs.items()}
            return {name: lossless[name] + each for name, each in moved.items() if each is not None}

        made, pull_back = jax.vjp(make, deltas)
        gradients, sums = find_gradients(made, lossless, batch)
        return sums.nll / jnp.maximum(1.0, sums.weight), pull_back(gradients)[0]

    return find_loss


def _learned(growth: ModelGrowth) -> LearnedMaps:
    choices = growth.plan.choices.learned
    if choices is None:
        raise UsageError('the plan has no learned maps; give it {"learned": {"steps": 100}}, or grow with grow_state')
    return choices
