"""The receipt of a growth: how far the grown model's logits are from the source's, and from mere rounding.

A permutation of stream, units and heads changes nothing but the order of sums. How far it moves the logits of
the source model is the floor below which “the same function” cannot be told in this precision on this device.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from growth.t5 import ModelGrowth
from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import SCHEMA, DataConfig, ModelConfig
from t5pegasus.errors import ArtifactError
from t5pegasus.model.t5 import bind, count_parameters, declare_parameters
from t5pegasus.train.loss import sum_losses

NUM_PERMUTATIONS = 8
LARGEST_FLOOR_RATIO = 2.0
"""Accepted are differences up to twice the largest of the permutations'."""

Arrays = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What was measured before and after a growth, in float32."""

    plan_hash: str
    function_class: str
    evidence: str
    """What the models were compared on."""
    num_target_tokens: int
    max_logit_difference: float
    rms_logit_difference: float
    floor_max_logit_difference: float
    """The largest over the permutations."""
    floor_rms_logit_difference: float
    num_permutations: int
    floor_ratio: float
    """max_logit_difference over its floor."""
    source_nll: float
    """Nats per target token."""
    nll_difference: float
    source_parameters: int
    grown_parameters: int
    grown_bytes: int
    """Of all arrays of the grown state."""

    def to_json(self) -> dict[str, Any]:
        """The receipt as the checkpoint keeps it, without times, so that equal growths give equal bytes."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        bitwise = ", bitwise equal" if self.max_logit_difference == 0 else ""
        return (
            f"max |Δlogit| {self.max_logit_difference:.1e} ({self.floor_ratio:.2f} × the permutation floor "
            f"{self.floor_max_logit_difference:.1e}{bitwise}), ΔNLL {self.nll_difference:+.1e} on "
            f"{self.num_target_tokens:,} target tokens ({self.evidence}), parameters {self.source_parameters:,} → "
            f"{self.grown_parameters:,}, plan {self.plan_hash[:12]}"
        )


def measure_growth(
    plan: ModelGrowth, source: Arrays, grown: Arrays, batches: Sequence[Batch], evidence: str, grown_bytes: int
) -> Receipt:
    """Compare source and grown model on batches, and the source with permutations of itself.

    Args:
        plan: what was done.
        source: the source's parameters by name.
        grown: the grown model's.
        batches: what to compare on; padding does not count.
        evidence: what the batches are, for the receipt.
        grown_bytes: size of the grown state, for the receipt.
    """
    specs = declare_parameters(plan.source)
    orders = [
        _draw_orders(specs, np.random.default_rng((plan.plan.choices.seed, draw))) for draw in range(NUM_PERMUTATIONS)
    ]
    unchanged = {axis: np.arange(len(order)) for axis, order in orders[0].items()}
    source, grown = jax.device_put((source, grown))
    growth, floors = _Difference(), [_Difference() for _ in orders]
    # TPUs and GPUs would otherwise round the factors of float32 products, and that floor would hide faults.
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            reference = _permuted_logits(plan.source, source, unchanged, batch)
            growth = growth.add(_compare(reference, _logits(plan.target, grown, batch), batch))
            for draw, order in enumerate(orders):
                permuted = _permuted_logits(plan.source, source, order, batch)
                floors[draw] = floors[draw].add(_compare(reference, permuted, batch))
    floor = float(np.max([each.largest for each in floors]))
    return Receipt(
        plan_hash=plan.hash,
        function_class=plan.plan.promise,
        evidence=evidence,
        num_target_tokens=int(growth.weight),
        max_logit_difference=growth.largest,
        rms_logit_difference=growth.root_mean_square(plan.source),
        floor_max_logit_difference=floor,
        floor_rms_logit_difference=max(each.root_mean_square(plan.source) for each in floors),
        num_permutations=len(floors),
        floor_ratio=float(np.divide(growth.largest, floor)) if growth.largest else 0.0,
        source_nll=growth.source_nll / growth.weight,
        nll_difference=(growth.other_nll - growth.source_nll) / growth.weight,
        source_parameters=count_parameters(plan.source),
        grown_parameters=count_parameters(plan.target),
        grown_bytes=grown_bytes,
    )


def check_receipt(receipt: Receipt) -> None:
    """Refuse a growth that changed more than rounding does.

    Raises:
        ArtifactError: if the logits moved by over `LARGEST_FLOOR_RATIO` times the floor or are not finite.
    """
    if not math.isfinite(receipt.source_nll):
        raise ArtifactError(
            f"the source's loss on {receipt.evidence} is {receipt.source_nll}, a finite one was wanted; "
            "grow an earlier checkpoint of the run"
        )
    limit = LARGEST_FLOOR_RATIO * receipt.floor_max_logit_difference
    if not receipt.max_logit_difference <= limit:
        raise ArtifactError(
            f"the grown model is not the source's equal: max |Δlogit| is {receipt.max_logit_difference:.2e}, "
            f"at most {LARGEST_FLOOR_RATIO} × the permutation floor = {limit:.2e} was wanted; nothing was "
            f"written. Growth is at fault, not the checkpoint: please report plan {receipt.plan_hash[:12]}"
        )


def permute_entries(parameters: Arrays, specs: Mapping[str, ParamSpec], orders: Arrays) -> dict[str, jax.Array]:
    """The same model with the entries of some axes in another order, in every parameter that has them."""
    permuted = dict(parameters)
    for name, spec in specs.items():
        for dimension, axis in enumerate(spec.axes):
            if axis in orders:
                permuted[name] = jnp.take(permuted[name], orders[axis], axis=dimension, mode="clip")
    return permuted


def draw_batches(config: ModelConfig, data: DataConfig, seed: int) -> list[Batch]:
    """Eight rows of uniformly random tokens, for a growth without held-out text."""
    num_rows, num_source, num_target = 8, min(64, data.max_source_tokens), min(32, data.max_target_tokens)
    random = np.random.default_rng(seed)
    source = random.integers(config.vocab_size, size=(num_rows, num_source), dtype=np.int32)
    target = random.integers(config.vocab_size, size=(num_rows, num_target), dtype=np.int32)
    start = np.full((num_rows, 1), config.decoder_start_token_id, np.int32)
    return [
        Batch(
            encoder_input_tokens=source,
            encoder_segment_ids=np.ones_like(source),
            encoder_positions=np.tile(np.arange(num_source, dtype=np.int32), (num_rows, 1)),
            decoder_input_tokens=np.concatenate([start, target[:, :-1]], axis=1),
            decoder_target_tokens=target,
            decoder_loss_weights=np.ones(target.shape, np.float32),
            decoder_segment_ids=np.ones_like(target),
            decoder_positions=np.tile(np.arange(num_target, dtype=np.int32), (num_rows, 1)),
            row_ids=np.arange(num_rows, dtype=np.uint32),
        )
    ]


class _Difference(NamedTuple):
    """Sums over batches of what two models disagree on."""

    largest: float = 0.0
    square: float = 0.0
    source_nll: float = 0.0
    other_nll: float = 0.0
    weight: float = 0.0

    def add(self, other: Iterable[Any]) -> "_Difference":
        largest, *sums = (float(value) for value in other)
        # max() passes over a NaN that stands second; np.maximum does not.
        return _Difference(float(np.maximum(self.largest, largest)), *map(sum, zip(self[1:], sums)))

    def root_mean_square(self, config: ModelConfig) -> float:
        return math.sqrt(self.square / (self.weight * config.vocab_size))


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, parameters: Arrays, batch: Batch) -> jax.Array:
    return bind(config, parameters)(batch)


@functools.partial(jax.jit, static_argnums=0)
def _permuted_logits(config: ModelConfig, parameters: Arrays, orders: Arrays, batch: Batch) -> jax.Array:
    return bind(config, permute_entries(parameters, declare_parameters(config), orders))(batch)


@jax.jit
def _compare(reference: jax.Array, other: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    counted = (batch.decoder_loss_weights > 0)[..., None]
    difference = jnp.where(counted, other - reference, 0.0)
    before, after = (
        sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights) for logits in (reference, other)
    )
    square = jnp.sum(jnp.square(difference))
    # XLA's maximum passes over NaN on some devices (of NaN alone it is -inf on the CPU); a sum never does.
    largest = jnp.where(jnp.isfinite(square), jnp.max(jnp.abs(difference)), jnp.nan)
    return largest, square, before.nll, after.nll, before.weight


def _draw_orders(specs: Mapping[str, ParamSpec], random: np.random.Generator) -> dict[str, np.ndarray]:
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    free = ("embed", "mlp", "heads", "qk", "vo")
    return {axis: random.permutation(size) for axis, size in sorted(sizes.items()) if logical_axis(axis) in free}
