"""Which moments an optimizer keeps of each parameter: declared once, for state, shardings, checkpoints and growth."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from t5pegasus.axes import MomentSpec, ParamSpec, factored_axes, logical_axis, orthogonalised_axes
from t5pegasus.config import OptimizerConfig


class Moments(NamedTuple):
    """Running means by parameter name; a parameter stands only in those that its optimizer keeps of it."""

    first_moment: dict[str, Any]
    """Of gradients, or of updates (Adafactor with beta1)."""
    second_moment: dict[str, Any]
    """Of squared gradients, entry by entry."""
    row_moment: dict[str, Any]
    """Of squared gradients, averaged over the columns of factored parameters."""
    column_moment: dict[str, Any]
    """The same averaged over the rows."""

    def of(self, name: str) -> dict[str, Any]:
        """Those of one parameter, by kind."""
        return {kind: group[name] for kind, group in self._asdict().items() if name in group}


def declare_moments(config: OptimizerConfig, specs: Mapping[str, ParamSpec]) -> dict[str, dict[str, MomentSpec]]:
    """By kind (the fields of `Moments`) and parameter name: the axes of each moment, and how growth multiplies it.

    A grown moment is the source's, expanded along its own axes and multiplied by r^power there: r·m and r²·v; the means
    R and C of Adafactor, which are kept by their own axes, r² along those alone. Its first moment is one of directions,
    which growth leaves as they are: power 0. (See `adafactor` for created entries and for a change of structure.)
    """
    declared: dict[str, dict[str, MomentSpec]] = {kind: {} for kind in Moments._fields}
    for name, spec in specs.items():
        orthogonalised = config.name == "muon" and orthogonalised_axes(spec) is not None
        if config.momentum > 0 or config.name == "lion" or orthogonalised:
            declared["first_moment"][name] = MomentSpec(spec, 0 if config.name == "adafactor" else 1)
        if config.name in ("sgd", "lion") or orthogonalised:
            continue
        factored = factored_axes(spec, config.min_dim_size_to_factor) if config.name == "adafactor" else None
        if factored is None:
            declared["second_moment"][name] = MomentSpec(spec, 2)
            continue
        rows, columns = factored
        batch = tuple(axis for axis in spec.axes if logical_axis(axis) == "layers")
        declared["row_moment"][name] = MomentSpec(spec.restrict(batch + rows), 2)
        declared["column_moment"][name] = MomentSpec(spec.restrict(batch + columns), 2)
    return declared


def init_moments(config: OptimizerConfig, specs: Mapping[str, ParamSpec], parameters: Mapping[str, Any]) -> Moments:
    """The moments before the first update: zeros, of the parameters' types, or bfloat16 where that is configured.

    Adafactor's means over rows and columns are small, and keep the parameters' type.
    """
    declared = declare_moments(config, specs)
    narrow = jnp.bfloat16 if config.moment_dtype == "bfloat16" else None
    types = {"first_moment": narrow, "second_moment": narrow}
    return Moments(
        **{
            kind: {
                name: jnp.zeros(moment.spec.shape, types.get(kind) or parameters[name].dtype)
                for name, moment in declared[kind].items()
                if name in parameters
            }
            for kind in Moments._fields
        }
    )
