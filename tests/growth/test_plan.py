import dataclasses

import pytest

from growth.plan import GROWING_FIELDS, plan_growth
from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.presets import PRESETS

SOURCE = ModelConfig()


def changed(**fields) -> ModelConfig:
    return dataclasses.replace(SOURCE, **fields)


@pytest.mark.parametrize("field", GROWING_FIELDS)
def test_a_plan_that_shrinks_names_field_and_both_values(field):
    old = getattr(SOURCE, field)
    with pytest.raises(UsageError, match=rf"{field}={old - 1} is smaller than the checkpoint's {old}"):
        plan_growth(SOURCE, changed(**{field: old - 1}), seed=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("vocab_size", 60_000), ("relative_attention_num_buckets", 64), ("dropout_rate", 0.0), ("eos_token_id", 1)],
)
def test_a_plan_that_changes_something_else_names_field_and_both_values(field, value):
    with pytest.raises(UsageError, match=rf"{field}={value} differs from the checkpoint's {getattr(SOURCE, field)}"):
        plan_growth(SOURCE, changed(d_ff=4096, **{field: value}), seed=0)


def test_nothing_to_grow_is_an_error():
    with pytest.raises(UsageError, match="nothing to grow"):
        plan_growth(SOURCE, SOURCE, seed=0)


def test_numerics_that_an_operator_would_break_are_refused_by_name():
    tied, coupled = (changed(**NUMERICS[name]) for name in ("t5-1.0", "bert4keras"))
    with pytest.raises(UsageError, match=r"d_model=1024 differs .* 768, .* numerics t5-1.0 \(tie_word_embeddings=True"):
        plan_growth(tied, dataclasses.replace(tied, d_model=1024), seed=0)
    with pytest.raises(UsageError, match=r"numerics are bert4keras \(cross_attention_bias=True\)"):
        plan_growth(coupled, dataclasses.replace(coupled, d_ff=4096), seed=0)


def test_a_seed_out_of_range_is_refused():
    with pytest.raises(UsageError, match="seed=-1"):
        plan_growth(SOURCE, changed(d_ff=4096), seed=-1)


def test_the_hash_tells_plans_apart_and_nothing_else():
    plan = plan_growth(SOURCE, changed(d_model=1024), seed=0)
    assert plan.hash == plan_growth(SOURCE, changed(d_model=1024), seed=0).hash
    others = [
        plan_growth(SOURCE, changed(d_model=1024), seed=1),
        plan_growth(SOURCE, changed(d_model=1025), seed=0),
        plan_growth(SOURCE, changed(d_model=1024), seed=0, noise=0.5),
    ]
    assert len({plan.hash, *(other.hash for other in others)}) == 4


@pytest.mark.parametrize(
    ("fields", "promise"),
    [
        ({"d_model": 768 * 4}, "B"),
        ({"d_model": 768 * 2}, "R"),
        ({"d_model": 1000}, "R"),
        ({"d_ff": 2816, "num_encoder_layers": 24}, "B"),
        ({"d_ff": 2816, "d_kv": 96}, "R"),
    ],
)
def test_the_promise_is_that_of_the_weakest_field(fields, promise):
    plan = plan_growth(SOURCE, changed(**fields), seed=0)
    assert plan.function_class == promise
    assert {each.field for each in plan.fields} == fields.keys()


def test_presets_grow_into_the_next_one_except_where_heads_would_shrink():
    for small, large in (("base", "large"), ("large", "xl")):
        plan = plan_growth(PRESETS[small]().model, PRESETS[large]().model, seed=0)
        assert plan.target == PRESETS[large]().model
