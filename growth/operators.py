"""What growth does to one array, decided by its declaration alone.

Everything of the source is scaled by the product of its axes' multipliers. A created entry of a parameter is either 0,
where it would otherwise change what the model computes, or random, so that its partner has a gradient from the first
update; rows of tables begin as means of others:

| axis                       | where it is written     | where it is read (`contracted`) | gain              |
| -------------------------- | ----------------------- | ------------------------------- | ----------------- |
| stream (`embed`)           | 0                       | random                          | mean of the gains |
| units (mlp, heads, qk, vo) | random                  | 0                               | –                 |
| layers                     | 0 if the parameter writes the stream, else a copy of the layer beside it    |||
| rows (vocab)               | a mean of rows, in each role                                                |||

Copies may part by noise that cancels in what reads them: the same expansion of a random array of the source's shape,
with `IndexMap.contrast` in place of the multipliers of the axis.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from growth.blocks import Constants, LeafGrowth, View
from growth.index_map import IndexMap
from growth.statistics import LeafStatistics
from t5pegasus.axes import ParamSpec, dual_multipliers, logical_axis

KINDS: Mapping[str, str] = {
    "embed": "stream",
    "mlp": "units",
    "heads": "units",
    "qk": "units",
    "vo": "units",
    "layers": "layers",
    "vocab": "rows",
    "relpos_buckets": "table",
}
"""Logical axis → what kind of axis it is to growth. A model with further axes gives a table of its own."""

Maps = Mapping[str, IndexMap]


def grow_parameter(
    name: str, spec: ParamSpec, maps: Maps, statistics: LeafStatistics | None, *, seed: int, noise: float,
    dtype: Any, kinds: Mapping[str, str] = KINDS,
) -> LeafGrowth:  # fmt: skip
    """How one parameter grows.

    Args:
        name: decides, with the seed, its random numbers.
        spec: declaration of the source's parameter.
        maps: the axes that grow.
        statistics: of the source's values; None where `needs_statistics` says that none are needed.
        seed: of the plan.
        noise: standard deviation of random entries over the root mean square of the source's, layer by layer.
        dtype: of the parameter.
        kinds: kind of each logical axis.
    """
    scales = {axis: dual_multipliers(axis, spec, maps[axis])[0] for axis in spec.axes if axis in maps}
    masks: dict[str, dict[str, np.ndarray]] = {}
    contrasts: dict[str, np.ndarray] = {}
    for axis in spec.axes:
        if axis not in maps:
            continue
        kind, created = kinds[logical_axis(axis)], maps[axis].created
        what = _treatment(axis, kind, spec, maps, noise, kinds)
        if what != "copy" and created.any():
            masks.setdefault(axis, {})[what] = created
        if noise and axis in spec.contracted and maps[axis].copied.any():
            contrasts[axis] = noise * maps[axis].contrast * scales[axis] / maps[axis].read
    return _assemble(
        name, spec, maps, scales, masks, contrasts, statistics, seed=seed, noise=noise, dtype=dtype, kinds=kinds
    )


def grow_moment(
    name: str, spec: ParamSpec, maps: Maps, statistics: LeafStatistics | None, *, power: int, state: str,
    dtype: Any, kinds: Mapping[str, str] = KINDS,
) -> LeafGrowth:  # fmt: skip
    """How a first or a second moment of one parameter grows: m' = r·m, v' = r²·v, and means of v like v.

    Created entries have m = 0 and the mean v of those beside them, since an empty v late in training would make the
    first update (1−β₁)/√(1−β₂) times the usual one. New layers have the v of the layer that they copy.

    Args:
        name: of the parameter.
        spec: its declaration.
        maps: the axes that grow.
        statistics: of the moment; None where none are needed.
        power: of r: 2 in a second moment; in a first one 1, or 0 where it is a mean of updates, not of gradients.
        state: `mapped`; `asymmetric`, where copies begin with m = 0, so that they part from the first one; or
            `reset`, all zero.
        dtype: of the moment.
        kinds: kind of each logical axis.
    """
    scales, masks = {}, {}
    for axis in spec.axes:
        if axis not in maps:
            continue
        scales[axis] = dual_multipliers(axis, spec, maps[axis])[1] ** power
        kind, created = kinds[logical_axis(axis)], maps[axis].created
        if maps[axis].opens and writes_stream(spec, kinds):
            continue  # opened tokens have been read all the time
        fresh = created | maps[axis].copied if power < 2 and state == "asymmetric" and kind != "table" else created
        if power < 2 and fresh.any():
            masks[axis] = {"zero": fresh}
        elif created.any() and kind != "layers" and state != "reset":
            masks[axis] = {"rows" if kind == "rows" and not maps[axis].opens else "seeded": created}
    grown = _assemble(name, spec, maps, scales, masks, {}, statistics, seed=0, noise=0.0, dtype=dtype, kinds=kinds)
    if state != "reset":
        return grown
    views = tuple(view._replace(zero=np.ones(len(view.positions), bool)) for view in grown.views)
    return dataclasses.replace(grown, views=views, reads_source=False)


def needs_statistics(spec: ParamSpec, maps: Maps, *, noise: float, kinds: Mapping[str, str] = KINDS) -> bool:
    """Whether growing a parameter, or its second moment, takes more than the entries a block is made of."""
    for axis in spec.axes:
        if axis in maps:
            created = maps[axis].created.any() and kinds[logical_axis(axis)] not in ("layers", "table")
            if created or (noise and axis in spec.contracted and maps[axis].copied.any()):
                return True
    return False


def _treatment(axis: str, kind: str, spec: ParamSpec, maps: Maps, noise: float, kinds: Mapping[str, str]) -> str:
    """What becomes of created entries along one axis of a parameter."""
    match kind:
        case "rows":
            return "copy" if maps[axis].opens else "rows"
        case "layers":
            return "zero" if writes_stream(spec, kinds) else "copy"
        case "table":
            return "copy"
    if spec.gain:
        return "seeded"
    drawn = (axis in spec.contracted) == (kind == "stream")
    return "drawn" if drawn and noise else "zero"


def writes_stream(spec: ParamSpec, kinds: Mapping[str, str] = KINDS) -> bool:
    """Whether what the parameter gives is added to the residual stream."""
    stream = [axis for axis in spec.axes if kinds.get(logical_axis(axis)) == "stream"]
    return not spec.gain and any(axis not in spec.contracted for axis in stream)


def _assemble(
    name: str, spec: ParamSpec, maps: Maps, scales: Mapping[str, np.ndarray], masks: Mapping[str, Mapping],
    contrasts: Mapping[str, np.ndarray], statistics: LeafStatistics | None, *, seed: int, noise: float,
    dtype: Any, kinds: Mapping[str, str],
) -> LeafGrowth:  # fmt: skip
    """Put vectors per axis into views per dimension; what is the same all along an axis goes into one factor."""
    layers = next((place for place, axis in enumerate(spec.axes) if kinds.get(logical_axis(axis)) == "layers"), None)
    seeded = any("seeded" in each for each in masks.values())
    random = bool(contrasts) or any("drawn" in each for each in masks.values())
    factor, views = 1.0, []
    drawn_spread = source_spread = None
    if random:
        source_spread = _source_spread(spec, maps, statistics, layers)
        kept = [vector[~maps[axis].created] for axis, vector in scales.items()]
        drawn_spread = noise * source_spread * float(np.prod([np.sqrt(np.mean(each**2)) for each in kept]))
    for place, (axis, size) in enumerate(zip(spec.axes, spec.shape)):
        entry = maps.get(axis)
        own = masks.get(axis, {})
        positions = np.arange(size if entry is None else entry.size)
        sources = positions if entry is None else entry.sources.astype(np.int64)
        vector = scales.get(axis)
        if vector is not None and entry is not None and axis not in contrasts:
            kept = vector[~entry.created]
            if np.all(kept == kept[0]):
                factor, vector = factor * float(kept[0]), None
        rows = None
        if "rows" in own:
            rows = np.where(own["rows"], np.cumsum(own["rows"]) - 1, -1)
        views.append(
            View(
                sources=sources,
                source_positions=sources,
                positions=positions,
                scale=vector,
                contrast=contrasts.get(axis),
                zero=own.get("zero"),
                drawn=own.get("drawn"),
                seeded=own.get("seeded"),
                seeds=_seeds(place, entry, scales.get(axis), statistics, layers, maps, spec) if seeded else None,
                rows=rows,
                drawn_spread=drawn_spread if place == (layers or 0) else None,
                source_spread=source_spread if place == (layers or 0) else None,
            )
        )
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return LeafGrowth(
        source_shape=spec.shape,
        shape=tuple(len(view.positions) for view in views),
        dtype=np.dtype(dtype),
        views=tuple(views),
        constants=Constants(
            key=tuple(np.frombuffer(digest[:8], "<u4").astype(np.uint32)),
            factor=None if factor == 1.0 else np.float64(factor),
            rows=statistics.rows if statistics is not None and any("rows" in each for each in masks.values()) else None,
        ),
        layers=layers,
    )


def _source_spread(spec: ParamSpec, maps: Maps, statistics: LeafStatistics | None, layers: int | None) -> np.ndarray:
    """The source's root mean square at each grown layer, or all along the first dimension where there are none."""
    assert statistics is not None
    entry = maps.get(spec.axes[layers or 0])
    sources = np.arange(spec.shape[layers or 0]) if entry is None else entry.sources
    return (
        statistics.root_mean_square[sources]
        if layers is not None
        else np.full(len(sources), float(statistics.root_mean_square))
    )


def _seeds(
    place: int, entry: IndexMap | None, scales: np.ndarray | None, statistics: LeafStatistics | None,
    layers: int | None, maps: Maps, spec: ParamSpec,
) -> np.ndarray:  # fmt: skip
    """One dimension's factors of the mean that created entries begin as (Shazeer & Stern 2018 factor v likewise).

    Where one dimension of a matrix was extended, the product is the mean along it; where both were, of all.
    """
    assert statistics is not None
    mean, marginal = statistics.mean, statistics.marginals[place]
    if marginal is None:
        return np.ones(len(mean) if entry is None else entry.size)
    first = 1 if layers == 0 else 0
    if place != first:  # of the order of 1, so that no product leaves the range of float32
        mean = mean[..., None]
        marginal = np.divide(marginal, mean, out=np.zeros(marginal.shape), where=mean != 0)
    if layers is not None and spec.axes[layers] in maps:
        marginal = marginal[maps[spec.axes[layers]].sources]
    if entry is None:
        return marginal
    seeds = marginal[..., entry.sources] * (1.0 if scales is None else scales)
    kept = ~entry.created
    return np.where(kept, seeds, seeds[..., kept].mean(-1, keepdims=True))
