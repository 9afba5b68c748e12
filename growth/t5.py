"""Growth of this project's models: their config in terms of axes, and what else of a run a plan decides."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from growth.choices import Choices, Operator
from growth.leaves import WEIGHTS
from growth.lint import OptimizerFacts, check_plan
from growth.moments import factor_second_moment, split_factors
from growth.plan import GrowthPlan, plan_axes
from t5pegasus.axes import MomentSpec, ParamSpec
from t5pegasus.config import ModelConfig, OptimizerConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.attention import refined_bucket_sources
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.optimizer.moments import declare_moments

GROWING_FIELDS = (
    "d_model",
    "d_ff",
    "num_heads",
    "d_kv",
    "num_encoder_layers",
    "num_decoder_layers",
    "vocab_size",
    "relative_attention_boundaries",
    "num_masked_tokens",
)
"""The config fields that growth can change."""


_FIELDS_OF = {"open": "num_masked_tokens", "refine": "relative_attention_boundaries"}
"""Operators that a plan cannot choose, because a field of the config decides them."""


@dataclasses.dataclass(frozen=True, eq=False)
class ModelGrowth:
    """A growth from one model to another. Create it through `plan_growth`, which checks it."""

    source: ModelConfig
    target: ModelConfig
    plan: GrowthPlan
    optimizer: OptimizerConfig
    """Of the state that grows, which decides what moments there are."""
    remarks: tuple[str, ...] = ()
    """What is allowed, but seldom wise."""

    @property
    def specs(self) -> Mapping[str, ParamSpec]:
        """Declarations of the source's parameters."""
        return declare_parameters(self.source)

    @functools.cached_property
    def parts(self) -> dict[str, tuple[Mapping[str, ParamSpec], int]]:
        """The parts of the state: declarations of their arrays, and the power of the gradients' multipliers in them.

        Second moments that are factored after growth, but not before, stand there as the factors they become.
        """
        parts: dict[str, tuple[Mapping[str, ParamSpec], int]] = dict.fromkeys(WEIGHTS, (self.specs, 0))
        for group, moments in self._declare_moments().items():
            power = next((moment.power for moment in moments.values()), 2)
            parts[group] = {name: moment.spec for name, moment in moments.items()}, power
        return parts

    @functools.cached_property
    def refactored(self) -> tuple[str, ...]:
        """Parameters whose second moment is kept whole before growth and factored after it."""
        grown = declare_moments(self.optimizer, declare_parameters(self.target))
        stored = declare_moments(self.optimizer, self.specs)
        return tuple(sorted(grown["row_moment"].keys() - stored["row_moment"].keys()))

    def split_state(self, state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        """The source's arrays by part and name, with second moments factored where they are in the grown state."""
        arrays: dict[str, Any] = {group: dict(state[group]) for group in self.parts}
        for name in self.refactored:
            if name in arrays["second_moment"]:
                factors = factor_second_moment(arrays["second_moment"].pop(name), self.specs[name])
                arrays["row_moment"][name], arrays["column_moment"][name] = factors
        return arrays

    def _declare_moments(self) -> dict[str, dict[str, MomentSpec]]:
        moments = declare_moments(self.optimizer, self.specs)
        for name in self.refactored:
            del moments["second_moment"][name]
            spec = self.specs[name]
            for group, part in zip(("row_moment", "column_moment"), split_factors(spec)):
                moments[group][name] = MomentSpec(spec.restrict(part), 2)
        return moments

    @property
    def lossless(self) -> "ModelGrowth":
        """The same growth with maps as they are before they learn."""
        choices = dataclasses.replace(self.plan.choices, learned=None)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, choices=choices))

    def change_config(self, config: RunConfig, step: int) -> RunConfig:
        """The config of a run behind this growth: its model, and what the policy says of the learning rate.

        Args:
            config: of the run before.
            step: updates that it has made.
        """
        optimizer, rate = config.optimizer, self.plan.choices.learning_rate
        if rate.policy == "rewarm":
            optimizer = dataclasses.replace(optimizer, rewarm_steps=rate.steps, rewarm_peak=rate.peak)
        elif rate.policy == "remap" and rate.to_step is not None:
            optimizer = dataclasses.replace(optimizer, schedule_shift=rate.to_step - step)
        return dataclasses.replace(config, model=self.target, optimizer=optimizer)

    def to_json(self) -> dict[str, Any]:
        """What the lineage of a grown checkpoint holds."""
        return {"source": self.source.to_json(), "target": self.target.to_json(), **self.plan.to_json()}

    @property
    def hash(self) -> str:
        """sha256 of the plan, which has the sizes of all axes that grow."""
        return self.plan.hash


def plan_growth(
    source: ModelConfig,
    target: ModelConfig,
    choices: Choices | Mapping[str, Any] | None = None,
    *,
    step: int = 0,
    optimizer: OptimizerConfig | None = None,
) -> ModelGrowth:
    """The plan that takes a model of one config to another.

        growth = plan_growth(source, dataclasses.replace(source, d_model=1024), {"seed": 1})

    Args:
        source: config of the trained model.
        target: config to reach; only fields of GROWING_FIELDS may differ. Where a plan scales gains, the grown model's
            `layer_norm_epsilon` is another than the target's: that of `ModelGrowth.target` counts.
        choices: operators and policies, as an object or as a plan file has them; None takes the defaults.
        step: updates that the source has made.
        optimizer: of the state that grows; None if there is only a model.

    Raises:
        UsageError: if a field would shrink, another field differs, nothing grows, or the linter refuses the plan.
    """
    if not isinstance(choices, Choices):
        choices = Choices.from_json(choices or {})
    _check_fields(source, target)
    specs, grown_specs = declare_parameters(source), declare_parameters(target)
    sources, targets = _axis_sizes(specs), _axis_sizes(grown_specs)
    plan = plan_axes(sources, targets, _complete(choices, source, target), step=step)
    target = dataclasses.replace(target, layer_norm_epsilon=source.layer_norm_epsilon * plan.epsilon_factor)
    remarks = check_plan(plan, specs, None if optimizer is None else _facts(optimizer, specs, grown_specs))
    return ModelGrowth(source, target, plan, optimizer or OptimizerConfig(), tuple(remarks))


def _axis_sizes(specs: Mapping[str, ParamSpec]) -> dict[str, int]:
    return dict(sorted({axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}.items()))


def _complete(choices: Choices, source: ModelConfig, target: ModelConfig) -> Choices:
    """The choices with what only the configs say of tables: which buckets are split, which tokens masked or opened."""
    axes: dict[str, Any] = {}
    if source.relative_attention_boundaries != target.relative_attention_boundaries:
        for stack in ("encoder", "decoder"):
            rows = refined_bucket_sources(source, target, stack)
            axes[f"{stack}.relpos_buckets"] = {
                "operator": "refine",
                "boundaries": list(target.relative_attention_boundaries),
                "sources": [int(row) for row in rows],
            }
    new, masked = target.vocab_size - source.vocab_size, target.num_masked_tokens - source.num_masked_tokens
    if new:
        if masked not in (0, new) or (source.num_masked_tokens and not masked):
            raise UsageError(
                f"num_masked_tokens={target.num_masked_tokens}: of the {new} new tokens all or none can be masked, "
                f"beside the {source.num_masked_tokens} that are; give {source.num_masked_tokens + new}, or open the "
                "masked ones first"
            )
        axes["vocab"] = {"operator": "add", "rows": "mean", **rows_given(choices), "masked": masked == new}
    elif masked > 0:
        raise UsageError(
            f"num_masked_tokens={target.num_masked_tokens} is more than the checkpoint's {source.num_masked_tokens}, "
            "and only new tokens can be masked; give a larger vocab_size"
        )
    elif masked < 0:
        if target.num_masked_tokens:
            raise UsageError(f"num_masked_tokens={target.num_masked_tokens}: open all masked tokens at once, by 0")
        axes["vocab"] = {"operator": "open", "count": -masked}
    for pattern, given in choices.axes.items():
        field = _FIELDS_OF.get(str(given.get("operator")))
        if field is not None and axes.get(pattern) != given:
            raise UsageError(
                f"plan: axes: {pattern}: operator {given['operator']!r} follows from the target's {field}; leave it "
                f"out of the plan, and give {field}"
            )
    kept = {pattern: given for pattern, given in choices.axes.items() if pattern not in axes}
    return dataclasses.replace(choices, axes=kept | axes)


def rows_given(choices: Choices) -> Operator:
    """What a plan says of new tokens: by the last pattern that fits the vocabulary and adds rows, or by its name."""
    given = choices.find_operator("vocab") or {}
    return given if given.get("operator") == "add" else choices.axes.get("vocab", {})


def _facts(
    optimizer: OptimizerConfig, specs: Mapping[str, ParamSpec], grown_specs: Mapping[str, ParamSpec]
) -> OptimizerFacts:
    stored, grown = (declare_moments(optimizer, each)["row_moment"].keys() for each in (specs, grown_specs))
    return OptimizerFacts(optimizer.name, optimizer.momentum, optimizer.beta2, tuple(sorted(grown ^ stored)))


def _check_fields(source: ModelConfig, target: ModelConfig) -> None:
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(source, field.name), getattr(target, field.name)
        if field.name in ("relative_attention_boundaries", "num_masked_tokens"):
            continue
        if field.name in GROWING_FIELDS:
            if new < old:
                raise UsageError(
                    f"{field.name}={new} is smaller than the checkpoint's {old}, and growth never shrinks; "
                    f"give {field.name}={old} or more"
                )
        elif new != old:
            raise UsageError(
                f"{field.name}={new} differs from the checkpoint's {old}, and growth changes only "
                f"{', '.join(GROWING_FIELDS)}; give {field.name}={old}"
            )
    if source == target:
        raise UsageError(
            "nothing to grow: the target equals the checkpoint's model ("
            + ", ".join(f"{field}={getattr(source, field)}" for field in GROWING_FIELDS)
            + "); make at least one of them larger"
        )
