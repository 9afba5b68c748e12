"""Norms of gradients, updates and parameters by group; groups follow from the declarations, not from names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t5pegasus.axes import ParamSpec, logical_axis

KINDS = ("gradient", "update", "parameter")
"""Of norms: before clipping; what is added to the parameters, decay included; in front of that."""

Specs = Mapping[str, ParamSpec]


def parameter_group(spec: ParamSpec) -> str:
    """Which part of the model a parameter is of, e.g. `encoder.self_attention`, `decoder.mlp`, `norms`, `lm_head`."""
    if spec.gain:
        return "norms"
    axes = {logical_axis(axis): axis for axis in spec.axes}
    if "relpos_buckets" in axes:
        return "relative_bias"
    if "vocab" in axes:
        return "token_embedding" if "embed" not in spec.contracted else "lm_head"
    return axes["mlp"] if "mlp" in axes else f"{axes['heads'].rpartition('.')[0]}_attention"


def group_names(specs: Specs) -> tuple[str, ...]:
    """The groups of a model, in the order of `measure_norms`."""
    return tuple(sorted({parameter_group(spec) for spec in specs.values()}))


def measure_norms(
    specs: Specs,
    gradients: Mapping[str, jax.Array],
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
) -> jax.Array:
    """Norms by kind and group, float32 [3, groups].

    Args:
        specs: declarations, which are what the groups follow from.
        gradients: by name; frozen parameters have none, and count 0.
        before: parameters in front of the update.
        after: parameters behind it.
    """
    groups = group_names(specs)
    squares: list[list[Any]] = [[jnp.zeros(())] * len(groups) for _ in KINDS]
    for name, spec in sorted(specs.items()):
        place = groups.index(parameter_group(spec))
        for kind, array in enumerate((gradients.get(name), after[name] - before[name], before[name])):
            if array is not None:
                squares[kind][place] += jnp.sum(jnp.square(array), dtype=jnp.float32)
    return jnp.sqrt(jnp.array(squares))


def name_norms(specs: Specs, norms: np.ndarray) -> dict[str, dict[str, float]]:
    """What `measure_norms` gave, by kind and group, as the metrics have it."""
    groups = group_names(specs)
    return {kind: dict(zip(groups, map(float, row))) for kind, row in zip(KINDS, norms)}
