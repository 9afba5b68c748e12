"""Parameter groups: which entries a pattern means, and by what each entry's learning rate is multiplied.

Groups follow from declarations: a pattern names parameters or axes, and a layer's rate hangs on its place along its
`layers` axis. Layer-wise decay is that of Howard & Ruder (2018) and Clark et al. (2020, ELECTRA).
"""

import difflib
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase

import numpy as np

from t5pegasus.axes import ParamSpec, logical_axis, orthogonalised_axes
from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import UsageError

Specs = Mapping[str, ParamSpec]


def learning_rate_factors(config: OptimizerConfig, specs: Specs) -> dict[str, np.ndarray]:
    """What multiplies the learning rate: layer decay × the factors of all patterns that fit, 0 where frozen.

    With Muon also × the rate of AdamW, for parameters that this trains.

    Returns:
        By parameter name float32 arrays that broadcast to the parameter, of its rank; parameters whose entries all
        have factor 1 are left out, so that settings that change nothing leave the update as it is.

    Raises:
        UsageError: if a pattern fits nothing, or nothing is left to train.
    """
    factors = {name: _layer_decay(spec, specs, config.layer_decay) for name, spec in specs.items()}
    if config.name == "muon":
        for name, spec in specs.items():
            factors[name] = factors[name] * (config.muon_adamw_rate if orthogonalised_axes(spec) is None else 1.0)
    for each in config.rate_factors:
        pattern, _, factor = each.rpartition("=")
        for name, chosen in select_entries(pattern, specs, "optimizer.rate_factors").items():
            factors[name] = factors[name] * np.where(chosen, float(factor), 1.0)
    for pattern in config.freeze:
        for name, chosen in select_entries(pattern, specs, "optimizer.freeze").items():
            factors[name] = np.where(chosen, 0.0, factors[name])
    if not any(factor.any() for factor in factors.values()):
        raise UsageError(
            f"optimizer.freeze={' '.join(config.freeze)} freezes every parameter; leave some to be trained"
        )
    return {name: factor.astype(np.float32) for name, factor in factors.items() if (factor != 1).any()}


def select_entries(pattern: str, specs: Specs, field: str) -> dict[str, np.ndarray]:
    """The parameters that a pattern means, each with a boolean array that broadcasts to it.

    A pattern is a shell pattern of parameter names (`encoder.*`, `*.relative_bias`) or of axis names, which means all
    parameters that have the axis (`encoder.layers`, `vocab`); `encoder.layers[:6]` means entries of an axis, here the
    six lowest layers, with Python's slices.

    Args:
        pattern: the pattern.
        specs: declarations.
        field: of the config that the pattern is from, for the message.

    Raises:
        UsageError: if it fits neither, naming the nearest names.
    """
    found = re.fullmatch(r"(.*?)(?:\[(-?\d+|):(-?\d+|)\])?", pattern)
    glob, *bounds = found.groups() if found else (pattern,)
    part = None if not found or bounds[0] is None else slice(*(int(bound) if bound else None for bound in bounds))
    selected = {}
    for name, spec in specs.items():
        if part is None:
            if any(fnmatchcase(each, glob) for each in (name, *spec.axes)):
                selected[name] = np.ones([1] * len(spec.shape), bool)
            continue
        for dimension, axis in enumerate(spec.axes):
            if fnmatchcase(axis, glob):
                chosen = np.zeros(spec.shape[dimension], bool)
                chosen[part] = True
                along = _along(chosen, dimension, spec)
                selected[name] = selected[name] | along if name in selected else along
    if not any(chosen.any() for chosen in selected.values()):
        axes = sorted({axis for spec in specs.values() for axis in spec.axes})
        known = axes if part else [*specs, *axes]
        near = difflib.get_close_matches(glob, known, n=3)
        way_out = f"perhaps you meant {', '.join(near)}" if near else f"axes are {', '.join(axes)}"
        what = "entries of an axis" if part else "parameter and no axis"
        raise UsageError(f"{field}: pattern {pattern!r} fits no {what}; {way_out}")
    return selected


def frozen_parameters(factors: Mapping[str, np.ndarray]) -> frozenset[str]:
    """The parameters of which no entry is trained."""
    return frozenset(name for name, factor in factors.items() if not factor.any())


def count_trained(factors: Mapping[str, np.ndarray], specs: Specs) -> int:
    """Number of scalars whose factor is not 0."""
    sizes = {name: math.prod(spec.shape) for name, spec in specs.items()}
    return sum(
        size if name not in factors else round(size * np.count_nonzero(factors[name]) / factors[name].size)
        for name, size in sizes.items()
    )


def _layer_decay(spec: ParamSpec, specs: Specs, decay: float) -> np.ndarray:
    """Decay to the power of the layers between a layer and the top of its stack.

    The input embedding lies below the lowest layer of the deeper stack. What belongs to no single layer (head, final
    norms, the relative bias that a stack's layers share) has factor 1.
    """
    for dimension, axis in enumerate(spec.axes):
        if logical_axis(axis) == "layers":
            return _along(decay ** np.arange(spec.shape[dimension] - 1, -1, -1.0), dimension, spec)
    ones = np.ones([1] * len(spec.shape))
    if "vocab" in spec.axes and not spec.contracted:
        sizes = [
            size for each in specs.values() for axis, size in zip(each.axes, each.shape) if axis.endswith("layers")
        ]
        return ones * decay ** max(sizes)
    return ones


def _along(values: np.ndarray, dimension: int, spec: ParamSpec) -> np.ndarray:
    shape = [1] * len(spec.shape)
    shape[dimension] = -1
    return values.reshape(shape)
