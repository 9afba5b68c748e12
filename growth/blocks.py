"""One array of the grown model as a function of the source's, computed for any block of it.

The same function serves the whole array on the host, a block out of core and a device's shard under `jax.jit`, and
gives the same bits: every entry is decided by its own indices.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from growth.expand import Array, along, draw, gather, scale, settle


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


class Constants(NamedTuple):
    """What all blocks of a grown array share."""

    key: Any
    """Two uint32 words that decide its random numbers."""
    factor: Any
    """What all entries of the source are multiplied by, beside the views' scales; None stands for one."""
    rows: Any
    """What created rows begin as, [number of rows, source sizes of the other dimensions…], or None."""
    zero: Any = np.uint32(0)
    """See `growth.expand.settle`."""


@dataclasses.dataclass(frozen=True, eq=False)
class LeafGrowth:
    """One array of the grown model, as a function of the source's array of the same name.

    `compute` gives any block of it, the same bits for every division into blocks, on the host or under `jax.jit`.
    """

    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    views: tuple[View, ...]
    constants: Constants
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
        return compute_block(block, self.cut_views(target), self.constants, self.layers)

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


def compute_block(block: Array, views: tuple[View, ...], constants: Constants, layers: int | None) -> Array:
    """A block of a grown array from the entries of the source that it is made of, NumPy arrays or JAX tracers.

    What has fewer than 32 bits is computed in float32 and rounded once.

    Args:
        block: of the source.
        views: one for each dimension, cut to the block.
        constants: of the whole array.
        layers: the dimension that counts layers.
    """
    if block.dtype.itemsize < 4:
        return compute_block(block.astype(np.float32), views, constants, layers).astype(block.dtype)
    grown = gather(block, [view.sources for view in views])
    if grown is block:
        grown = grown.copy()
    if constants.factor is not None:
        grown *= grown.__array_namespace__().asarray(constants.factor, grown.dtype)
    grown = scale(grown, [view.scale for view in views])
    for dimension, view in enumerate(views):
        if view.contrast is not None:
            grown = settle(grown, constants.zero)
            grown += settle(_noise(views, dimension, constants, grown), constants.zero)
    for dimension, view in enumerate(views):
        if view.rows is not None:
            grown = _replace(grown, dimension, view.rows >= 0, _begin_rows(views, dimension, constants, grown))
    if any(view.seeded is not None for view in views):
        grown = _write_seeds(grown, views, layers)
    for dimension, view in enumerate(views):
        if view.drawn is not None:
            grown = _draw_created(grown, views, dimension, constants)
    return _write_zeros(grown, views)


def _noise(views: tuple[View, ...], dimension: int, constants: Constants, grown: Array) -> Array:
    """What parts the copies along one dimension: random numbers of the source's entries times the contrast."""
    first, second = constants.key
    key = (first ^ np.uint32(0x9E3779B9 * (dimension + 1) & 0xFFFFFFFF), second)
    values = _draw_of_source(key, [view.source_positions for view in views]).astype(grown.dtype)
    values = settle(values, constants.zero)
    values = scale(values, [view.source_spread for view in views])
    values = scale(values, [view.contrast if each == dimension else view.scale for each, view in enumerate(views)])
    if constants.factor is not None:
        values *= values.__array_namespace__().asarray(constants.factor, values.dtype)
    return values


def _draw_of_source(key: tuple[Array, Array], positions: list[Array]) -> Array:
    """`draw`, on the host only once for each entry of the source, however many copies take it: drawing costs most."""
    if not all(isinstance(each, np.ndarray) for each in positions):
        return draw(key, positions)
    drawn = [np.arange(each.min(), each.max() + 1) for each in positions]
    copies = [None if np.array_equal(each, own) else each - own[0] for each, own in zip(positions, drawn)]
    if any(len(own) > len(each) for each, own in zip(positions, drawn)):  # maps with gaps
        return draw(key, positions)
    return gather(draw(key, drawn), copies)


def _begin_rows(views: tuple[View, ...], dimension: int, constants: Constants, grown: Array) -> Array:
    """The created rows of a block, expanded along the other dimensions like everything else."""
    np_or_jnp = grown.__array_namespace__()
    rows = np_or_jnp.moveaxis(np_or_jnp.asarray(constants.rows, grown.dtype), 0, dimension)
    indices = [view.rows if each == dimension else view.source_positions for each, view in enumerate(views)]
    begun = gather(rows, [np_or_jnp.maximum(index, 0) for index in indices])
    if constants.factor is not None:
        begun *= np_or_jnp.asarray(constants.factor, begun.dtype)
    return scale(begun, [None if each == dimension else view.scale for each, view in enumerate(views)])


def _draw_created(grown: Array, views: tuple[View, ...], dimension: int, constants: Constants) -> Array:
    drawn = views[dimension].drawn
    assert drawn is not None
    positions = [view.positions for view in views]
    spreads = [view.drawn_spread for view in views]
    if grown.__array_namespace__() is not np:
        values = scale(settle(draw(constants.key, positions).astype(grown.dtype), constants.zero), spreads)
        return _replace(grown, dimension, drawn, values)
    chosen = np.flatnonzero(drawn)  # draw no more than is needed
    if len(chosen):
        positions[dimension] = positions[dimension][chosen]
        own = spreads[dimension]
        spreads[dimension] = None if own is None else own[chosen]
        grown[(*[slice(None)] * dimension, chosen)] = scale(draw(constants.key, positions).astype(grown.dtype), spreads)
    return grown


def _write_seeds(grown: Array, views: tuple[View, ...], layers: int | None) -> Array:
    seeds = _product(views, layers, grown)
    for dimension, view in enumerate(views):
        if view.seeded is not None:
            grown = _replace(grown, dimension, view.seeded, seeds)
    return grown


def _write_zeros(grown: Array, views: tuple[View, ...]) -> Array:
    for dimension, view in enumerate(views):
        if view.zero is not None:
            grown = _replace(grown, dimension, view.zero, grown.dtype.type(0))
    return grown


def _product(views: tuple[View, ...], layers: int | None, grown: Array) -> Array:
    """The outer product of the views' seeds, layer by layer."""
    product = None
    for dimension, view in enumerate(views):
        assert view.seeds is not None
        seeds = view.seeds.astype(grown.dtype)
        if seeds.ndim == 2:
            assert layers is not None
            shape = [1] * grown.ndim
            shape[layers], shape[dimension] = seeds.shape
            spread = seeds.reshape(shape) if layers < dimension else seeds.T.reshape(shape)
        else:
            spread = along(seeds, dimension, grown.ndim)
        product = spread if product is None else product * spread
    return product


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
