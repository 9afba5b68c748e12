"""The linter's refusals: dead plans, locked plans, and states that starve what was learned."""

import dataclasses

import pytest
from small_models import SOURCE

from growth.lint import OptimizerFacts, check_plan
from growth.plan import Choices, plan_axes
from growth.t5 import plan_growth
from t5pegasus.axes import ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import UsageError

ADAMW, SGD, MUON = OptimizerConfig(), OptimizerConfig(name="sgd"), OptimizerConfig(name="muon")
ADAFACTOR = OptimizerConfig(name="adafactor", min_dim_size_to_factor=16)
PAD = {"embed": "pad"}
SILENT = {"noise": 0.0, "learning_rate": "keep"}
UNEVEN = {"operator": "duplicate", "first_share": 0.7}


def plan(choices=None, optimizer=None, **changes):
    target = dataclasses.replace(SOURCE, **(changes or {"d_model": 24}))
    return plan_growth(SOURCE, target, choices, optimizer=optimizer)


@pytest.mark.parametrize(
    ("choices", "optimizer", "changes", "message"),
    [
        (SILENT | {"axes": PAD}, None, {}, "with noise=0 what writes its new entries and what reads them is both zero.*"
         "give noise=1, or dynamics=exact"),
        ({"noise": 0.0, "axes": {"*.mlp": "pad"}}, None, {"d_ff": 20}, "axis decoder.mlp: with noise=0"),
        (SILENT, None, {}, "noise=0, state=mapped and learning_rate=keep its copies get equal updates for ever.*give "
         "noise=1, learning_rate=rewarm or state=asymmetric, or dynamics=exact"),
        (SILENT | {"axes": {"*": UNEVEN}}, None, {"d_ff": 20}, "its copies get equal updates for ever"),
        (SILENT | {"state": "reset"}, ADAMW, {}, "state=reset and learning_rate=keep its copies get equal updates"),
        (SILENT | {"state": "asymmetric"}, OptimizerConfig(beta1=0.0), {}, "give noise=1, learning_rate=rewarm, or"),
        ({"noise": 0.0, "learning_rate": {"peak": 1.0, "steps": 1}}, None, {}, "give noise=1, learning_rate.peak=1.3"),
        ({"noise": 0.0}, ADAMW, {"d_ff": 29}, "not from each other, and here are up to 2 of one entry; give noise=1"),
        (SILENT | {"state": "asymmetric"}, ADAMW, {"d_model": 48}, "but not from each other, .* up to 3 of one entry"),
        ({"dynamics": "exact", "noise": 1.0}, None, {}, "dynamics=exact needs noise=0, got 1.0"),
        ({"dynamics": "exact", "state": "asymmetric"}, None, {}, "dynamics=exact needs state=mapped, got asymmetric"),
        ({"dynamics": "exact", "learning_rate": "rewarm"}, None, {}, "needs learning_rate.policy=keep, got rewarm"),
        ({"dynamics": "exact"}, None, {"num_encoder_layers": 3}, "axis encoder.layers: insert adds what learns"),
        ({"dynamics": "exact"}, None, {"vocab_size": 44}, "axis vocab: add adds what learns"),
        ({"state": "asymmetric"}, ADAFACTOR, {}, "starves the entries that share a row or a column.*give state=mapped"),
        ({"state": "reset"}, ADAFACTOR, {}, "state=reset would begin Adafactor's means of squares at zero"),
        ({}, ADAFACTOR, {"d_model": 24}, "in another form after this growth.*accept that by refactor=true"),
        ({"dynamics": "exact", "axes": PAD}, MUON, {}, "axis embed: pad creates entries, and Muon makes old and new"),
        ({"state": "reset"}, OptimizerConfig(beta2=0.999), {}, "first update 3.2 times the usual one at beta1=0.9"),
    ],
)  # fmt: skip
def test_a_dead_or_locked_plan_is_refused_and_told_what_to_change(choices, optimizer, changes, message):
    with pytest.raises(UsageError, match=message):
        plan(choices, optimizer, **changes)


@pytest.mark.parametrize(
    ("choices", "optimizer", "changes"),
    [
        ({}, None, {}),
        ({"axes": PAD}, ADAMW, {}),
        ({"noise": 0.0}, ADAMW, {}),
        (SILENT | {"state": "asymmetric"}, ADAMW, {}),
        (SILENT | {"state": "asymmetric"}, SGD, {}),
        (SILENT, ADAMW, {"num_encoder_layers": 3}),
        ({"dynamics": "exact", "axes": PAD}, ADAMW, {}),
        ({"dynamics": "exact"}, ADAFACTOR, {"d_ff": 20}),
        ({"refactor": True}, ADAFACTOR, {}),
        ({"state": "reset"}, ADAMW, {}),
        ({}, ADAFACTOR, {"d_ff": 28}),
        ({"dynamics": "exact"}, MUON, {"d_ff": 20}),
        ({}, MUON, {"num_encoder_layers": 3}),
    ],
)
def test_what_the_linter_asks_for_passes_it(choices, optimizer, changes):
    assert plan(choices, optimizer, **changes).remarks == ()


def test_what_padding_does_to_muon_is_remarked_on():
    (remark,) = plan({"axes": {"*": "pad"}}, MUON, d_ff=20).remarks
    assert "Muon makes old and created entries of decoder.mlp, encoder.mlp orthogonal together" in remark


def test_more_than_fourfold_growth_is_remarked_on():
    (remark,) = plan(d_model=60).remarks
    assert "axis embed grows 5.0-fold at once; 4-fold at most is usual" in remark


def test_units_that_nothing_reads_are_refused():
    specs = {"bias": ParamSpec(("mlp",), (), False, (4,))}
    growth = plan_axes({"mlp": 4}, {"mlp": 8}, Choices())
    with pytest.raises(UsageError, match=r"axis mlp is read by no parameter .* so its copies would add up"):
        check_plan(growth, specs, OptimizerFacts("adamw"))
