"""Maps of axes as dense matrices, which training may lead away from the lossless map (LiGO; Wang et al. 2023).

Every axis that grows has one matrix for each role: `written` for parameters that write it, `read` for those that sum
over it; a stack's layers have one for parameters that write the stream, `writers`, and one for the `others`. All
parameters of a role share it, so that a few numbers decide the whole model. With M₀ the lossless maps and Δ what
training added, a grown parameter is

    θ' = θ'₀ + E(θ; M₀ + Δ) − E(θ; M₀),

E being the product of the maps along the dimensions and θ'₀ the lossless growth, with all that is random in it. The
difference is never taken: it is summed up dimension by dimension, so that it is exactly 0 where Δ is, and nothing
cancels. Gains have lossless widths; tables (vocabulary, buckets) have rows that are the plan's.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from growth.expand import Array, gather, scale
from growth.index_map import IndexMap
from growth.operators import KINDS, Maps, writes_stream
from t5pegasus.axes import ParamSpec, dual_multipliers, logical_axis
from t5pegasus.errors import reading
from t5pegasus.storage import flush

MAPS = "maps.npz"
"""In a checkpoint that was grown by learned maps: what they learned, one matrix per axis and role, `AXIS/ROLE`."""

Deltas = dict[str, dict[str, Any]]
"""Axis → role → [grown size, source size]: what training added to the lossless map."""


def init_deltas(
    specs: Mapping[str, ParamSpec], maps: Maps, dtype: Any = np.float32, kinds: Mapping[str, str] = KINDS
) -> Deltas:
    """Zeros for every matrix that some parameter of the model has: the lossless growth.

    Args:
        specs: declarations of the source's parameters.
        maps: the axes that grow.
        dtype: of the matrices.
        kinds: kind of each logical axis.
    """
    deltas: Deltas = {}
    for spec in specs.values():
        for axis, role, _ in _dense_axes(spec, maps, kinds):
            shape = (maps[axis].size, maps[axis].source_size)
            deltas.setdefault(axis, {}).setdefault(role, np.zeros(shape, dtype))
    return {axis: dict(sorted(roles.items())) for axis, roles in sorted(deltas.items())}


def deviate(
    array: Array, spec: ParamSpec, maps: Maps, deltas: Mapping[str, Mapping[str, Array]],
    kinds: Mapping[str, str] = KINDS,
) -> Array | None:  # fmt: skip
    """E(θ; M₀ + Δ) − E(θ; M₀): what has to be added to a parameter that was grown without loss.

    Along each dimension with lossless map M and A = E(θ; M₀), B = the deviation, both over the dimensions before:
    B ← M B + Δ (A + B), A ← M A.

    Args:
        array: the source's parameter θ, NumPy or JAX.
        spec: its declaration.
        maps: the axes that grow.
        deltas: what training added to their maps.
        kinds: kind of each logical axis.

    Returns:
        An array of the grown shape and the source's kind and dtype; None where no matrix acts on the parameter.
    """
    roles = {place: (axis, role) for axis, role, place in _dense_axes(spec, maps, kinds)}
    if not roles:
        return None
    kept, moved = array, None
    for place in _order(spec, kinds):
        axis = spec.axes[place]
        if axis not in maps:
            continue
        added = None
        if place in roles:
            delta = deltas[axis][roles[place][1]]
            added = _multiply(delta, kept if moved is None else kept + moved, place)
            added = scale(added, _at(place, array.ndim, _relative_scale(axis, spec, maps[axis], kinds)))
        if moved is not None:
            moved = _follow(moved, place, spec, maps[axis], kinds)
        if added is not None:
            moved = added if moved is None else moved + added
        kept = _follow(kept, place, spec, maps[axis], kinds)
    return moved


def count_map_flops(specs: Mapping[str, ParamSpec], maps: Maps, kinds: Mapping[str, str] = KINDS) -> int:
    """FLOPs of `deviate` over all parameters, two for each multiply-add."""
    total = 0
    for spec in specs.values():
        dense, shape = {place for _, _, place in _dense_axes(spec, maps, kinds)}, list(spec.shape)
        for place in _order(spec, kinds):
            if place in dense:
                total += 2 * math.prod(shape) * maps[spec.axes[place]].size
            if spec.axes[place] in maps:
                shape[place] = maps[spec.axes[place]].size
    return total


def save_maps(path: Path, deltas: Deltas) -> None:
    """Write what was learned, whole or not at all; equal maps have equal bytes."""
    unfinished = path.with_name("." + path.name)
    with unfinished.open("wb") as file:
        matrices: dict[str, Any] = {
            f"{axis}/{role}": np.asarray(each) for axis, roles in deltas.items() for role, each in roles.items()
        }
        np.savez(file, **matrices)
    flush(unfinished)
    unfinished.rename(path)
    flush(path.parent)


def load_maps(path: Path) -> Deltas:
    """The inverse of `save_maps`.

    Raises:
        ArtifactError: if the file cannot be read.
    """
    deltas: Deltas = {}
    with reading(path), np.load(path) as arrays:
        for key in arrays.files:
            axis, _, role = key.rpartition("/")
            deltas.setdefault(axis, {})[role] = arrays[key]
    return deltas


def _dense_axes(spec: ParamSpec, maps: Maps, kinds: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """(axis, role, dimension) of each matrix that acts on a parameter."""
    for place, axis in enumerate(spec.axes):
        kind = kinds.get(logical_axis(axis))
        if axis not in maps:
            continue
        if kind == "layers":
            yield axis, "writers" if writes_stream(spec, kinds) else "others", place
        elif kind in ("stream", "units") and not spec.gain:
            yield axis, "read" if axis in spec.contracted else "written", place


def _order(spec: ParamSpec, kinds: Mapping[str, str]) -> list[int]:
    """The dimensions as they are worked off: layers last, while there are few of them."""
    return sorted(range(len(spec.axes)), key=lambda place: kinds.get(logical_axis(spec.axes[place])) == "layers")


def _follow(array: Array, place: int, spec: ParamSpec, entry: IndexMap, kinds: Mapping[str, str]) -> Array:
    """The lossless map along one dimension, without what is random."""
    axis = spec.axes[place]
    kind = kinds[logical_axis(axis)]
    if entry.mixtures:
        return _append_rows(array, place, entry)
    vector = dual_multipliers(axis, spec, entry)[0]
    if not spec.gain and (kind in ("stream", "units") or (kind == "layers" and writes_stream(spec, kinds))):
        vector = np.where(entry.created, 0.0, vector)
    return scale(gather(array, _at(place, array.ndim, entry.sources)), _at(place, array.ndim, vector))


def _append_rows(array: Array, place: int, entry: IndexMap) -> Array:
    """A table with created rows as means of others."""
    np_or_jnp = array.__array_namespace__()
    rows = np_or_jnp.moveaxis(array, place, 0)
    means = [rows.mean(0) if each is None else rows[np.asarray(each)].mean(0) for each in entry.mixtures]
    rows = np_or_jnp.concatenate([rows, np_or_jnp.stack(means)])
    index = np.where(entry.created, entry.source_size + np.cumsum(entry.created) - 1, entry.sources)
    return np_or_jnp.moveaxis(np_or_jnp.take(rows, index, axis=0, mode="clip"), 0, place)


def _relative_scale(axis: str, spec: ParamSpec, entry: IndexMap, kinds: Mapping[str, str]) -> np.ndarray | None:
    """What the lossless map of a parameter is beside the one of its role, where the model itself scales it."""
    if kinds[logical_axis(axis)] == "layers":
        return None
    relative = dual_multipliers(axis, spec, entry)[0] / (entry.read if axis in spec.contracted else entry.written)
    return None if np.all(relative == 1) else relative


def _multiply(matrix: Array, array: Array, place: int) -> Array:
    if isinstance(array, np.ndarray):
        return np.moveaxis(np.tensordot(matrix, array, (1, place)), 0, place)
    return jnp.moveaxis(jnp.tensordot(matrix, array, (1, place), precision="highest"), 0, place)


def _at(place: int, num_dimensions: int, vector: Array | None) -> list[Array | None]:
    return [vector if each == place else None for each in range(num_dimensions)]
