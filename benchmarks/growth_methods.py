"""The methods that `growth_peers.py` compares: ours by their choices, the peers written anew from their papers.

What a paper leaves open for this architecture (relative bias, gated units) is settled in the peer's favour: columns of
the bias follow their heads, and one choice of copies serves all layers.

- plain copy: every axis repeated at random, nothing divided;
- FPI, AKI: bert2BERT (Chen et al., ACL 2022; FPI is the widening of Net2Net). Entries beyond the old size copy random
  ones and readers divide by the number of copies; AKI takes the new outputs from the next layer;
- tiled FPI: the same with copies in order, which at ×1.5 repeats half of the stream's coordinates unscaled (naive
  fractional copies), and at ×2 all of them;
- zero pad: what writes new coordinates of the stream, or reads new units, is 0, all else that is new random, and gains
  stay as they are;
- overlap: a fresh model with the old one's entries in the first block of every array;
- stack: the whole stack again on top (StackBERT, Gong et al. 2019; G_stack, Du et al. 2024);
- interposed copies: every layer behind itself.

"fresh" is an AdamW that begins anew with its warm-up, as those papers have it; "copied" moments come the weights' way,
unscaled, and the step stays (zero pad: 0 where new, as in MSG, Yao et al. 2024).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from growth import grow_state, plan_growth
from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.config import ModelConfig
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.train.state import TrainState, start_state

SOURCE = {"d_model": 64, "d_ff": 128, "num_heads": 4, "d_kv": 16, "num_encoder_layers": 2, "num_decoder_layers": 2}
_WIDE, _WIDER = {"d_model": 96, "d_ff": 192, "num_heads": 6}, {"d_model": 128, "d_ff": 256, "num_heads": 8}
_DEEP = {"num_encoder_layers": 4, "num_decoder_layers": 4}
_PAD = {"axes": dict.fromkeys(("embed", "*.mlp", "*.heads"), "pad")}

_draw = jax.jit(init_parameters, static_argnums=0)

Arrays = dict[str, np.ndarray]
Grow = Callable[[TrainState, ModelConfig, ModelConfig, int], TrainState]
"""(state, its model, the target, seed) → a state of the target, in the precision of the given one."""


def at_random(old: int, new: int, random: np.random.Generator) -> np.ndarray:
    """Every entry once, then entries drawn at random (bert2BERT, eq. of g_in and g_out)."""
    return np.concatenate([np.arange(old), random.integers(0, old, new - old)])


def in_order(old: int, new: int, _: np.random.Generator) -> np.ndarray:
    """All entries, and again from the first one on."""
    return np.arange(new) % old


def copy_widths(
    arrays: Arrays, source: ModelConfig, target: ModelConfig, seed: int, *, indices: Callable = at_random,
    split: bool = True, from_next_layer: bool = False,
) -> Arrays:  # fmt: skip
    """Copies of entries along every axis of width that grows.

    Args:
        arrays: parameters, or moments by the parameters' names.
        source: what they are of.
        target: its widths count, not its depth.
        seed: of the choice of copies.
        indices: (old size, new size, random numbers) → the old entry of each new one.
        split: readers divide by the number of copies.
        from_next_layer: new outputs are those of the layer above (AKI); the highest has only itself.
    """
    random, grown = np.random.default_rng(seed), declare_parameters(target)
    specs = declare_parameters(source)
    sizes = {
        axis: (old, new)
        for name, spec in specs.items()
        for axis, old, new in zip(spec.axes, spec.shape, grown[name].shape)
        if new != old and logical_axis(axis) != "layers"
    }
    origins = {axis: indices(*sizes[axis], random) for axis in sorted(sizes)}

    def expand(array: np.ndarray, spec: ParamSpec) -> np.ndarray:
        for place, axis in enumerate(spec.axes):
            if axis in origins:
                array = array.take(origins[axis], axis=place)
                if split and axis in spec.contracted:
                    counts = np.bincount(origins[axis])[origins[axis]].astype(array.dtype)
                    array = array / along(counts, place, array.ndim)
        return array

    def widen(name: str, array: np.ndarray) -> np.ndarray:
        spec = specs[name]
        own = expand(array, spec)
        if not from_next_layer or spec.gain or logical_axis(spec.axes[0]) != "layers":
            return own
        above = expand(np.concatenate([array[1:], array[-1:]]), spec)
        for place, axis in enumerate(spec.axes):
            if axis in origins and axis not in spec.contracted:
                old, new = sizes[axis]
                own = np.where(along(np.arange(new) >= old, place, own.ndim), above, own)
        return own

    return {name: widen(name, array) for name, array in arrays.items()}


def along(vector: np.ndarray, place: int, ndim: int) -> np.ndarray:
    """A vector that broadcasts along one dimension of an array."""
    return vector.reshape([-1 if each == place else 1 for each in range(ndim)])


def copy_layers(arrays: Arrays, source: ModelConfig, target: ModelConfig, *, interposed: bool = False) -> Arrays:
    """Every layer twice, the stack behind itself or each layer behind itself, if the target is twice as deep."""
    if target.num_encoder_layers == source.num_encoder_layers:
        return arrays
    twice = functools.partial(np.repeat, repeats=2) if interposed else lambda array, axis: np.concatenate([array] * 2)
    return {name: twice(array, axis=0) if ".layers." in name else array for name, array in arrays.items()}


def overlap(
    arrays: Arrays, source: ModelConfig, target: ModelConfig, seed: int, *, zeros: bool = False, filled: bool = True
) -> Arrays:
    """The old entries in the first block of each array; the rest as in a fresh model, or 0.

    Args:
        arrays: as in `copy_widths`.
        source: what they are of.
        target: what is wanted.
        seed: of the fresh model.
        zeros: what writes new coordinates of the stream, and what reads new units, is 0.
        filled: False: all that is new is 0.
    """
    grown, fresh = {}, jax.device_get(_draw(target, seed))
    for name, spec in declare_parameters(source).items():
        array = fresh[name].astype(arrays[name].dtype) * filled
        for place, (axis, old) in enumerate(zip(spec.axes, spec.shape)):
            if zeros and not spec.gain and (axis == "embed") != (axis in spec.contracted):
                array[(slice(None),) * place + (slice(old, None),)] = 0
        array[tuple(slice(old) for old in spec.shape)] = arrays[name]
        grown[name] = array
    return grown


class Method(NamedTuple):
    """One row of the tables."""

    name: str
    optimizer: str
    grow: Grow


def ours(name: str, choices: dict[str, Any], *, policy: str = "rewarm", fresh: bool = False) -> Method:
    """`grow_state` by the defaults but for these choices."""

    def grow(state: TrainState, source: ModelConfig, target: ModelConfig, seed: int) -> TrainState:
        plan = {"seed": seed, "learning_rate": policy, **choices}
        growth = plan_growth(source, target, plan, step=int(state.step))
        assert growth.target == target
        grown = grow_state(state, growth)
        return start_state(grown.parameters, declare_parameters(target)) if fresh else grown

    return Method(f"ours: {name}", "fresh" if fresh else f"mapped, {policy}", grow)


def peer(name: str, grow_arrays: Callable[..., Arrays], *, moments: Callable[..., Arrays] | None = None) -> Method:
    """A method on parameters; `moments` treats both moments, None begins anew."""

    def grow(state: TrainState, source: ModelConfig, target: ModelConfig, seed: int) -> TrainState:
        grown = start_state(grow_arrays(state.parameters, source, target, seed), declare_parameters(target))
        if moments is None:
            return grown
        kept = {kind: moments(getattr(state, kind), source, target, seed) for kind in ("first_moment", "second_moment")}
        return grown._replace(step=state.step, **kept)

    return Method(name, "fresh" if moments is None else "copied", grow)


def widths(name: str, *, moments: bool = False, **options: Any) -> Method:
    """Copies along the widths, and the stack again on top where the target is deeper."""

    def grow_arrays(arrays: Arrays, source: ModelConfig, target: ModelConfig, seed: int, **options: Any) -> Arrays:
        return copy_layers(copy_widths(arrays, source, target, seed, **options), source, target)

    unscaled = functools.partial(grow_arrays, **options | {"split": False}) if moments else None
    return peer(name, functools.partial(grow_arrays, **options), moments=unscaled)


def layers(arrays: Arrays, source: ModelConfig, target: ModelConfig, _: int) -> Arrays:
    """Stacking."""
    return copy_layers(arrays, source, target)


_DEFAULT = [ours("default", {}), ours("default", {}, policy="keep")]
_FRESH = ours("default", {}, fresh=True)
_OVERLAP = peer("overlap", overlap)
_WIDTHS = [
    *_DEFAULT,
    ours("pad", _PAD),
    ours("exact dynamics", {"dynamics": "exact"}, policy="keep"),
    widths("plain copy", split=False),
    widths("FPI"),
    widths("FPI", moments=True),
    widths("tiled FPI", indices=in_order),
    widths("AKI", from_next_layer=True),
    peer("zero pad", functools.partial(overlap, zeros=True), moments=functools.partial(overlap, filled=False)),
]
_DEPTH = [
    *_DEFAULT,
    _FRESH,
    peer("stack", layers),
    peer("stack", layers, moments=layers),
    peer("interposed copies", lambda *growth: copy_layers(*growth[:3], interposed=True)),
    _OVERLAP,
]
_BOTH = [
    *_DEFAULT,
    widths("plain copy, stack", split=False),
    widths("FPI, stack"),
    widths("FPI, stack", moments=True),
    widths("AKI, stack", from_next_layer=True),
    _OVERLAP,
]
CASES: dict[str, tuple[dict[str, int], list[Method]]] = {
    "width ×1.5": (_WIDE, [*_WIDTHS, _FRESH, _OVERLAP]),
    "width ×2": (_WIDER, _WIDTHS),
    "depth ×2": (_DEEP, _DEPTH),
    "width ×1.5, depth ×2": (_WIDE | _DEEP, _BOTH),
}
