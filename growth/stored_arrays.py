"""The arrays of a grown checkpoint against a fresh state's, against a second growth, and, in samples, derived anew.

One array is in memory at a time.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growth.dense_maps import MAPS, deviate, load_maps
from growth.derivation import Derivation
from growth.leaves import WEIGHTS, grow_arrays
from growth.moments import factor_second_moment
from growth.receipt import StoredArrays
from growth.t5 import ModelGrowth
from t5pegasus.arrays import open_arrays
from t5pegasus.axes import AxisMultiplier, ParamSpec
from t5pegasus.checkpoint import CheckpointInfo, has_optimizer_state, load_checkpoint_info
from t5pegasus.chunks import StoredArray
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.train.state import start_state, state_to_arrays

_ENTRIES_PER_ARRAY = 32
_ENTRIES_PER_CREATION = 8


def check_arrays(checkpoint_path: Path, grown_path: Path, growth: ModelGrowth) -> StoredArrays:
    """Compare every array, and random entries of every array by an independent derivation.

    Args:
        checkpoint_path: of the source.
        grown_path: of the grown checkpoint, with or without its manifest.
        growth: between the two.
    """
    source, grown = open_arrays(checkpoint_path), open_arrays(grown_path)
    structure = compare_structure(checkpoint_path, source, grown_path, grown, growth)
    random = np.random.default_rng(growth.plan.choices.seed)
    deltas = {} if growth.plan.choices.learned is None else load_maps(grown_path / MAPS)
    errors: list[tuple[float, str]] = [(0.0, "none")]
    derived: list[tuple[float, str]] = [(0.0, "none")]
    num_entries = num_derived = 0
    for array_name, spec, power, array in _source_arrays(source, growth):
        if array_name not in grown or grown[array_name].shape != _grown_shape(spec, growth):
            continue  # which the structure says
        group, _, name = array_name.partition(".")
        stored = grown[array_name].read()
        again = grow_arrays(group, {name: array}, {name: spec}, growth.plan, power=power)[name]
        learned = deviate(array, spec, growth.plan.maps, deltas) if deltas and group in WEIGHTS else None
        wanted = again if learned is None else (again + learned).astype(again.dtype)
        errors.append((_error(stored, wanted, relative=group not in WEIGHTS), array_name))
        lossless = stored if learned is None else again  # of learned maps there is no second derivation
        derivation = Derivation(spec, growth.plan, power, array.astype(np.float64), is_weight=group in WEIGHTS)
        indices = _draw_indices(spec, growth, stored.shape, random)
        # A NaN is not larger than anything, and yet the worst of all.
        derived.append((max((_rank(derivation.error(lossless, index)) for index in indices), default=0.0), array_name))
        num_entries, num_derived = num_entries + stored.size, num_derived + len(indices)
    for array_name, wanted in _derive_records(source, growth):
        if array_name in grown:
            derived.append((_error(grown[array_name].read(), wanted, relative=True), array_name))
            num_derived += wanted.size
    largest, worst = max(errors)
    largest_derived, worst_derived = max(derived)
    return StoredArrays(
        number=len(grown),
        entries=num_entries,
        structure=tuple(structure),
        largest_error=largest,
        worst_array=worst,
        derived=num_derived,
        largest_derived_error=largest_derived,
        worst_derived=worst_derived,
    )


def compare_structure(
    checkpoint_path: Path,
    source: dict[str, StoredArray],
    grown_path: Path,
    grown: dict[str, StoredArray],
    growth: ModelGrowth,
) -> Iterator[str]:
    """What differs between a grown checkpoint and a fresh state of its model, or else from what the source says."""
    info, before = load_checkpoint_info(grown_path), load_checkpoint_info(checkpoint_path)
    yield from _compare_configs(info, before, growth)
    with_ema = any(name.startswith("ema.") for name in source)
    specs = declare_parameters(growth.target)
    fresh = state_to_arrays(
        jax.eval_shape(
            lambda: start_state(init_parameters(growth.target, 0), specs, growth.optimizer, with_ema=with_ema)
        )
    )
    if not has_optimizer_state(checkpoint_path):
        fresh = {name: each for name, each in fresh.items() if name.partition(".")[0] in ("parameters", "ema")}
        fresh |= {name: source[name] for name in ("step", "rows") if name in source}  # a converted one has neither
    for name in sorted(fresh.keys() | grown.keys()):
        if name not in grown or name not in fresh:
            yield f"array {name} is {'surplus' if name in grown else 'absent'}"
        elif (grown[name].shape, grown[name].dtype) != (fresh[name].shape, fresh[name].dtype):
            yield (
                f"array {name} is {grown[name].dtype}{list(grown[name].shape)}, "
                f"{fresh[name].dtype}{list(fresh[name].shape)} was wanted"
            )
    for name in ("step", "rows"):
        if name in grown and int(grown[name].read()) != int(source[name].read()):
            yield f"{name} is {int(grown[name].read())}, the source's {int(source[name].read())} was wanted"


def _compare_configs(info: CheckpointInfo, before: CheckpointInfo, growth: ModelGrowth) -> Iterator[str]:
    if info.config.model != growth.target:
        yield "checkpoint.json holds another model than the plan's target"
    epsilon = before.config.model.layer_norm_epsilon
    for each in growth.plan.axes:
        if each.kind == "stream":
            written = each.map.written[~each.map.created]
            squares = np.bincount(each.map.sources[~each.map.created], written**2)
            epsilon *= float(squares[0]) * each.source / each.target  # theory T1: ε' = ε·c·d/D
    if not math.isclose(info.config.model.layer_norm_epsilon, epsilon, rel_tol=1e-12):
        yield f"layer_norm_epsilon is {info.config.model.layer_norm_epsilon!r}, {epsilon!r} was wanted"


def _source_arrays(
    source: dict[str, StoredArray], growth: ModelGrowth
) -> Iterator[tuple[str, ParamSpec, int, np.ndarray]]:
    """Name, declaration, power of the gradients' multipliers and values of each array, one read at a time."""
    for group, (specs, power) in growth.parts.items():
        for name, spec in specs.items():
            if f"{group}.{name}" in source:
                yield f"{group}.{name}", spec, power, source[f"{group}.{name}"].read()
            elif name in growth.refactored and f"second_moment.{name}" in source:
                factors = factor_second_moment(source[f"second_moment.{name}"].read(), growth.specs[name])
                yield f"{group}.{name}", spec, power, factors[group == "column_moment"]


def _grown_shape(spec: ParamSpec, growth: ModelGrowth) -> tuple[int, ...]:
    maps = growth.plan.maps
    return tuple(maps[axis].size if axis in maps else size for axis, size in zip(spec.axes, spec.shape))


def _error(stored: np.ndarray, wanted: np.ndarray, *, relative: bool) -> float:
    """The largest difference in half units of the last place: of each entry, or of the root mean square of all."""
    if stored.dtype != wanted.dtype or not jnp.issubdtype(stored.dtype, jnp.floating):
        return 0.0 if np.array_equal(stored, wanted) else math.inf
    if np.array_equal(stored, wanted):
        return 0.0
    size = np.abs(wanted)
    if not relative:  # where noise cancels, a sum of larger terms was rounded
        size = np.maximum(size, np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    unit = size * (float(jnp.finfo(stored.dtype).eps) / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.where(stored == wanted, 0.0, np.abs(stored - wanted) / unit)
    return _rank(float(np.max(errors)))


def _rank(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _draw_indices(
    spec: ParamSpec, growth: ModelGrowth, shape: tuple[int, ...], random: np.random.Generator
) -> list[tuple[int, ...]]:
    """Random entries of an array, some of them among those that each axis created."""
    indices: list[Any] = [random.integers(shape) for _ in range(_ENTRIES_PER_ARRAY)]
    for place, axis in enumerate(spec.axes):
        created = growth.plan.maps[axis].created if axis in growth.plan.maps else np.zeros(0, bool)
        if created.any():
            for _ in range(_ENTRIES_PER_CREATION):
                index = random.integers(shape)
                index[place] = random.choice(np.flatnonzero(created))
                indices.append(index)
    return [tuple(int(each) for each in index) for index in indices]


def _derive_records(source: dict[str, StoredArray], growth: ModelGrowth) -> Iterator[tuple[str, np.ndarray]]:
    """The record of each axis, all of its entries."""
    born = growth.plan.born
    for array_name, array in source.items():
        group, _, rest = array_name.partition(".")
        axis, _, field = rest.rpartition(".")
        if group != "multipliers":
            continue
        before = array.read()
        entry = growth.plan.maps.get(axis)
        if entry is None:
            yield array_name, before
            continue
        taken, new = before[entry.sources], entry.created
        factor = {"written": entry.written, "read": entry.read, "ratio": entry.ratio}.get(field, 1.0)
        values = {
            "born": np.where(new | entry.copied, taken if born is None else born, taken),
            "inherited": np.where(new, 0.0, taken),
        }.get(field, np.where(new, 1.0, taken * factor))
        assert field in AxisMultiplier._fields
        yield array_name, values.astype(before.dtype)
