"""Plans that are lossless and yet wrong: capacity that stays dead, or locked, or a state that starves what was learned.

Each rule is one of the hazards of docs/growth.md; a refused plan is told what to change.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from growth.plan import GrowthPlan
from t5pegasus.axes import ParamSpec
from t5pegasus.errors import UsageError

LARGEST_FIRST_UPDATE = 1.5
"""Of an entry whose moments begin at zero, in units of the usual one."""
LARGEST_FACTOR = 4


@dataclasses.dataclass(frozen=True)
class OptimizerFacts:
    """What of an optimizer a plan must fit."""

    name: str
    beta1: float = 0.9
    beta2: float = 0.98
    changed_structure: Sequence[str] = ()
    """Adafactor: parameters whose second moment is factored before growth or after it, but not both."""


def check_plan(plan: GrowthPlan, specs: Mapping[str, ParamSpec], optimizer: OptimizerFacts | None) -> list[str]:
    """Refuse a dead or locked plan.

    Args:
        plan: to look at.
        specs: declarations of the source's parameters.
        optimizer: of the state that grows; None if there is only a model.

    Returns:
        Sentences about what is allowed, but seldom wise.

    Raises:
        UsageError: in a sentence that says what to change.
    """
    if plan.choices.dynamics == "exact":
        _check_exact_dynamics(plan, optimizer)
    else:
        _check_breakers(plan, optimizer)
    if optimizer is not None:
        _check_state(plan, optimizer)
    read = {axis for spec in specs.values() for axis in spec.contracted}
    for each in plan.axes:
        if each.kind == "units" and each.axis not in read:
            raise UsageError(
                f"axis {each.axis} is read by no parameter (none has it in `contracted`), so its copies would add up; "
                "declare what reads it, or keep its size"
            )
    remarks = [
        f"axis {each.axis} grows {each.target / each.source:.1f}-fold at once; {LARGEST_FACTOR}-fold at most is usual"
        for each in plan.axes
        if each.kind in ("stream", "units", "layers") and each.target > LARGEST_FACTOR * each.source
    ]
    padded = [each.axis for each in plan.axes if each.kind in ("stream", "units") and each.map.created.any()]
    if optimizer is not None and optimizer.name == "muon" and padded:
        remarks.append(
            f"Muon makes old and created entries of {', '.join(padded)} orthogonal together, so old ones do not move "
            "as they would have; copies (duplicate) leave their way as it was"
        )
    return remarks


def _check_breakers(plan: GrowthPlan, optimizer: OptimizerFacts | None) -> None:
    """Whatever its shares, a copy without a breaker is locked: the record of multipliers sees to it, by design."""
    choices = plan.choices
    if choices.noise > 0:
        return
    has_momentum = optimizer is None or optimizer.beta1 > 0
    rate = choices.learning_rate
    has_own_rate = rate.policy == "rewarm" and (rate.peak != 1 or rate.steps > 1)
    parts_copies = has_own_rate or (choices.state == "asymmetric" and has_momentum)
    for each in plan.axes:
        if each.kind not in ("stream", "units"):
            continue
        if each.map.created.any():
            raise UsageError(
                f"axis {each.axis}: with noise=0 what writes its new entries and what reads them is both zero, and so "
                "is every gradient, for ever; give noise=1, or dynamics=exact if they are to stay silent"
            )
        if parts_copies and each.map.copies.max() > 2:
            raise UsageError(
                f"axis {each.axis}: with noise=0 copies part from what they are copies of, but not from each other, "
                f"and here are up to {each.map.copies.max() - 1} of one entry; give noise=1, or grow twofold at a time"
            )
        if each.map.copied.any() and not parts_copies:
            own_rate = "learning_rate=rewarm" if rate.policy != "rewarm" else "learning_rate.peak=1.3"
            ways = f"noise=1, {own_rate}" + (" or state=asymmetric" if has_momentum else "")
            raise UsageError(
                f"axis {each.axis}: with noise=0, state={choices.state} and "
                f"learning_rate={choices.learning_rate.policy} its copies get equal updates for ever and are no new "
                f"capacity; give {ways}, or dynamics=exact if that is what you want"
            )


def _check_exact_dynamics(plan: GrowthPlan, optimizer: OptimizerFacts | None) -> None:
    choices = plan.choices
    for field, wanted, got in (
        ("noise", 0, choices.noise),
        ("state", "mapped", choices.state),
        ("learning_rate.policy", "keep", choices.learning_rate.policy),
    ):
        if got != wanted:
            raise UsageError(f"dynamics=exact needs {field}={wanted}, got {got}; change one of them")
    for each in plan.axes:
        if each.kind not in ("stream", "units"):
            raise UsageError(
                f"axis {each.axis}: {each.operator['operator']} adds what learns from the first update on, so that "
                "training cannot stay the source's; leave it for another plan, or give dynamics=free"
            )
        if optimizer is not None and optimizer.name == "muon" and each.map.created.any():
            raise UsageError(
                f"axis {each.axis}: {each.operator['operator']} creates entries, and Muon makes old and new ones "
                "orthogonal together, so that training cannot stay the source's; give duplicate, or dynamics=free"
            )


def _check_state(plan: GrowthPlan, optimizer: OptimizerFacts) -> None:
    state = plan.choices.state
    if optimizer.name == "adafactor":
        if state != "mapped" and plan.choices.dynamics == "free":
            raise UsageError(
                f"state={state} would begin Adafactor's means of squares at zero, which starves the entries that share "
                "a row or a column with new ones for about a hundred updates; give state=mapped, and noise for copies"
            )
        if optimizer.changed_structure and not plan.choices.refactor:
            names = ", ".join(optimizer.changed_structure[:3])
            raise UsageError(
                f"Adafactor keeps {len(optimizer.changed_structure)} parameters' second moments in another form after "
                f"this growth ({names}), and what it keeps whole now is lost but for its rank-one part; accept that by "
                "refactor=true, or choose sizes on the same side of min_dim_size_to_factor"
            )
    if optimizer.name in ("adamw", "adamw-scaled", "muon") and state == "reset":
        first = (1 - optimizer.beta1) / (1 - optimizer.beta2) ** 0.5
        if first > LARGEST_FIRST_UPDATE:
            raise UsageError(
                f"state=reset makes the first update {first:.1f} times the usual one at beta1={optimizer.beta1}, "
                f"beta2={optimizer.beta2}; give state=mapped or asymmetric"
            )
