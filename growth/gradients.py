"""Whether growth maps gradients as it says, and whether what it added learns: in float64, on one batch.

A grown parameter is an affine function θ' = G(θ) of the source's: s·θ at kept entries and copies, plus noise that
cancels whatever θ is, plus created entries that change nothing whatever θ is. So L'(G(θ)) = L(θ) for every θ, and by
the chain rule Σ s·g' = g over the copies of each entry. Where copies are not parted by noise also g' = r·g, entry
by entry (theory T5), which is what moments are mapped by: an uneven split of equal copies of the stream keeps the
function, and with it the sums, but not this. It is therefore asked of the same plan without noise.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growth.leaves import grow_arrays
from growth.logits import NUM_PERMUTATIONS, LogitComparison, Rewriting, draw_rewritings, rewrite
from growth.operators import KINDS
from growth.receipt import GradientMap, LogitDifference
from growth.t5 import ModelGrowth
from t5pegasus.axes import ParamSpec, dual_multipliers, logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.train.loss import sum_losses

Arrays = Mapping[str, Any]

_COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""Most of the time that these programs take is their compilation."""


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
    specs = growth.specs
    wide = {name: np.asarray(array, np.float64) for name, array in source.items()}
    rewritings = draw_rewritings(specs, seed)
    gradients, logits = source_gradients(growth.source, wide, rewritings.unchanged, batch)
    gradients = {name: np.asarray(each) for name, each in gradients.items()}
    floor, others = 0.0, []
    for each in rewritings.permuted:
        permuted, other = source_gradients(growth.source, wide, each, batch)
        floor = max(floor, *(error for error, _ in _errors(permuted, gradients)))
        others.append(np.asarray(other))
    del permuted
    silent = dataclasses.replace(growth.plan, choices=dataclasses.replace(growth.plan.choices, noise=0.0))
    model = same_function(growth.source, target)
    found, _ = grown_gradients(model, grow_arrays("parameters", wide, specs, silent), batch)
    elementwise = max(_errors(*_mask_kept(growth, found, gradients)), default=(0.0, "none"))
    found, grown_logits = grown_gradients(model, grow_arrays("parameters", wide, specs, growth.plan), batch)
    summed = max(_errors(_sum_over_copies(growth, found), gradients))
    comparison = LogitComparison(growth.source.num_open_tokens, 1 + NUM_PERMUTATIONS)
    comparison.add(logits, (grown_logits, *others), batch.decoder_loss_weights)
    return GradientMap(elementwise[0], elementwise[1], summed[0], summed[1], floor), comparison.finish()


def same_function(source: ModelConfig, target: ModelConfig) -> ModelConfig:
    """The grown model with all tokens masked that the source could not write: only so the losses are the same."""
    return dataclasses.replace(target, num_masked_tokens=target.vocab_size - source.num_open_tokens)


def _errors(found: Arrays, wanted: Arrays) -> Iterator[tuple[float, str]]:
    """For each parameter the largest error, relative to its largest gradient, or to the largest of all if that is 0."""
    sizes = {name: float(np.max(np.abs(each))) for name, each in wanted.items()}
    for name, size in sizes.items():
        error = float(np.max(np.abs(np.asarray(found[name]) - wanted[name])))
        relative = error / (size or max(sizes.values()) or 1.0)
        yield (np.inf if np.isnan(relative) else relative), name


def _mask_kept(growth: ModelGrowth, found: Arrays, gradients: Arrays) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is found and wanted where g' = r·g: at entries that the source had, in parameters without a refined table.

    (Which of its rows a bucket's gradient falls to is decided by the distances in the data.)
    """
    got, wanted = {}, {}
    for name, spec in growth.specs.items():
        if any(axis in growth.plan.maps and KINDS[logical_axis(axis)] == "table" for axis in spec.axes):
            continue
        expected, mask = gradients[name], np.ones((1,) * len(spec.axes), bool)
        for place, axis, entry in _growing(spec, growth):
            expected = np.take(expected, entry.sources, axis=place)
            expected = expected * _along(dual_multipliers(axis, spec, entry)[1], place, spec)
            mask = mask & _along(~entry.created, place, spec)
        wanted[name] = np.where(mask, expected, 0.0)
        got[name] = np.where(mask, np.asarray(found[name]), 0.0)
    return got, wanted


def _sum_over_copies(growth: ModelGrowth, found: Arrays) -> dict[str, np.ndarray]:
    summed = {}
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
        summed[name] = total
    return summed


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
    logits = bind(config, parameters, jnp.float64)(batch)
    sums = sum_losses(logits, batch.decoder_target_tokens, batch.decoder_loss_weights)
    return sums.nll / sums.weight, logits
