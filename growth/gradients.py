"""Whether growth maps gradients as it says, and whether what it added learns: in float64, on one batch.

A grown parameter is an affine function θ' = G(θ) of the source's: s·θ at kept entries and copies, plus noise that
cancels whatever θ is, plus created entries that change nothing whatever θ is. So L'(G(θ)) = L(θ) for every θ, and by
the chain rule Σ s·g' = g over the copies of each entry. Where copies are not parted by noise also g' = r·g, entry
by entry (theory T5), which is what moments are mapped by: an uneven split of equal copies of the stream keeps the
function, and with it the sums, but not this. It is therefore asked of the same plan without noise.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growth.leaves import grow_arrays
from growth.logits import NUM_PERMUTATIONS, LogitComparison, Rewriting, draw_rewritings, rewrite
from growth.operators import KINDS
from growth.plan import GrowthPlan
from growth.receipt import GradientMap, LogitDifference
from growth.t5 import ModelGrowth
from t5pegasus.axes import ParamSpec, dual_multipliers, logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.model.execution import Execution
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.train.loss import sum_losses

Arrays = Mapping[str, Any]

_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""Most of the time that these programs take is their compilation."""
_EXECUTION = Execution(remat="full")
"""Activations in float64 would otherwise take more memory than the parameters do."""


def check_gradients(
    growth: ModelGrowth, target: ModelConfig, source: Arrays, batch: Batch, seed: int
) -> tuple[GradientMap, LogitDifference]:
    """Compare gradients and logits of the source, grown in float64, with the source's; to be called with 64 bits on.

    Args:
        growth: what was planned.
        target: the grown model as it is stored.
        source: parameters.
        batch: to compare on.
        seed: of the permutations.
    """
    specs, sizes = growth.specs, growth.source
    rewritings = draw_rewritings(specs, seed)
    wide = {name: jnp.asarray(array, jnp.float64) for name, array in source.items()}
    del source  # what is measured is larger than it by far, and should not stand beside what no longer counts
    gradients, logits = source_gradients(sizes, wide, rewritings.unchanged, batch)
    model = same_function(sizes, target)
    silent = dataclasses.replace(growth.plan, choices=dataclasses.replace(growth.plan.choices, noise=0.0))
    found, _ = grown_gradients(model, _grow_parameters(wide, growth.specs, silent), batch)
    elementwise = _largest_error(_pair_kept(growth, found, gradients))
    del found
    found, grown_logits = grown_gradients(model, _grow_parameters(wide, growth.specs, growth.plan), batch)
    summed = _largest_error(_pair_sums(growth, found, gradients))
    del found
    floor = 0.0

    def permute() -> Iterator[jax.Array]:
        nonlocal floor
        for each in rewritings.permuted:
            permuted, permuted_logits = source_gradients(sizes, wide, each, batch)
            floor = max(floor, _largest_error((name, permuted[name], wanted) for name, wanted in gradients.items())[0])
            del permuted
            yield permuted_logits

    comparison = LogitComparison(sizes.num_open_tokens, 1 + NUM_PERMUTATIONS)
    comparison.add(logits, itertools.chain([grown_logits], permute()), batch.decoder_loss_weights)
    return GradientMap(elementwise[0], elementwise[1], summed[0], summed[1], floor), comparison.finish()


def same_function(source: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The grown model with all tokens masked that the source could not write: only so the losses are the same."""
    return dataclasses.replace(target, num_masked_tokens=target.vocab_size - source.num_open_tokens)


def _grow_parameters(source: Arrays, specs: Mapping[str, ParamSpec], plan: GrowthPlan) -> dict[str, jax.Array]:
    """The grown parameters on the device, one after another, so that no second copy of all of them is in memory."""
    return {
        name: jax.device_put(grow_arrays("parameters", {name: array}, specs, plan)[name])
        for name, array in source.items()
    }


def _largest_error(triples: Iterable[tuple[str, Any, Any]]) -> tuple[float, str]:
    """The largest error of all parameters (name, found, wanted), and whose it is; (0, "none") if there are none.

    Each is relative to the parameter's largest gradient, or to the largest of all if that is 0.
    """
    errors = [
        (float(np.max(np.abs(np.asarray(found) - wanted))), float(np.max(np.abs(wanted))), name)
        for name, found, wanted in ((name, found, np.asarray(wanted)) for name, found, wanted in triples)
    ]
    largest = max((size for _, size, _ in errors), default=0.0)
    relative = ((error / (size or largest or 1.0), name) for error, size, name in errors)
    return max(((np.inf if np.isnan(error) else error, name) for error, name in relative), default=(0.0, "none"))


def _pair_kept(growth: ModelGrowth, found: Arrays, gradients: Arrays) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What is found and wanted where g' = r·g: at entries that the source had, in parameters without a refined table.

    (Which of its rows a bucket's gradient falls to is decided by the distances in the data.)
    """
    for name, spec in growth.specs.items():
        if any(axis in growth.plan.maps and KINDS[logical_axis(axis)] == "table" for axis in spec.axes):
            continue
        expected, mask = np.asarray(gradients[name]), np.ones((1,) * len(spec.axes), bool)
        for place, axis, entry in _growing(spec, growth):
            expected = np.take(expected, entry.sources, axis=place)
            expected = expected * _along(dual_multipliers(axis, spec, entry)[1], place, spec)
            mask = mask & _along(~entry.created, place, spec)
        yield name, np.where(mask, np.asarray(found[name]), 0.0), np.where(mask, expected, 0.0)


def _pair_sums(growth: ModelGrowth, found: Arrays, gradients: Arrays) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Σ s·g' over the copies of each entry, which is to be g."""
    for name, spec in growth.specs.items():
        total = np.asarray(found[name])
        for place, axis, entry in _growing(spec, growth):
            if entry.opens:
                continue
            kept = np.flatnonzero(~entry.created)
            kept = kept[np.argsort(entry.sources[kept], kind="stable")]
            starts = np.searchsorted(entry.sources[kept], np.arange(entry.source_size))
            scaled = np.take(total, kept, axis=place) * _along(
                dual_multipliers(axis, spec, entry)[0][kept], place, spec
            )
            total = np.add.reduceat(scaled, starts, axis=place)
        yield name, total, gradients[name]


def _growing(spec: ParamSpec, growth: ModelGrowth) -> Iterator[tuple[int, str, Any]]:
    for place, axis in enumerate(spec.axes):
        if axis in growth.plan.maps:
            yield place, axis, growth.plan.maps[axis]


def _along(vector: np.ndarray, place: int, spec: ParamSpec) -> np.ndarray:
    return np.reshape(vector, [-1 if each == place else 1 for each in range(len(spec.axes))])


@functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILER_OPTIONS)
def source_gradients(
    config: ModelConfig, parameters: Arrays, rewriting: Rewriting, batch: Batch
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradients of the mean loss, and logits, of the model written down in another way."""

    def objective(parameters: Arrays) -> tuple[jax.Array, jax.Array]:
        return _objective(config, rewrite(parameters, declare_parameters(config), rewriting), batch)

    return jax.grad(objective, has_aux=True)(parameters)


@functools.partial(jax.jit, static_argnums=0, compiler_options=_COMPILER_OPTIONS)
def grown_gradients(config: ModelConfig, parameters: Arrays, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
    """Gradients of the mean loss, and logits."""
    return jax.grad(functools.partial(_objective, config), has_aux=True)(parameters, batch)


def _objective(config: ModelConfig, parameters: Arrays, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits = bind(config, parameters, jnp.float64, _EXECUTION)(batch)
    sums = sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)
    return sums.nll / sums.weight, logits
