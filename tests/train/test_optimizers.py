"""Laws of the optimizers: theirs where nothing grew, deaf to created entries where something did, rates as recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5pegasus.axes import AxisMultiplier, ParamSpec, factored_axes
from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.presets import tiny
from t5pegasus.train.optimizer import (
    apply_optimizer,
    declare_moments,
    init_moments,
    init_multipliers,
    make_schedule,
    rewarm_factor,
)

RATE = 0.03
MATRIX = {"w": ParamSpec(("embed", "mlp"), ("embed",), gain=False, shape=(6, 4))}
STACK = {"w": ParamSpec(("layers", "mlp", "embed"), ("mlp",), gain=False, shape=(3, 4, 6))}


def updates(config, specs, parameters, gradients, multipliers=None, step=0):
    """Parameters after updates by these gradients, in a row."""
    multipliers = multipliers or init_multipliers(specs)
    moments = init_moments(config, specs, parameters)
    for count, gradient in enumerate(gradients):
        parameters, moments = apply_optimizer(
            config, specs, multipliers, parameters, {"w": gradient}, moments, jnp.int32(step + count), jnp.asarray(RATE)
        )
    return parameters["w"]


def draw(shape, count, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(scale * random.normal(size=shape)) for scale in np.geomspace(0.1, 3, count)]


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({"name": "sgd"}, optax.sgd(RATE, momentum=0.9)),
        ({"name": "sgd", "beta1": 0}, optax.sgd(RATE)),
        (
            {"name": "adafactor", "min_dim_size_to_factor": 4},
            optax.adafactor(RATE, min_dim_size_to_factor=4),
        ),
        (
            {"name": "adafactor", "beta1": 0.7, "clipping_threshold": 0.5, "scale_by_parameter": False},
            optax.adafactor(RATE, momentum=0.7, clipping_threshold=0.5, multiply_by_parameter_scale=False),
        ),
    ],
)
def test_where_nothing_grew_an_optimizer_is_that_of_optax(config, theirs, count):
    with jax.enable_x64(True):
        start, gradients = draw((6, 4), 1)[0], draw((6, 4), count, 1)
        ours = updates(OptimizerConfig(weight_decay=0, **config), MATRIX, {"w": start}, gradients)
        wanted = start
        state = theirs.init(wanted)
        for gradient in gradients:
            change, state = theirs.update(gradient, state, wanted)
            wanted = optax.apply_updates(wanted, change)
    # From the second update on 1 - t^-0.8 is no whole number, and optax takes it in float32, whatever the weights are.
    np.testing.assert_allclose(
        ours, np.asarray(wanted), rtol=0, atol=1e-14 if config["name"] == "sgd" or count == 1 else 1e-8
    )


def test_weight_decay_is_a_share_of_the_weights_whatever_the_optimizer():
    for name in ("adamw", "sgd", "adafactor"):
        config = OptimizerConfig(name=name, weight_decay=0.5)
        after = updates(config, MATRIX, {"w": jnp.full((6, 4), 2.0)}, [jnp.zeros((6, 4))])
        np.testing.assert_allclose(after, 2.0 * (1 - RATE * 0.5), rtol=1e-6, err_msg=name)


def test_adafactor_takes_each_layer_as_a_parameter_of_its_own():
    config = OptimizerConfig(name="adafactor", min_dim_size_to_factor=4)
    start, gradients = draw((3, 4, 6), 1)[0] * jnp.array([1.0, 10, 0.1]).reshape(3, 1, 1), draw((3, 4, 6), 3, 1)
    stacked = updates(config, STACK, {"w": start}, gradients)
    layer = {"w": STACK["w"].restrict(("mlp", "embed"))}
    for index in range(3):
        alone = updates(config, layer, {"w": start[index]}, [gradient[index] for gradient in gradients])
        np.testing.assert_allclose(stacked[index], alone, rtol=1e-5)


def test_what_is_factored_follows_from_the_declaration():
    specs = declare_parameters(tiny().model)
    factored = {name: factored_axes(spec, 64) for name, spec in specs.items()}
    assert factored["token_embedding"] == (("embed",), ("vocab",))
    assert factored["encoder.layers.mlp.wo"] == (("embed",), ("encoder.mlp",))
    assert factored["decoder.layers.self_attention.query"] == (("embed",), ("decoder.self.heads", "decoder.self.qk"))
    assert {name for name, axes in factored.items() if axes is None} == {
        name for name in specs if name.endswith(("norm", "relative_bias"))
    }
    assert not any(factored_axes(spec, 65) for spec in specs.values())  # d_model is 64
    moments = declare_moments(OptimizerConfig(name="adafactor", min_dim_size_to_factor=64), specs)
    assert moments["first_moment"] == {}
    assert moments["row_moment"]["encoder.layers.mlp.wo"].spec.axes == ("encoder.layers", "embed")
    assert moments["column_moment"]["encoder.layers.mlp.wo"].spec.shape == (2, 128)
    size = sum(np.prod(moment.spec.shape) for group in moments.values() for moment in group.values())
    assert size < 0.02 * sum(np.prod(spec.shape) for spec in specs.values())


def created_last(multipliers, axis, number):
    """The record after growth has created the last entries of an axis, in update 0."""
    record = multipliers[axis]
    new = np.arange(len(record.born)) >= len(record.born) - number
    return multipliers | {
        axis: record._replace(inherited=jnp.asarray(~new, float), born=jnp.asarray(np.where(new, 0, -1), jnp.int32))
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_old_entries_move_as_if_no_entry_had_been_created(name):
    config = OptimizerConfig(name=name, min_dim_size_to_factor=3)
    old, (start, *gradients) = {"w": MATRIX["w"].restrict(("embed", "mlp"))}, draw((6, 4), 4)
    old["w"] = dataclasses.replace(old["w"], shape=(5, 3))
    multipliers = created_last(created_last(init_multipliers(MATRIX), "embed", 1), "mlp", 1)
    gradients[1] = gradients[1].at[5].multiply(1e4)  # clipping of what is new leaves the old alone
    start = start.at[5].set(0).at[:, 3].set(0)
    grown = updates(config, MATRIX, {"w": start}, gradients, multipliers)
    alone = updates(config, old, {"w": start[:5, :3]}, [gradient[:5, :3] for gradient in gradients])
    np.testing.assert_allclose(grown[:5, :3], alone, rtol=1e-5)


def test_created_entries_take_the_scale_of_the_old_ones_and_a_clipping_of_their_own():
    config = OptimizerConfig(name="adafactor", weight_decay=0)
    multipliers = created_last(init_multipliers(STACK), "mlp", 1)
    start = jnp.ones((3, 4, 6)).at[:, 3].set(0) * jnp.array([2.0, 5, 1]).reshape(3, 1, 1)
    after = updates(config, STACK, {"w": start}, [jnp.ones((3, 4, 6))], multipliers)
    scale = np.array([2.0, 5, 1]).reshape(3, 1, 1)
    np.testing.assert_allclose(start - after, np.broadcast_to(RATE * scale, (3, 4, 6)), rtol=1e-5)


def test_a_created_layer_of_zeros_takes_the_scale_of_the_inherited_ones():
    config = OptimizerConfig(name="adafactor", weight_decay=0)
    multipliers = created_last(init_multipliers(STACK), "layers", 1)
    start = jnp.ones((3, 4, 6)) * jnp.array([1.0, 7, 0]).reshape(3, 1, 1)
    moved = start - updates(config, STACK, {"w": start}, [jnp.ones((3, 4, 6))], multipliers)
    np.testing.assert_allclose(moved[:, 0, 0], RATE * np.array([1, 7, 5]), rtol=1e-5)  # 5 is the RMS of 1 and 7
    larger = start.at[2].set(9)
    moved = larger - updates(config, STACK, {"w": larger}, [jnp.ones((3, 4, 6))], multipliers)
    np.testing.assert_allclose(moved[2], RATE * 9, rtol=1e-5)


def test_moments_of_frozen_rows_and_columns_stay():
    config, factor = OptimizerConfig(name="adafactor", min_dim_size_to_factor=4), np.ones((1, 4), np.float32)
    factor[0, 1] = 0
    start, gradient = draw((6, 4), 2)
    parameters = {"w": start}
    before = init_moments(config, MATRIX, parameters)
    after, moments = apply_optimizer(
        config, MATRIX, init_multipliers(MATRIX), parameters, {"w": gradient}, before, jnp.int32(0), jnp.asarray(RATE),
        {"w": factor},
    )  # fmt: skip
    np.testing.assert_array_equal(after["w"][:, 1], start[:, 1])
    np.testing.assert_array_equal(moments.column_moment["w"] == 0, [False, True, False, False])
    assert (moments.row_moment["w"] > 0).all()


def test_what_growth_added_warms_up_again_and_nothing_else():
    config = OptimizerConfig(rewarm_steps=4, rewarm_peak=1.5)
    record = AxisMultiplier(*(jnp.ones(4) for _ in range(4)), born=jnp.array([-1, 10, 12, -1]))
    rows = AxisMultiplier(*(jnp.ones(6) for _ in range(4)), born=jnp.array([-1, -1, -1, -1, -1, 11]))
    factors = {
        step: rewarm_factor(config, MATRIX["w"], {"embed": rows, "mlp": record}, jnp.int32(step)) for step in (12, 40)
    }
    np.testing.assert_allclose(factors[12][0], [1, 1.5 * 3 / 4, 1.5 * 1 / 4, 1])
    np.testing.assert_allclose(
        factors[12][5], [1.5 * 2 / 4, 1.5 * 2 / 4, 1.5 * 1 / 4, 1.5 * 2 / 4]
    )  # the latest counts
    np.testing.assert_allclose(factors[40][:5], np.broadcast_to([1, 1.5, 1.5, 1], (5, 4)))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_an_update_takes_the_rewarmed_rate(name):
    start, gradient = draw((6, 4), 2)
    multipliers = created_last(init_multipliers(MATRIX), "mlp", 1)
    plain, rewarmed = (
        start - updates(OptimizerConfig(name=name, rewarm_steps=steps), MATRIX, {"w": start}, [gradient], multipliers)
        for steps in (0, 10)
    )
    np.testing.assert_array_equal(rewarmed[:, :3], plain[:, :3])
    np.testing.assert_allclose(rewarmed[:, 3], 0.13 * plain[:, 3], rtol=1e-4)


def test_a_shifted_schedule_is_that_of_other_updates():
    config = OptimizerConfig(warmup_steps=10, schedule="cosine")
    plain = make_schedule(config, 100)
    later, earlier = (make_schedule(dataclasses.replace(config, schedule_shift=shift), 100) for shift in (20, -30))
    assert float(later(jnp.int32(25))) == float(plain(jnp.int32(45)))
    assert float(earlier(jnp.int32(60))) == float(plain(jnp.int32(30)))
    assert float(earlier(jnp.int32(5))) == float(plain(jnp.int32(0)))


def test_momentum_is_each_optimizers_own_unless_it_is_set():
    assert [OptimizerConfig(name=name).momentum for name in ("adamw", "sgd", "adafactor")] == [0.9, 0.9, 0.0]
    assert OptimizerConfig(name="adafactor", beta1=0.5).momentum == 0.5
    config = OptimizerConfig(name="adafactor", rewarm_steps=3, schedule_shift=-2)
    assert OptimizerConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optimizer.name='adam' must be one of adamw, sgd, adafactor"),
        ({"beta1": 1.0}, r"optimizer.beta1=1.0 must lie in \[0, 1\)"),
        ({"rewarm_steps": -1}, "rewarm_steps=-1 must not be negative"),
        ({"rewarm_peak": 0.0}, "rewarm_peak=0.0 must be positive"),
        ({"clipping_threshold": 0.0}, "clipping_threshold=0.0 must be positive"),
        ({"min_dim_size_to_factor": 0}, "min_dim_size_to_factor=0 must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**fields)
