"""Single entries of grown arrays, derived a second time: in plain float64 NumPy from the source, maps and declaration.

It follows the tables of docs/growth.md and shares no code with `growth.blocks` and `growth.operators`, so that a fault
there is not made again here.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from growth.index_map import IndexMap
from growth.operators import KINDS
from growth.plan import GrowthPlan
from t5pegasus.axes import ParamSpec, logical_axis


class Derivation:
    """One array of the grown state, entry by entry.

    Args:
        is_weight: whether it is a parameter or the average of one; else it is a moment.
        spec: declaration of the source's array.
        plan: of the growth.
        power: a moment's, of the gradients' multipliers.
        source: its values, float64.
    """

    def __init__(self, spec: ParamSpec, plan: GrowthPlan, power: int, source: np.ndarray, *, is_weight: bool):
        self._spec, self._choices, self._source, self._power = spec, plan.choices, source, power
        self._is_weight = is_weight
        self._kinds = [KINDS[logical_axis(axis)] for axis in spec.axes]
        self._maps = [plan.maps.get(axis) for axis in spec.axes]
        self._scales = [
            None
            if entry is None
            else _multiply(axis, spec, entry)[0 if is_weight else 1] ** (1 if is_weight else power)
            for axis, entry in zip(spec.axes, self._maps)
        ]
        self._layers = self._kinds.index("layers") if "layers" in self._kinds else None

    def error(self, stored: np.ndarray, index: Sequence[int]) -> float:
        """By how much a stored entry is off, in half units of its last place; inf where it is of the wrong kind."""
        got, wanted, size = self._compare(stored, index)
        unit = float(jnp.finfo(stored.dtype).eps) / 2 * max(abs(wanted), size)
        if got == wanted:
            return 0.0
        return abs(got - wanted) / unit if unit else math.inf

    def _compare(self, stored: np.ndarray, index: Sequence[int]) -> tuple[float, float, float]:
        """(what is stored, what is wanted, the size of what was rounded)."""
        got = float(stored[tuple(index)])
        created = [
            (place, kind)
            for place, (kind, entry, each) in enumerate(zip(self._kinds, self._maps, index))
            if entry is not None and entry.created[each] and not self._is_trained(entry)
        ]
        if not self._is_weight:
            return got, self._moment(index, created), 0.0
        treatments = {self._treat(place, kind): place for place, kind in created}
        if "zero" in treatments:
            return got, 0.0, 0.0
        if "random" in treatments:
            limit = math.sqrt(3) * self._spread(index) * (1 + 1e-6)
            # Uniform numbers, of which none is 0: there is nothing else to compare them with.
            return got, got if 0 < abs(got) <= limit or limit == 0 == got else math.nan, 0.0
        if "mean" in treatments:
            return got, self._mean_along(index, treatments["mean"]), 0.0
        if "rows" in treatments:
            return got, self._mean_rows(index, treatments["rows"]), 0.0
        return self._sum_copies(stored, index)

    def _is_trained(self, entry: IndexMap) -> bool:
        """Whether tokens that are opened were trained before: their embedding was, their part of a head was not."""
        stream = [axis for kind, axis in zip(self._kinds, self._spec.axes) if kind == "stream"]
        return entry.opens and (self._is_weight or not set(stream) <= set(self._spec.contracted))

    def _treat(self, place: int, kind: str) -> str:
        """What becomes of created entries of a parameter along one axis."""
        axis, spec = self._spec.axes[place], self._spec
        if kind in ("rows", "table"):
            return {"rows": "rows", "table": "copy"}[kind]
        if kind == "layers":
            streams = [each for each, other in zip(spec.axes, self._kinds) if other == "stream"]
            return "zero" if not spec.gain and not set(streams) <= set(spec.contracted) else "copy"
        if spec.gain:
            return "mean"
        drawn = (axis in spec.contracted) if kind == "stream" else (axis not in spec.contracted)
        return "random" if drawn and self._choices.noise else "zero"

    def _sum_copies(self, stored: np.ndarray, index: Sequence[int]) -> tuple[float, float, float]:
        """An entry that came from the source; where noise parts copies, what reads them all together."""
        wanted, choices = float(self._source[self._origin(index)]), []
        for axis, entry, scale, each in zip(self._spec.axes, self._maps, self._scales, index):
            noisy = entry is not None and axis in self._spec.contracted and entry.copied.any() and self._choices.noise
            if entry is None or scale is None or not noisy:
                choices.append([(each, 1.0)])
                wanted *= 1.0 if scale is None else float(scale[each])
                continue
            copies = np.flatnonzero((entry.sources == entry.sources[each]) & ~entry.created)
            choices.append([(int(copy), float(entry.written[copy])) for copy in copies])
            wanted *= float(entry.written[copies] @ scale[copies])
        got = size = 0.0
        value = abs(float(self._source[self._origin(index)]))
        for copy in itertools.product(*choices):
            place, weight = tuple(each for each, _ in copy), math.prod(each for _, each in copy)
            entry = float(stored[place])
            got += weight * entry
            own = value * math.prod(float(s[each]) for s, each in zip(self._scales, place) if s is not None)
            size += weight * (abs(entry) + 2 * own)
        return got, wanted, size if any(len(each) > 1 for each in choices) else 0.0

    def _moment(self, index: Sequence[int], created: list[tuple[int, str]]) -> float:
        state = self._choices.state
        if state == "reset":
            return 0.0
        if self._power < 2:
            copied = any(
                entry is not None and kind != "table" and entry.copied[each]
                for kind, entry, each in zip(self._kinds, self._maps, index)
            )
            if created or (copied and state == "asymmetric"):
                return 0.0
            return self._scaled(index)
        begun = [place for place, kind in created if kind == "rows" and not self._opens(place)]
        if len(begun) < len([kind for _, kind in created if kind in ("stream", "units", "rows")]):
            return self._outer_mean(index)
        return self._mean_rows(index, begun[0]) if begun else self._scaled(index)

    def _opens(self, place: int) -> bool:
        entry = self._maps[place]
        return entry is not None and entry.opens

    def _scaled(self, index: Sequence[int]) -> float:
        value = float(self._source[self._origin(index)])
        return value * math.prod(float(s[each]) for s, each in zip(self._scales, index) if s is not None)

    def _mean_along(self, index: Sequence[int], place: int) -> float:
        """The mean of what was kept along one axis."""
        entry = self._maps[place]
        assert entry is not None
        values = [
            self._scaled((*index[:place], int(each), *index[place + 1 :])) for each in np.flatnonzero(~entry.created)
        ]
        return float(np.mean(values))

    def _mean_rows(self, index: Sequence[int], place: int) -> float:
        entry = self._maps[place]
        assert entry is not None
        mixture = entry.mixtures[int(np.count_nonzero(entry.created[: index[place]]))]
        origin: list[Any] = list(self._origin(index))
        origin[place] = slice(None) if mixture is None else list(mixture)
        scales = [
            float(s[each])
            for other, (s, each) in enumerate(zip(self._scales, index))
            if s is not None and other != place
        ]
        return float(np.mean(self._source[tuple(origin)])) * math.prod(scales)

    def _outer_mean(self, index: Sequence[int]) -> float:
        """The outer product of the means along each axis, in which a created entry takes the mean of the kept ones."""
        origin = self._origin(index)
        inner = [place for place in range(len(origin)) if place != self._layers]
        result, mean = 1.0, 0.0
        for place in inner:
            means = self._means(place, origin[self._layers] if self._layers is not None else None)
            entry, scale = self._maps[place], self._scales[place]
            mean = float(means.mean())
            if entry is None or scale is None:
                result *= float(means[index[place]])
            elif entry.created[index[place]]:
                kept = ~entry.created
                result *= float(np.mean(means[entry.sources[kept]] * scale[kept]))
            else:
                result *= float(means[entry.sources[index[place]]] * scale[index[place]])
        return result / mean ** (len(inner) - 1) if mean else 0.0

    @functools.lru_cache(maxsize=64)  # noqa: B019 - lives as long as one array is looked at
    def _means(self, place: int, layer: int | None) -> np.ndarray:
        values = self._source if layer is None or self._layers is None else self._source.take(layer, axis=self._layers)
        kept = place - (self._layers is not None and self._layers < place)
        return values.mean(axis=tuple(each for each in range(values.ndim) if each != kept))

    def _spread(self, index: Sequence[int]) -> float:
        """The standard deviation of random entries: that of the source's layer, scaled as what is kept beside them."""
        scales = [
            math.sqrt(float(np.mean(scale[~entry.created] ** 2)))
            for scale, entry in zip(self._scales, self._maps)
            if scale is not None and entry is not None
        ]
        layer = None if self._layers is None else self._origin(index)[self._layers]
        return self._choices.noise * self._root_mean_square(layer) * math.prod(scales)

    @functools.lru_cache(maxsize=256)  # noqa: B019 - as above
    def _root_mean_square(self, layer: int | None) -> float:
        values = self._source if layer is None or self._layers is None else self._source.take(layer, axis=self._layers)
        return math.sqrt(float(np.mean(values**2)))

    def _origin(self, index: Sequence[int]) -> tuple[int, ...]:
        return tuple(each if entry is None else int(entry.sources[each]) for entry, each in zip(self._maps, index))


def _multiply(axis: str, spec: ParamSpec, entry: IndexMap) -> tuple[np.ndarray, np.ndarray]:
    """(s, r) of one axis: the table in docs/growth.md, “Duality of gradients”."""
    written, read, ratio = entry.written, entry.read, entry.ratio
    if spec.gain:
        s = np.sqrt(written / (read * ratio))
        r = written * read / s
    else:
        s, r = (read, written) if axis in spec.contracted else (written, read)
    if axis in spec.meets_written:
        s, r = s * (read / written), r * (written / read)
    for scaled, power in spec.size_powers:
        if scaled == axis:
            s, r = s / ratio**power, r * ratio**power
    return s, r
