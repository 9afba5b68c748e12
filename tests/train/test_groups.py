"""Laws of parameter groups: patterns mean what declarations say, rates multiply, what is frozen stays bit for bit."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.presets import tiny
from t5pegasus.train.groups import count_trained, frozen_parameters, learning_rate_factors, select_entries
from t5pegasus.train.optimizer import Moments, apply_optimizer, init_multipliers


@pytest.fixture(scope="module")
def specs():
    return declare_parameters(
        dataclasses.replace(tiny().model, vocab_size=128, num_encoder_layers=3, num_decoder_layers=2)
    )


@pytest.mark.parametrize(
    ("pattern", "belongs"),
    [
        ("encoder.*", lambda name, _: name.startswith("encoder.")),
        ("encoder.layers", lambda name, _: name.startswith("encoder.layers.")),
        ("vocab", lambda name, _: name in ("token_embedding", "lm_head")),
        ("*.relative_bias", lambda name, _: name.endswith("relative_bias")),
        ("*.mlp", lambda name, spec: any(axis.endswith(".mlp") for axis in spec.axes) or name.endswith(".mlp")),
    ],
)
def test_a_pattern_means_parameters_by_name_or_axis(specs, pattern, belongs):
    selected = select_entries(pattern, specs, "field")
    assert set(selected) == {name for name, spec in specs.items() if belongs(name, spec)}
    assert all(chosen.all() for chosen in selected.values())


def test_a_range_means_entries_along_an_axis(specs):
    selected = select_entries("encoder.layers[:-1]", specs, "field")
    assert set(selected) == set(select_entries("encoder.layers", specs, "field"))
    for name, chosen in selected.items():
        np.testing.assert_array_equal(chosen.ravel(), [True, True, False])
        assert np.broadcast_to(chosen, specs[name].shape)[:2].all()
    assert select_entries("vocab[5:7]", specs, "field")["lm_head"].shape == (1, 128)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "encoder.layer",
            "optimizer.freeze: pattern 'encoder.layer' fits no parameter and no axis; perhaps you meant encoder.layers",
        ),
        ("vocabulary", "perhaps you meant vocab"),
        ("lm_head[:5]", "fits no entries of an axis"),
        ("encoder.layers[-:]", "fits no parameter and no axis"),
        ("encoder.layers[3:]", "fits no entries of an axis; perhaps you meant encoder.layers"),
    ],
)
def test_a_pattern_that_fits_nothing_names_the_nearest(specs, pattern, message):
    with pytest.raises(UsageError, match=message.replace("[", r"\[")):
        learning_rate_factors(OptimizerConfig(freeze=(pattern,)), specs)


def test_settings_that_change_nothing_leave_no_factor(specs):
    assert learning_rate_factors(OptimizerConfig(), specs) == {}
    assert learning_rate_factors(OptimizerConfig(layer_decay=1.0, rate_factors=("*=1",)), specs) == {}


def test_layer_decay_counts_from_the_top_of_each_stack(specs):
    factors = learning_rate_factors(OptimizerConfig(layer_decay=0.5), specs)
    np.testing.assert_array_equal(factors["encoder.layers.mlp.wo"].ravel(), [0.25, 0.5, 1])
    np.testing.assert_array_equal(factors["decoder.layers.cross_attention.query"].ravel(), [0.5, 1])
    np.testing.assert_array_equal(factors["token_embedding"], [[0.125]])
    assert not factors.keys() & {"lm_head", "encoder.final_norm", "encoder.relative_bias"}


def test_factors_multiply_and_freezing_wins(specs):
    config = OptimizerConfig(rate_factors=("decoder.*=3", "decoder.layers[:1]=0.5"), freeze=("*.mlp",))
    factors = learning_rate_factors(config, specs)
    np.testing.assert_array_equal(factors["decoder.layers.self_attention.key"].ravel(), [1.5, 3])
    np.testing.assert_array_equal(factors["decoder.final_norm"], [3])
    assert frozen_parameters(factors) == {
        f"{side}.layers.mlp.{name}" for side in ("encoder", "decoder") for name in ("wi_0", "wi_1", "wo")
    }
    total = sum(np.prod(spec.shape) for spec in specs.values())
    assert count_trained(factors, specs) == total - 3 * 64 * 128 * 5
    assert count_trained(learning_rate_factors(OptimizerConfig(freeze=("encoder.layers[0:2]",)), specs), specs) == (
        total - 2 * sum(np.prod(spec.shape[1:]) for spec in specs.values() if "encoder.layers" in spec.axes)
    )


def test_freezing_everything_is_refused(specs):
    with pytest.raises(UsageError, match=r"optimizer.freeze=encoder.\* \* freezes every parameter"):
        learning_rate_factors(OptimizerConfig(freeze=("encoder.*", "*")), specs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_decay": 0.0}, r"optimizer.layer_decay=0.0 must lie in \(0, 1\]"),
        ({"rate_factors": ("encoder.*",)}, r"'encoder.\*' is not PATTERN=FACTOR"),
        ({"rate_factors": ("vocab=0",)}, "positive factor.*freeze what is not to be trained"),
    ],
)
def test_settings_outside_their_range_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**fields)


def test_an_update_is_adamw_at_each_entrys_own_rate_and_leaves_the_frozen_alone():
    all_specs = declare_parameters(dataclasses.replace(tiny().model, vocab_size=128))
    names = ("encoder.layers.mlp.wo", "decoder.layers.mlp.wo", "decoder.final_norm")
    specs = {name: all_specs[name] for name in names}
    config = OptimizerConfig(
        layer_decay=0.5, rate_factors=("decoder.*=2",), freeze=("decoder.layers[:1]", "encoder.*"), weight_decay=0.1
    )
    factors = learning_rate_factors(config, specs)
    random = np.random.default_rng(0)
    theta, gradients, m, v = (
        {name: random.random(spec.shape, np.float32) for name, spec in specs.items()} for _ in range(4)
    )
    gradients.pop("encoder.layers.mlp.wo")
    placed = ({k: jnp.asarray(a) for k, a in each.items()} for each in (theta, gradients, m, v))
    parameters, gradient_arrays, *moments = placed
    new, (new_m, new_v, *_) = apply_optimizer(
        config, specs, init_multipliers(specs), parameters, gradient_arrays, Moments(*moments, {}, {}), jnp.int32(4),
        jnp.float32(1e-2), factors,
    )  # fmt: skip
    frozen = {"encoder.layers.mlp.wo": slice(None), "decoder.layers.mlp.wo": slice(0, 1)}
    for name, entries in frozen.items():
        for before, after in ((theta, new), (m, new_m), (v, new_v)):
            np.testing.assert_array_equal(after[name][entries], before[name][entries])
    for name, entries, rate in (("decoder.layers.mlp.wo", 1, 2e-2), ("decoder.final_norm", slice(None), 2e-2)):
        g = gradients[name][entries].astype(np.float64)
        wanted_m = 0.9 * m[name][entries] + 0.1 * g
        wanted_v = 0.98 * v[name][entries] + 0.02 * g**2
        direction = (wanted_m / (1 - 0.9**5)) / (np.sqrt(wanted_v / (1 - 0.98**5)) + 1e-6)
        decay = 0.0 if specs[name].gain else 0.1 * theta[name][entries]
        np.testing.assert_allclose(
            new[name][entries], theta[name][entries] - rate * (direction + decay), rtol=0, atol=2e-7
        )
        np.testing.assert_allclose(new_m[name][entries], wanted_m, rtol=1e-6)
        np.testing.assert_allclose(new_v[name][entries], wanted_v, rtol=1e-6)
