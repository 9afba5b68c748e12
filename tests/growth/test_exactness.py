"""A grown model computes what its source does: every operator, and random compositions of them, in float64.

The judge is `numpy_t5`, which was written from the papers and has never heard of growth.
"""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy_t5 import bucket_by_cases
from small_models import ALL, SOURCE, STEP, WIDTHS, grow, logit_error, oracle_logits, relative_error, trained_state

from growth.grow import grow_state
from growth.plan import GrowthPlan
from growth.t5 import ModelGrowth, plan_growth
from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.errors import UsageError

EXACT = 1e-13
PROFILES = {**NUMERICS, "tied, unscaled": NUMERICS["t5-1.0"] | {"scale_decoder_outputs": False}}
UNITS = {"d_kv": 7, "d_ff": 23, "num_heads": 5}
MORE_LAYERS = {"num_encoder_layers": 4, "num_decoder_layers": 3}
HALF, THIRD = 2**0.5, (4 / 3) ** 0.5
"""Amplitudes of two and of three copies, their squares summing to 4."""
PIECES = {"operator": "add", "rows": [[3], [4, 5], [6], [0, 7, 40]]}


def axes(**operators):
    return {"axes": {pattern.replace("_", "."): operator for pattern, operator in operators.items()}}


def duplicate(**options):
    return {"operator": "duplicate", **options}


def pad(**options):
    return {"operator": "pad", **options}


LOSSLESS = {
    "stream doubled": ({"d_model": 24}, None),
    "stream doubled, uneven": ({"d_model": 24}, axes(embed=duplicate(first_share=0.7))),
    "stream fractional": ({"d_model": 19}, None),
    "stream fractional, two and three copies, uneven": ({"d_model": 31}, axes(embed=duplicate(first_share=0.2))),
    "stream fractional, gains scaled": ({"d_model": 31}, axes(embed=duplicate(scale_gains=True, first_share=0.6))),
    "stream padded": ({"d_model": 19}, axes(embed="pad")),
    "stream padded behind": ({"d_model": 19}, axes(embed=pad(layout="tail"))),
    "stream padded, gains scaled": ({"d_model": 31}, axes(embed=pad(scale_gains=True))),
    "stream given entry by entry": (
        {"d_model": 16},
        axes(embed={"operator": "explicit", "map": {
            "sources": [*range(12), 0, 1, -1, 1],
            "written": [HALF, THIRD, *[2.0] * 10, HALF, THIRD, 1, THIRD],
            "read": [HALF / 4, THIRD / 4, *[0.5] * 10, HALF / 4, THIRD / 4, 1, THIRD / 4],
        }}),
    ),
    "units doubled": ({"d_kv": 10, "d_ff": 28, "num_heads": 6}, None),
    "units fractional, uneven": (
        UNITS,
        {"axes": {"*.mlp": duplicate(first_share=0.7), "*.heads": duplicate(first_share=0.2)}},
    ),
    "units tripled and more": ({"d_kv": 16, "d_ff": 50, "num_heads": 10}, None),
    "units padded": (UNITS, {"axes": {"*.[hmqv]*": "pad"}}),
    "units padded behind": (UNITS, {"axes": {"*.[hmqv]*": pad(layout="tail")}}),
    "units, each axis by its own operator": (
        UNITS,
        {"axes": {"encoder.mlp": "pad", "decoder.*.qk": "pad", "*.vo": duplicate(first_share=0.9),
                  "encoder.self.heads": pad(layout="tail"), "decoder.self.heads": duplicate(first_share=0.3)}},
    ),
    "layers interposed": ({"num_encoder_layers": 5, "num_decoder_layers": 3}, None),
    "layers on top": (MORE_LAYERS, {"axes": {"*.layers": {"operator": "insert", "at": "top"}}}),
    "layers at the bottom": (MORE_LAYERS, {"axes": {"*.layers": {"operator": "insert", "at": "bottom"}}}),
    "layers where a list says": (
        {"num_encoder_layers": 5},
        {"axes": {"encoder.layers": {"operator": "insert", "at": [1, -1, 1]}}},
    ),
    "tokens that are masked": ({"vocab_size": 45, "num_masked_tokens": 4, "d_model": 19}, axes(vocab=PIECES)),
    "tokens, stream padded": ({"vocab_size": 45, "d_model": 19}, axes(vocab=PIECES, embed="pad")),
    "everything by default": ({**ALL, "vocab_size": 45}, None),
    "everything padded": (ALL, {"axes": {"embed": "pad", "*.[hmqv]*": "pad"}}),
    "everything, silent": (WIDTHS, {"dynamics": "exact"}),
}  # fmt: skip


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("case", LOSSLESS)
def test_the_function_is_kept(profile, case):
    source = dataclasses.replace(SOURCE, **PROFILES[profile])
    growth, grown = grow(source, *LOSSLESS[case])
    assert logit_error(source, growth, grown) <= EXACT
    assert growth.plan.promise in ("L" if "tokens, stream" in case or "by default" in case else "BRM")


@pytest.mark.parametrize("profile", PROFILES)
def test_inserted_layers_and_refined_buckets_change_no_bit(profile):
    source = dataclasses.replace(SOURCE, **PROFILES[profile])
    lengths = ((30, 26), (9, 6))
    for changes in (MORE_LAYERS, {"relative_attention_boundaries": (15, 20)}):
        growth, grown = grow(source, changes)
        assert growth.plan.promise == "B"
        assert logit_error(source, growth, grown, lengths=lengths) == 0


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_refined_buckets_leave_every_bias_within_4096_positions_as_it_was(stack):
    boundaries, further = (256, 512), (256, 300, 512, 1024)
    source = dataclasses.replace(SOURCE, relative_attention_num_buckets=32, relative_attention_max_distance=128)
    middle, grown = grow(source, {"relative_attention_boundaries": boundaries})
    again = plan_growth(
        middle.target, dataclasses.replace(middle.target, relative_attention_boundaries=further), step=STEP
    )
    tables = [
        state.parameters[f"{stack}.relative_bias"] for state in (trained_state(source), grown, grow_state(grown, again))
    ]
    formula = {"bidirectional": stack == "encoder", "num_buckets": 32, "max_distance": 128}
    for distance in range(-4096, 4097, 1 if stack == "encoder" else 3):
        rows = [
            table[bucket_by_cases(distance, **formula, boundaries=own)]
            for table, own in zip(tables, ((), boundaries, further))
        ]
        np.testing.assert_array_equal(rows[1], rows[0])
        np.testing.assert_array_equal(rows[2], rows[0])


@pytest.mark.parametrize("order", ["append", "interpose", "middle", [0, 1, 1, 0]])
def test_stacked_layers_change_the_function_and_say_so(order):
    growth, grown = grow(
        SOURCE, {"num_encoder_layers": 4}, {"axes": {"encoder.layers": {"operator": "stack", "order": order}}}
    )
    assert growth.plan.promise == "L"
    assert logit_error(SOURCE, growth, grown) > 1e-3


def test_ways_of_growing_that_are_not_lossless_are_told_from_those_that_are():
    """What keeps these tests honest: errors of known size are seen."""
    wanted = oracle_logits(SOURCE, trained_state(SOURCE).parameters, 41)
    growth, grown = grow(SOURCE, {"d_model": 19}, {"axes": {"embed": pad(scale_gains=True)}, "noise": 1})
    forgotten = dataclasses.replace(growth.target, layer_norm_epsilon=SOURCE.layer_norm_epsilon)
    assert growth.target.layer_norm_epsilon == pytest.approx(SOURCE.layer_norm_epsilon * 12 / 19, rel=1e-15)
    assert 1e-9 < relative_error(oracle_logits(forgotten, grown.parameters, 41), wanted) < 1e-4
    growth, grown = grow(SOURCE, {"d_ff": 28})
    parameters = grown.parameters | {"encoder.layers.mlp.wo": grown.parameters["encoder.layers.mlp.wo"] * (1 + 1e-9)}
    assert 1e-11 < relative_error(oracle_logits(growth.target, parameters, 41), wanted) < 1e-8


def log_sum(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(-1, keepdims=True)
    return np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    ("rows", "stream"), [("mean", "duplicate"), ("mean", "pad"), ({"copy": 7}, "pad"), (PIECES["rows"], "duplicate")]
)
def test_new_tokens_take_the_mass_that_their_rows_say(profile, rows, stream):
    source = dataclasses.replace(SOURCE, **PROFILES[profile])
    before = oracle_logits(source, trained_state(source).parameters, 41)
    operator = {"operator": "add", "rows": rows}
    growth, grown = grow(source, {"vocab_size": 45, "d_model": 17}, axes(vocab=operator, embed=stream))
    after = oracle_logits(growth.target, grown.parameters, 41)
    pieces = rows if isinstance(rows, list) else [range(41) if rows == "mean" else [7]] * 4
    begun = np.stack([before[:, list(each)].mean(1) for each in pieces], axis=1)  # logits are linear in the head
    np.testing.assert_allclose(after[:, 41:], begun, rtol=0, atol=EXACT * np.abs(before).max())
    loss_added = log_sum(after) - log_sum(before)
    added = np.exp(begun).sum(1) / np.exp(before).sum(1)
    np.testing.assert_allclose(loss_added, np.log1p(added), rtol=0, atol=EXACT * np.abs(log_sum(before)).max())
    assert growth.plan.promise == "L"
    if rows == "mean":
        assert np.all(loss_added <= np.log1p(4 / 41))
    masked, masked_state = grow(
        source, {"vocab_size": 45, "d_model": 17, "num_masked_tokens": 4}, axes(vocab=operator, embed=stream)
    )
    assert masked.plan.promise == "M"
    silent = oracle_logits(masked.target, masked_state.parameters, 41)
    np.testing.assert_array_equal(silent[:, 41:], -np.inf)
    np.testing.assert_allclose(log_sum(silent), log_sum(before), rtol=1e-14)
    opened, opened_state = grow(masked.target, {"num_masked_tokens": 0}, state=masked_state)
    assert opened.plan.promise == "L"
    np.testing.assert_array_equal(oracle_logits(opened.target, opened_state.parameters, 41), after)


SMALL = st.integers(1, 6)
FACTORS = st.floats(1.0, 3.2)
SHARES = st.sampled_from([None, 0.1, 0.5, 0.7, 0.9])
UNIT_OPERATORS = st.one_of(
    st.builds(lambda share: duplicate(first_share=share), SHARES),
    st.builds(lambda layout: pad(layout=layout), st.sampled_from(["spread", "tail"])),
)
STREAM_OPERATORS = st.builds(lambda operator, scaled: operator | {"scale_gains": scaled}, UNIT_OPERATORS, st.booleans())
LAYER_OPERATORS = st.builds(
    lambda at: {"operator": "insert", "at": at}, st.sampled_from(["interposed", "top", "bottom"])
)
SIZES = ("d_model", "d_ff", "num_heads", "d_kv", "num_encoder_layers", "num_decoder_layers")


@st.composite
def small_configs(draw):
    return dataclasses.replace(
        SOURCE,
        **draw(st.sampled_from(list(PROFILES.values()))),
        vocab_size=draw(st.integers(4, 12)),
        d_model=draw(st.integers(2, 9)),
        d_ff=draw(SMALL),
        num_heads=draw(st.integers(1, 4)),
        d_kv=draw(st.integers(1, 5)),
        num_encoder_layers=draw(st.integers(1, 3)),
        num_decoder_layers=draw(st.integers(1, 3)),
    )


@st.composite
def growths(draw, source: ModelConfig) -> ModelGrowth:
    """Some fields, at least one, each to any size, and for every axis an operator of its own."""
    fields = draw(st.sets(st.sampled_from(SIZES), min_size=1))
    changes = {field: 1 + int(draw(FACTORS) * getattr(source, field)) for field in sorted(fields)}
    stacks = ("encoder.self", "decoder.self", "decoder.cross")
    operators = {"embed": draw(STREAM_OPERATORS)}
    operators |= {f"{stack}.layers": draw(LAYER_OPERATORS) for stack in ("encoder", "decoder")}
    operators |= {f"{stack}.mlp": draw(UNIT_OPERATORS) for stack in ("encoder", "decoder")}
    coupled = {"decoder.cross.heads"} if source.cross_attention_bias else set()
    for axis in sorted({f"{stack}.{axis}" for stack in stacks for axis in ("heads", "qk", "vo")} - coupled):
        operators[axis] = draw(UNIT_OPERATORS)
    if draw(st.booleans()):
        changes |= {"vocab_size": source.vocab_size + 3, "num_masked_tokens": source.num_masked_tokens + 3}
    if draw(st.booleans()):
        changes["relative_attention_boundaries"] = (
            *source.relative_attention_boundaries,
            20 + len(source.relative_attention_boundaries),
        )
    choices = {
        "axes": operators,
        "seed": draw(st.integers(0, 2**32 - 1)),
        "noise": draw(st.sampled_from([0.1, 1.0, 2.0])),
    }
    return plan_growth(source, dataclasses.replace(source, **changes), choices, step=STEP)


def random_state(config: ModelConfig):
    """`trained_state`, not kept."""
    return trained_state.__wrapped__(config)


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.data())
def test_200_compositions_of_operators_keep_the_function(data):
    source = data.draw(small_configs())
    state = random_state(source)
    first = data.draw(growths(source))
    grown = grow_state(state, first)
    lengths = ((7, 5),)
    assert logit_error(source, first, grown, state, lengths) <= EXACT
    if not data.draw(st.booleans()):
        return
    second = data.draw(growths(first.target))
    assert logit_error(source, second, grow_state(grown, second), state, lengths) <= EXACT
    try:
        both = first.plan.then(second.plan)
    except UsageError:
        assert "vocab" in {each.axis for each in first.plan.axes} & {each.axis for each in second.plan.axes}
        return
    joined = dataclasses.replace(second, source=source, plan=both)
    assert logit_error(source, joined, grow_state(state, joined), state, lengths) <= EXACT


def test_one_plan_for_two_is_the_two():
    first, middle = grow(
        SOURCE, {"d_model": 17, "d_ff": 20, "num_encoder_layers": 3}, axes(embed=pad(scale_gains=True))
    )
    second, twice = grow(
        middle_config := first.target, {"d_model": 31, "num_heads": 4, "num_encoder_layers": 5}, state=middle
    )
    plan = first.plan.then(second.plan)
    assert isinstance(plan, GrowthPlan)
    once = grow_state(trained_state(SOURCE), dataclasses.replace(second, source=SOURCE, plan=plan))
    assert {axis: each.source for axis, each in ((each.axis, each) for each in plan.axes)}["embed"] == 12
    for axis, record in twice.multipliers.items():
        inherited = record.inherited == 1
        for field in ("written", "read", "ratio", "inherited"):
            wanted, got = getattr(record, field), getattr(once.multipliers[axis], field)
            np.testing.assert_allclose(got[inherited], wanted[inherited], rtol=1e-15, err_msg=f"{axis} {field}")
    assert logit_error(middle_config, second, once, middle) <= EXACT
    with pytest.raises(UsageError, match=r"plans do not follow each other: axis .* ends at \d+ entries and begins at"):
        plan.then(second.plan)
