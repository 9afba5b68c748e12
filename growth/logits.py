"""How far growth moves logits, and how far mere rounding does.

A permutation of stream, units and heads changes nothing but the order of sums. How far it moves the logits of
the source model is the floor below which “the same function” cannot be told in this precision on this device.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from growth.expand import along
from growth.operators import KINDS
from growth.receipt import LogitDifference, NewTokens
from growth.t5 import ModelGrowth
from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.model.t5 import bind, declare_parameters

NUM_PERMUTATIONS = 8

Arrays = Mapping[str, Any]


class Rewriting(NamedTuple):
    """Another way to write the same model down."""

    orders: Mapping[str, np.ndarray]
    """By axis: the place that each entry is taken from."""
    scales: Mapping[str, np.ndarray]
    """By axis: what is multiplied where the axis is written, or in gains, and divided where it is read."""


class Rewritings(NamedTuple):
    """The model as it is, and in other orders; and in these with its weights rescaled, too."""

    unchanged: Rewriting
    permuted: list[Rewriting]
    rescaled: list[Rewriting]


def draw_rewritings(specs: Mapping[str, ParamSpec], seed: int) -> Rewritings:
    """NUM_PERMUTATIONS random orders of every axis whose order means nothing, and as many with random scales.

    Scales are not powers of two, so that weights are rounded anew when they become activations' narrower type: that is
    rounding, too, and where sums are so short that their order hardly matters it is nearly all there is.
    """
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    free = {axis: size for axis, size in sorted(sizes.items()) if KINDS[logical_axis(axis)] in ("stream", "units")}
    ones = {axis: np.ones(size) for axis, size in free.items()}
    randoms = [np.random.default_rng((seed, draw)) for draw in range(NUM_PERMUTATIONS)]
    orders = [{axis: random.permutation(size) for axis, size in free.items()} for random in randoms]
    scales = [
        {axis: random.uniform(1, 2, size) if _scales(axis) else ones[axis] for axis, size in free.items()}
        for random in randoms
    ]
    rescaled = [Rewriting(*each) for each in zip(orders, scales)]
    unchanged = Rewriting({axis: np.arange(size) for axis, size in free.items()}, ones)
    return Rewritings(unchanged, [Rewriting(order, ones) for order in orders], rescaled)


def _scales(axis: str) -> bool:
    """Whether what is written there only meets what reads it in a product: not so where a function lies between."""
    return logical_axis(axis) in ("embed", "qk", "vo")


def rewrite(parameters: Arrays, specs: Mapping[str, ParamSpec], rewriting: Rewriting) -> dict[str, jax.Array]:
    """The same model, with the entries of some axes in another order and scaled, in every parameter that has them."""
    rewritten = dict(parameters)
    for name, spec in specs.items():
        for dimension, axis in enumerate(spec.axes):
            if axis not in rewriting.orders:
                continue
            array = jnp.take(rewritten[name], rewriting.orders[axis], axis=dimension, mode="clip")
            scale = along(rewriting.scales[axis], dimension, array.ndim).astype(array.dtype)
            is_stream = KINDS[logical_axis(axis)] == "stream"
            if axis in spec.contracted:
                array = array / scale
            elif (spec.gain if is_stream else not spec.gain) and axis not in spec.meets_written:
                array = array * scale
            rewritten[name] = array
    return rewritten


class LogitComparison:
    """Sums over batches of what grown and permuted models disagree on with the source, at the source's open tokens."""

    def __init__(self, num_tokens: int, num_models: int):
        self._num_tokens = num_tokens
        self._largest, self._squares = np.zeros(num_models), np.zeros(num_models)
        self._scale = self._count = 0.0

    def add(self, source: Any, others: Iterable[Any], weights: np.ndarray) -> None:
        """Take one batch.

        Args:
            source: logits [batch, target, vocab].
            others: those of the grown model, of each permutation, and perhaps of each rescaled one.
            weights: [batch, target], 0 where nothing is predicted.
        """
        counted = np.asarray(weights) > 0
        reference = np.asarray(source)[counted][:, : self._num_tokens]
        for place, other in enumerate(others):
            difference = np.asarray(other)[counted][:, : self._num_tokens] - reference
            self._largest[place] = np.maximum(self._largest[place], np.max(np.abs(difference), initial=0.0))
            self._squares[place] += np.sum(np.square(difference, dtype=np.float64))
        self._scale = max(self._scale, float(np.max(np.abs(reference), initial=0.0)))
        self._count += reference.size

    def finish(self) -> LogitDifference:
        """What was found."""
        roots = np.sqrt(self._squares / self._count)
        largest, root, end = self._largest, roots, 1 + NUM_PERMUTATIONS
        return LogitDifference(
            maximum=float(largest[0]),
            root_mean_square=float(root[0]),
            floor_maximum=float(largest[1:end].max()),
            floor_root_mean_square=float(root[1:end].max()),
            rescaled_maximum=float(largest[end:].max()) if len(largest) > end else None,
            rescaled_root_mean_square=float(root[end:].max()) if len(largest) > end else None,
            largest_logit=self._scale,
        )


def compare_logits(
    growth: ModelGrowth,
    source: Arrays,
    grown: Arrays,
    batches: Sequence[Batch],
    seed: int,
    dtype: Any,
    losses: "Losses | None" = None,
) -> LogitDifference:
    """Compare grown and permuted models with the source, in one precision of activations.

    Args:
        growth: between the two.
        source: parameters.
        grown: parameters.
        batches: to compare on.
        seed: of the permutations.
        dtype: of activations.
        losses: adds up the models' losses, too.
    """
    rewritings = draw_rewritings(growth.specs, seed)
    is_narrow = jnp.dtype(dtype).itemsize < 4
    others = rewritings.permuted + (rewritings.rescaled if is_narrow else [])
    comparison = LogitComparison(growth.source.num_open_tokens, 1 + len(others))
    # TPUs and GPUs would otherwise round the factors of float32 products, and that floor would hide faults.
    with jax.default_matmul_precision("highest"):
        for batch in batches:
            reference = _source_logits(growth.source, dtype, source, rewritings.unchanged, batch)
            after = _grown_logits(growth.target, dtype, grown, batch)
            logits = (_source_logits(growth.source, dtype, source, each, batch) for each in others)
            comparison.add(reference, itertools.chain([after], logits), batch.decoder_loss_weights)
            if losses is not None:
                losses.add(np.asarray(reference), np.asarray(after), batch)
    return comparison.finish()


class Losses:
    """Sums over batches of both models' losses, and of the probability that new tokens take; float64."""

    def __init__(self, growth: ModelGrowth):
        self._growth = growth
        self._source = self._grown = self._added = self._masked = self.num_tokens = 0.0

    def add(self, source: np.ndarray, grown: np.ndarray, batch: Batch) -> None:
        """Take one batch's logits [batch, target, vocab] of both models."""
        counted = np.asarray(batch.decoder_loss_weights) > 0
        weights = np.asarray(batch.decoder_loss_weights, np.float64)[counted]
        targets = np.asarray(batch.decoder_target_tokens)[counted]
        num_old = self._growth.source.num_open_tokens
        before, after = source[counted][:, :num_old], grown[counted]
        self._source += weights @ (_log_sum(before) - _at(before, targets))
        self._grown += weights @ (_log_sum(after) - _at(after, targets))
        self.num_tokens += weights.sum()
        if after.shape[1] > num_old:
            log_share = _log_sum(after[:, num_old:]) - _log_sum(after[:, :num_old])
            self._added += weights @ np.log1p(np.exp(log_share))
            self._masked = max(self._masked, float(np.max(np.exp(log_share), initial=0.0)))

    @property
    def source_nll(self) -> float:
        """Nats per target token."""
        return float(self._source / self.num_tokens)

    @property
    def difference(self) -> float:
        """By how much the loss of the grown model is larger."""
        return float((self._grown - self._source) / self.num_tokens)

    def new_tokens(self) -> NewTokens | None:
        """What tokens do that the source could not write; None if there are none."""
        source, target = self._growth.source, self._growth.target
        number = target.vocab_size - source.num_open_tokens
        if (source.vocab_size, source.num_masked_tokens) == (target.vocab_size, target.num_masked_tokens):
            return None
        rows = self._growth.plan.maps["vocab"].mixtures if "vocab" in self._growth.plan.maps else ()
        bounded = bool(rows) and all(each is None for each in rows)
        return NewTokens(
            number=number,
            masked=target.num_masked_tokens == number,
            largest_probability_ratio=self._masked,
            mean_log_added_mass=float(self._added / self.num_tokens),
            bound=math.log1p(len(rows) / source.vocab_size) if bounded else None,
        )


def _log_sum(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True).astype(np.float64)
    return top[:, 0] + np.log(np.sum(np.exp(logits - top), axis=1))


def _at(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0].astype(np.float64)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _source_logits(
    config: ModelConfig, dtype: Any, parameters: Arrays, rewriting: Rewriting, batch: Batch
) -> jax.Array:
    return bind(config, rewrite(parameters, declare_parameters(config), rewriting), dtype)(batch)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grown_logits(config: ModelConfig, dtype: Any, parameters: Arrays, batch: Batch) -> jax.Array:
    return bind(config, parameters, dtype)(batch)
