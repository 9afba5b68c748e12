"""Plans: what they refuse, in words; what they promise; how they are hashed, saved and read again."""

import contextlib
import dataclasses
import json

import pytest
from hypothesis import given, settings
from mutations import RANDOM, mutate_json

from growth.choices import Choices
from growth.t5 import GROWING_FIELDS, plan_growth
from t5pegasus.config import NUMERICS, ModelConfig, OptimizerConfig
from t5pegasus.errors import UsageError
from t5pegasus.presets import PRESETS

SOURCE = ModelConfig()
SIZES = [field for field in GROWING_FIELDS if field not in ("relative_attention_boundaries", "num_masked_tokens")]


def plan(choices=None, source=SOURCE, **changes):
    return plan_growth(source, dataclasses.replace(source, **changes), choices)


def axes(**operators):
    return {"axes": operators}


@pytest.mark.parametrize("field", SIZES)
def test_a_plan_that_shrinks_names_field_and_both_values(field):
    old = getattr(SOURCE, field)
    with pytest.raises(UsageError, match=rf"{field}={old - 1} is smaller than the checkpoint's {old}"):
        plan(**{field: old - 1})


@pytest.mark.parametrize(
    ("field", "value"), [("relative_attention_num_buckets", 64), ("dropout_rate", 0.0), ("eos_token_id", 1)]
)
def test_a_plan_that_changes_something_else_names_field_and_both_values(field, value):
    with pytest.raises(UsageError, match=rf"{field}={value} differs from the checkpoint's {getattr(SOURCE, field)}"):
        plan(d_ff=4096, **{field: value})


def test_nothing_to_grow_is_an_error():
    with pytest.raises(UsageError, match="nothing to grow"):
        plan()


MASKED = dataclasses.replace(SOURCE, num_masked_tokens=5)


@pytest.mark.parametrize(
    ("choices", "changes", "message"),
    [
        ({"axis": {}}, {}, "unknown field 'axis'; perhaps you meant 'axes'"),
        ({"axes": ["embed"]}, {}, "axes is a list, a JSON object was wanted"),
        ({"axes": {"embed": 3}}, {}, "axes: embed: 3 must be the name of an operator"),
        (axes(embed="repeat"), {}, r"axis embed \(stream\): operator 'repeat' does not fit; choose duplicate or pad"),
        (axes(embed={"layout": "tail"}), {}, "axis embed .* operator None does not fit"),
        (axes(embed={"operator": "pad", "layot": "tail"}), {}, "unknown field 'layot'; perhaps you meant 'layout'"),
        (axes(embed={"operator": "pad", "layout": "head"}), {}, "layout='head' must be spread or tail"),
        (axes(embed={"operator": "duplicate", "first_share": 1}), {}, "first_share=1 must be a number between 0 and 1"),
        (axes(embed={"operator": "duplicate", "first_share": "x"}), {}, "first_share='x' must be a number"),
        (axes(embed={"operator": "pad", "scale_gains": 1}), {}, "scale_gains=1 must be true or false"),
        (axes(embedd="pad"), {}, "pattern 'embedd' fits no axis of this model; perhaps you meant 'embed'"),
        (axes(**{"encoder.layers": "zero-gain"}), {"num_encoder_layers": 14}, "'zero-gain' is refused: .*no gradient"),
        (axes(**{"*.heads": "cancel-heads"}), {"num_heads": 14}, "'cancel-heads' is refused: .*relative bias"),
        (axes(**{"*.layers": {"operator": "insert", "at": "end"}}), {"num_encoder_layers": 14}, "at='end' must be"),
        (axes(**{"*.layers": {"operator": "insert", "at": [0]}}), {"num_encoder_layers": 14}, "list of 2 layers"),
        (axes(**{"*.layers": {"operator": "insert", "at": [0, 12]}}), {"num_encoder_layers": 14}, "from -1 .* to 11"),
        (axes(**{"*.layers": {"operator": "stack", "order": [0, 1]}}), {"num_encoder_layers": 14}, "list of 14 layers"),
        (axes(vocab={"operator": "add", "rows": [[1]]}), {"vocab_size": 50002}, "a list of 2 lists of rows below"),
        (axes(vocab={"operator": "add", "rows": [1, 2]}), {"vocab_size": 50002}, "a list of 2 lists of rows below"),
        (axes(vocab={"operator": "add", "rows": {"copy": 60000}}), {"vocab_size": 50002}, "rows below 50000"),
        ({"seed": -1}, {}, r"seed=-1 must be a whole number in \[0, 2\^32\)"),
        ({"seed": "1"}, {}, "seed='1' must be a whole number"),
        ({"noise": -1}, {}, "noise=-1 must be a number that is not negative"),
        ({"noise": float("nan")}, {}, "noise=nan must be a number"),
        ({"state": "copied"}, {}, "state='copied' must be one of mapped, asymmetric, reset"),
        ({"dynamics": True}, {}, "dynamics=True must be one of free, exact"),
        ({"learning_rate": "warm"}, {}, "learning_rate.policy='warm' must be keep, rewarm or remap"),
        ({"learning_rate": {"policy": "remap"}}, {}, "learning_rate.to_step goes with policy remap"),
        (
            {"learning_rate": {"policy": "remap", "to_step": "x"}},
            {},
            "learning_rate.to_step='x' must be a whole number",
        ),
        ({"learning_rate": {"steps": 0}}, {}, "learning_rate.steps=0 must be a whole number, 1 or more"),
        ({"learning_rate": {"peak": "x"}}, {}, "learning_rate.peak='x' must be a positive number"),
        ({"refactor": "yes"}, {}, "refactor='yes' must be true or false"),
    ],
)
def test_a_plan_file_that_cannot_be_meant_is_refused_in_words(choices, changes, message):
    with pytest.raises(UsageError, match=message):
        plan(choices, **({"d_model": 1024} | changes))


@pytest.mark.parametrize(
    ("axis", "field", "target", "fields", "message"),
    [
        ("embed", "d_model", 4, None, "map is a NoneType, a JSON object was wanted"),
        ("embed", "d_model", 4, {}, "sources must be a list of 4 whole numbers"),
        ("embed", "d_model", 4, {"sources": [0, 1]}, "sources must be a list of 4 whole numbers"),
        ("embed", "d_model", 4, {"sources": [0, 0.5, 1, 1]}, "sources must be a list of 4 whole numbers"),
        ("embed", "d_model", 4, {"sources": [0, 1, 1, 2]}, "sources must lie from -1 .* to 1"),
        ("embed", "d_model", 4, {"sources": [0, 0, 1, 1], "written": [1]}, "written must be a list of 4 numbers"),
        ("embed", "d_model", 4, {"sources": [0, 0, 1, 1]}, "for entry 0 it sums to 2"),
        ("embed", "d_model", 4, {"sources": [0, 0, 0, -1], "read": [1 / 3] * 4}, "for entry 1 it sums to 0"),
        (
            "embed",
            "d_model",
            4,
            {"sources": [0, 0, 1, -1], "read": [0.5, 0.5, 1, 1]},
            "written² must sum to one number",
        ),
        (
            "embed",
            "d_model",
            4,
            {"sources": [0, 0, 1, 1], "read": [0.7, 0.3, 0.7, 0.3]},
            "uneven shares of equal copies",
        ),
        ("embed", "d_model", 4, {"sources": [0, 0, 1, 1], "read": [1, 0, 1, 0]}, "must be positive"),
        (
            "*.mlp",
            "d_ff",
            4,
            {"sources": [0, 0, 1, 1], "written": [2, 2, 2, 2], "read": [0.25] * 4},
            "give written = 1",
        ),
    ],
)
def test_an_explicit_map_is_taken_only_if_it_keeps_function_and_gradients(axis, field, target, fields, message):
    source = dataclasses.replace(SOURCE, d_model=2, d_ff=2)
    choices = {"axes": {axis: {"operator": "explicit", "map": fields}}, "noise": 0.0}
    with pytest.raises(UsageError, match=message):
        plan(choices, source, **{field: target})


def test_what_tables_need_beside_sizes_is_refused_in_words():
    with pytest.raises(UsageError, match="only new tokens can be masked; give a larger vocab_size"):
        plan(num_masked_tokens=3)
    with pytest.raises(UsageError, match="of the 4 new tokens all or none can be masked"):
        plan(vocab_size=50004, num_masked_tokens=2)
    with pytest.raises(UsageError, match="open all masked tokens at once, by 0"):
        plan(source=MASKED, num_masked_tokens=2)


@pytest.mark.parametrize(
    ("choices", "field"),
    [
        (axes(vocab="open"), "num_masked_tokens"),
        (axes(**{"v*": {"operator": "open", "count": 3}}), "num_masked_tokens"),
        (axes(**{"*.relpos_buckets": "refine"}), "relative_attention_boundaries"),
        (axes(**{"encoder.relpos_buckets": {"operator": "refine", "sources": [0]}}), "relative_attention_boundaries"),
    ],
)
def test_what_the_config_decides_is_no_choice_of_a_plan(choices, field):
    with pytest.raises(UsageError, match=f"follows from the target's {field}; leave it out of the plan"):
        plan(choices, d_model=1024, relative_attention_boundaries=(256,))


def test_new_rows_begin_as_the_last_pattern_says():
    growth = plan(axes(**{"voc*": {"operator": "add", "rows": {"copy": 7}}, "*": "pad"}), vocab_size=50002, d_ff=4096)
    assert growth.plan.maps["vocab"].mixtures == (None, None)  # "*" fits, too, and does not add
    growth = plan(axes(**{"*": "pad", "voc*": {"operator": "add", "rows": {"copy": 7}}}), vocab_size=50002, d_ff=4096)
    assert growth.plan.maps["vocab"].mixtures == ((7,), (7,))


def test_the_hash_tells_plans_apart_and_nothing_else():
    first = plan(d_model=1024)
    assert first.hash == plan(d_model=1024).hash == plan({"seed": 0, "axes": {}}, d_model=1024).hash
    others = [
        plan({"seed": 1}, d_model=1024),
        plan(d_model=1025),
        plan({"noise": 0.5}, d_model=1024),
        plan(axes(embed="pad"), d_model=1024),
        plan({"learning_rate": "keep"}, d_model=1024),
        plan(d_model=1024, d_ff=4096),
        plan(relative_attention_boundaries=(256,)),
        plan(relative_attention_boundaries=(512,)),
    ]
    assert len({first.hash, *(other.hash for other in others)}) == 9


def test_a_plan_is_json_that_reads_back_as_the_same_plan():
    choices = {
        "axes": {"embed": "pad", "*.mlp": {"operator": "duplicate", "first_share": 0.7}},
        "seed": 3, "noise": 0.5, "state": "asymmetric", "learning_rate": {"policy": "rewarm", "steps": 9},
    }  # fmt: skip
    growth = plan(choices, d_model=1024, d_ff=4096)
    saved = json.loads(json.dumps(growth.plan.to_json()))
    policies = {field: saved[field] for field in choices if field != "axes"}
    operators = {
        axis: {key: value for key, value in entry.items() if key not in ("source", "target")}
        for axis, entry in saved["axes"].items()
    }
    assert saved["axes"]["embed"] == {"source": 768, "target": 1024, "operator": "pad"}
    again = plan({**policies, "axes": operators}, d_model=1024, d_ff=4096)
    assert again.plan.to_json()["axes"] == growth.plan.to_json()["axes"]
    assert Choices.from_json(choices).to_json()["learning_rate"] == {
        "policy": "rewarm", "steps": 9, "peak": 1.3, "to_step": None
    }  # fmt: skip


TAIL = {"operator": "pad", "layout": "tail"}


@pytest.mark.parametrize(
    ("choices", "changes", "promise"),
    [
        (axes(embed=TAIL), {"d_model": 768 * 4}, "B"),
        (axes(embed=TAIL), {"d_model": 768 * 2}, "R"),
        (axes(embed="pad"), {"d_model": 768 * 4}, "R"),
        (None, {"d_model": 1000}, "R"),
        (axes(**{"*.mlp": TAIL}), {"d_ff": 2816, "num_encoder_layers": 24}, "B"),
        (axes(**{"*.heads": TAIL}), {"num_heads": 16}, "B"),
        (axes(**{"*.[qv]*": TAIL}), {"d_kv": 96}, "R"),
        (None, {"relative_attention_boundaries": (256, 512)}, "B"),
        (None, {"vocab_size": 50010, "num_masked_tokens": 10}, "M"),
        (None, {"vocab_size": 50010}, "L"),
        (axes(**{"*.layers": "stack"}), {"num_decoder_layers": 24}, "L"),
    ],
)
def test_the_promise_is_that_of_the_weakest_axis(choices, changes, promise):
    assert plan(choices, **changes).plan.promise == promise


def test_the_last_pattern_that_fits_decides():
    growth = plan(axes(**{"*": "pad", "encoder.*.heads": "duplicate"}), num_heads=16)
    operators = {each.axis: each.operator["operator"] for each in growth.plan.axes}
    assert operators == {"encoder.self.heads": "duplicate", "decoder.self.heads": "pad", "decoder.cross.heads": "pad"}


WHOLE = {
    "axes": {
        "embed": {
            "operator": "explicit",
            "map": {"sources": [0, 1, -1, -1], "written": [2**0.5] * 4, "read": [0.5**0.5] * 4},
        },
        "*.mlp": {"operator": "duplicate", "first_share": 0.7},
        "*.heads": {"operator": "pad", "layout": "tail"},
        "encoder.layers": {"operator": "insert", "at": [0, 1, -1]},
        "decoder.layers": {"operator": "stack", "order": [0, 1, 0]},
        "vocab": {"operator": "add", "rows": [[1], [2, 3]]},
    },
    "seed": 3, "noise": 0.5, "state": "asymmetric", "dynamics": "free", "refactor": False,
    "learning_rate": {"policy": "remap", "peak": 1.3, "steps": 250, "to_step": 7},
}  # fmt: skip
SMALL = dataclasses.replace(
    SOURCE, vocab_size=10, d_model=2, d_kv=2, d_ff=3, num_heads=2, num_encoder_layers=2, num_decoder_layers=2,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
LARGER = {
    "vocab_size": 12, "d_model": 4, "d_ff": 5, "num_heads": 3, "num_encoder_layers": 5, "num_decoder_layers": 3
}  # fmt: skip


@settings(max_examples=400)
@given(RANDOM)
def test_a_damaged_plan_file_is_refused_in_words_or_still_a_plan(random):
    with contextlib.suppress(UsageError):
        json.dumps(plan(mutate_json(WHOLE, random), SMALL, **LARGER).to_json(), allow_nan=False)


def test_in_bert4keras_numerics_cross_heads_grow_with_the_decoders_table():
    coupled = dataclasses.replace(SOURCE, **NUMERICS["bert4keras"])
    assert "decoder.cross.heads" not in plan(source=coupled, num_heads=16).plan.maps


def test_presets_grow_into_the_next_one():
    for small, large in (("base", "large"), ("large", "xl")):
        target = PRESETS[large]().model
        growth = plan_growth(PRESETS[small]().model, target, optimizer=OptimizerConfig())
        assert growth.target == target
