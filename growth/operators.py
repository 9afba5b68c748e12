"""What growth does to one array, decided by its declaration alone, and computed for any block of it.

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
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from growth.expand import Array, along, draw, gather, scale
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


class View(NamedTuple):
    """One dimension of a grown array, or the part of it that a block has; vectors of the grown size, or None."""

    sources: Array | None
    """Index into the block of the source that is given; None: as it lies there."""
    source_positions: Array
    """Index into the whole source."""
    positions: Array
    """Index into the whole grown array."""
    scale: Array | None
    contrast: Array | None
    zero: Array | None
    """bool: entries that are 0, whatever else is said of them."""
    drawn: Array | None
    """bool: entries that are random."""
    seeded: Array | None
    """bool: entries that begin as a mean of others."""
    seeds: Array | None
    """[grown size] or [grown layers, grown size]: factors whose product over the dimensions is that mean."""
    rows: Array | None
    """Which row of `LeafGrowth.rows` an entry begins as, -1 for none."""
    drawn_spread: Array | None
    """Along the layers' dimension, or else the first one: standard deviation of what is drawn."""
    source_spread: Array | None
    """The same of the source's own entries."""


@dataclasses.dataclass(frozen=True, eq=False)
class LeafGrowth:
    """One array of the grown model, as a function of the source's array of the same name.

    `compute` gives any block of it, the same bits for every division into blocks, on the host or under `jax.jit`.
    """

    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    views: tuple[View, ...]
    key: tuple[int, int]
    factor: float = 1.0
    """What all entries of the source are multiplied by, beside the views' scales."""
    rows: np.ndarray | None = None
    """What created rows begin as: [number of rows, source sizes of the other dimensions…], the row dimension first."""
    layers: int | None = None
    """The dimension that counts layers."""
    reads_source: bool = True

    def source_slices(self, target: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of the source that a block of the grown array is made of."""
        return tuple(
            slice(int(view.source_positions[part].min()), int(view.source_positions[part].max()) + 1)
            for view, part in zip(self.views, target)
        )

    def compute(self, block: Array, target: tuple[slice, ...]) -> Array:
        """A block of the grown array.

        Args:
            block: `source[self.source_slices(target)]`, NumPy or JAX.
            target: which block, slices without steps.
        """
        return self.compute_views(block, self.cut_views(target))

    def cut_views(self, target: tuple[slice, ...]) -> tuple[View, ...]:
        """The views of one block."""
        cut = []
        for dimension, (view, part) in enumerate(zip(self.views, target)):
            fields = {}
            for field, vector in view._asdict().items():
                if field == "seeds" and vector is not None and vector.ndim == 2 and dimension != self.layers:
                    rows = slice(None) if self.layers is None else target[self.layers]
                    fields[field] = vector[rows, part]
                else:
                    fields[field] = None if vector is None else vector[part]
            first = fields["source_positions"].min()
            sources = fields["source_positions"] - first
            identity = len(sources) == sources[-1] + 1 and np.array_equal(sources, np.arange(len(sources)))
            cut.append(View(**fields | {"sources": None if identity else sources}))
        return tuple(cut)

    def compute_views(self, block: Array, views: tuple[View, ...]) -> Array:
        """`compute` with views that hold what a block needs, also tracers."""
        grown = gather(block, [view.sources for view in views])
        if grown is block:
            grown = grown.copy()
        if self.factor != 1.0:
            grown *= grown.dtype.type(self.factor)
        grown = scale(grown, [view.scale for view in views])
        for dimension, view in enumerate(views):
            if view.contrast is not None:
                grown += self._noise(views, dimension, grown)
        return self._fill(grown, views)

    def _noise(self, views: tuple[View, ...], dimension: int, grown: Array) -> Array:
        """What parts the copies along one dimension: random numbers of the source's entries times the contrast."""
        key = (self.key[0] ^ (0x9E3779B9 * (dimension + 1) & 0xFFFFFFFF), self.key[1])
        values = draw(key, [view.source_positions for view in views]).astype(grown.dtype)
        values = scale(values, [view.source_spread for view in views])
        vectors = [view.contrast if each == dimension else view.scale for each, view in enumerate(views)]
        return scale(values, vectors) * values.dtype.type(self.factor)

    def _fill(self, grown: Array, views: tuple[View, ...]) -> Array:
        for dimension, view in enumerate(views):
            if view.rows is not None:
                grown = _replace(grown, dimension, view.rows >= 0, self._begin_rows(views, dimension, grown.dtype))
        if any(view.seeded is not None for view in views):
            seeds = _product(views, self.layers, grown)
            for dimension, view in enumerate(views):
                if view.seeded is not None:
                    grown = _replace(grown, dimension, view.seeded, seeds)
        if any(view.drawn is not None for view in views):
            grown = self._draw_created(grown, views)
        for dimension, view in enumerate(views):
            if view.zero is not None:
                grown = _replace(grown, dimension, view.zero, grown.dtype.type(0))
        return grown

    def _begin_rows(self, views: tuple[View, ...], dimension: int, dtype: Any) -> Array:
        """The created rows of a block, expanded along the other dimensions like everything else."""
        assert self.rows is not None
        np_or_jnp = views[dimension].source_positions.__array_namespace__()
        rows = np_or_jnp.moveaxis(np_or_jnp.asarray(self.rows, dtype), 0, dimension)
        indices = [view.rows if each == dimension else view.source_positions for each, view in enumerate(views)]
        grown = gather(rows, [np_or_jnp.maximum(index, 0) for index in indices]) * np.dtype(dtype).type(self.factor)
        return scale(grown, [None if each == dimension else view.scale for each, view in enumerate(views)])

    def _draw_created(self, grown: Array, views: tuple[View, ...]) -> Array:
        np_or_jnp = grown.__array_namespace__()
        positions = [view.positions for view in views]
        for dimension, view in enumerate(views):
            if view.drawn is None:
                continue
            if np_or_jnp is np:  # draw no more than is needed
                chosen = np.flatnonzero(view.drawn)
                if not len(chosen):
                    continue
                part = [position[chosen] if each == dimension else position for each, position in enumerate(positions)]
                spreads = [
                    spread[chosen] if spread is not None and each == dimension else spread
                    for each, spread in enumerate(other.drawn_spread for other in views)
                ]
                grown[(*[slice(None)] * dimension, chosen)] = scale(draw(self.key, part).astype(grown.dtype), spreads)
            else:
                values = scale(draw(self.key, positions).astype(grown.dtype), [other.drawn_spread for other in views])
                grown = _replace(grown, dimension, view.drawn, values)
        return grown


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
        what = _treatment(axis, kind, spec, noise, kinds)
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
    """How a first (`power` 1) or second (2) moment of one parameter grows: m' = r·m, v' = r²·v.

    Created entries have m = 0 and the mean v of those beside them, since an empty v late in training would make the
    first update (1−β₁)/√(1−β₂) times the usual one. New layers have the v of the layer that they copy.

    Args:
        name: of the parameter.
        spec: its declaration.
        maps: the axes that grow.
        statistics: of the moment; None where none are needed.
        power: of r.
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
        fresh = created | maps[axis].copied if power == 1 and state == "asymmetric" and kind != "table" else created
        if power == 1 and fresh.any():
            masks[axis] = {"zero": fresh}
        elif created.any() and kind != "layers":
            masks[axis] = {"rows" if kind == "rows" else "seeded": created}
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


def _treatment(axis: str, kind: str, spec: ParamSpec, noise: float, kinds: Mapping[str, str]) -> str:
    """What becomes of created entries along one axis of a parameter."""
    match kind:
        case "rows":
            return "rows"
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
    stream = [axis for axis in spec.axes if kinds[logical_axis(axis)] == "stream"]
    return not spec.gain and any(axis not in spec.contracted for axis in stream)


def _assemble(
    name: str, spec: ParamSpec, maps: Maps, scales: Mapping[str, np.ndarray], masks: Mapping[str, Mapping],
    contrasts: Mapping[str, np.ndarray], statistics: LeafStatistics | None, *, seed: int, noise: float,
    dtype: Any, kinds: Mapping[str, str],
) -> LeafGrowth:  # fmt: skip
    """Put vectors per axis into views per dimension; what is the same all along an axis goes into one factor."""
    layers = next((place for place, axis in enumerate(spec.axes) if kinds[logical_axis(axis)] == "layers"), None)
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
        key=(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")),
        factor=factor,
        rows=statistics.rows if statistics is not None and any("rows" in each for each in masks.values()) else None,
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
    others = len(spec.shape) - (1 if layers is None else 2)
    mean = statistics.mean
    norm = np.power(mean, -float(others), out=np.zeros(mean.shape), where=mean != 0) if others else np.ones(mean.shape)
    marginal = statistics.marginals[place]
    if marginal is None:
        return norm if entry is None else norm[entry.sources]
    if layers is None:
        marginal = marginal * norm if place == 0 else marginal
    elif spec.axes[layers] in maps:
        marginal = marginal[maps[spec.axes[layers]].sources]
    if entry is None:
        return marginal
    seeds = marginal[..., entry.sources] * (1.0 if scales is None else scales)
    kept = ~entry.created
    return np.where(kept, seeds, seeds[..., kept].mean(-1, keepdims=True))


def _product(views: tuple[View, ...], layers: int | None, grown: Array) -> Array:
    """The outer product of the views' seeds, layer by layer."""
    product = None
    for dimension, view in enumerate(views):
        seeds = view.seeds
        assert seeds is not None
        if seeds.ndim == 2:
            assert layers is not None
            shape = [1] * grown.ndim
            shape[layers], shape[dimension] = seeds.shape
            spread = seeds.reshape(shape) if layers < dimension else seeds.T.reshape(shape)
        else:
            spread = along(seeds, dimension, grown.ndim)
        product = spread if product is None else product * spread
    assert product is not None
    return product.astype(grown.dtype)


def _replace(grown: Array, dimension: int, mask: Array, values: Array) -> Array:
    """The array with the masked entries of one dimension taken from values that broadcast to it."""
    np_or_jnp = grown.__array_namespace__()
    if np_or_jnp is np:
        chosen = np.flatnonzero(mask)
        if len(chosen):
            index = (*[slice(None)] * dimension, chosen)
            grown[index] = values if np.ndim(values) == 0 else np.broadcast_to(values, grown.shape)[index]
        return grown
    return np_or_jnp.where(along(mask, dimension, grown.ndim), values, grown)


def whole(shape: Iterable[int]) -> tuple[slice, ...]:
    """The block that is the whole array."""
    return tuple(slice(0, size) for size in shape)
