"""Laws of the optimizers: theirs where nothing grew, deaf to created entries where something did, rates as recorded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5pegasus.axes import AxisMultiplier, ParamSpec, factored_axes, orthogonalised_axes
from t5pegasus.config import MeshConfig, OptimizerConfig
from t5pegasus.config.optimizer import NAMES
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.presets import tiny
from t5pegasus.sharding import make_mesh, param_shardings
from t5pegasus.train.groups import learning_rate_factors
from t5pegasus.train.optimizer import (
    apply_optimizer,
    declare_moments,
    init_moments,
    init_multipliers,
    make_schedule,
    rewarm_factor,
)
from t5pegasus.train.optimizer.rounding import round_stochastically

RATE = 0.03
MATRIX = {"w": ParamSpec(("embed", "mlp"), ("embed",), gain=False, shape=(6, 4))}
STACK = {"w": ParamSpec(("layers", "mlp", "embed"), ("mlp",), gain=False, shape=(3, 4, 6))}


def updates(config, specs, parameters, gradients, multipliers=None, step=0):
    """Parameters after updates by these gradients, in a row."""
    multipliers = multipliers or init_multipliers(specs)

    def update_all(parameters, gradients, multipliers):
        def update(carry, gradient):
            count, *before = carry
            after = apply_optimizer(
                config, specs, multipliers, before[0], {"w": gradient}, before[1], count, jnp.asarray(RATE)
            )
            return (count + 1, *after), None

        start = jnp.int32(step), parameters, init_moments(config, specs, parameters)
        return jax.lax.scan(update, start, gradients)[0][1]["w"]

    compiled = jax.jit(update_all, compiler_options={"xla_backend_optimization_level": 0})
    return compiled(parameters, jnp.stack(gradients), multipliers)


def draw(shape, count, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(scale * random.normal(size=shape)) for scale in np.geomspace(0.1, 3, count)]


@pytest.mark.parametrize("count", [1, 6])
@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ({"name": "adamw", "beta2": 0.95, "epsilon": 1e-3}, optax.adam(RATE, b2=0.95, eps=1e-3)),
        ({"name": "lion"}, optax.lion(RATE, b1=0.95, b2=0.98, weight_decay=0)),
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
        ours, np.asarray(wanted), rtol=0, atol=1e-8 if config["name"] == "adafactor" and count > 1 else 1e-14
    )


def test_scaled_adamw_is_adamw_times_the_root_mean_square_of_the_weights():
    config = OptimizerConfig(name="adamw-scaled", beta2=0.95, epsilon=1e-3, weight_decay=0.1)
    for size in (2.0, 1e-5):  # the scale is 1e-3 at least
        with jax.enable_x64(True):
            start, gradients = size * draw((6, 4), 1)[0], draw((6, 4), 5, 1)
            ours = updates(config, MATRIX, {"w": start}, gradients)
        wanted, m, v = np.asarray(start), 0, 0
        for count, gradient in enumerate(map(np.asarray, gradients), 1):
            m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
            direction = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.95**count)) + 1e-3)
            scale = max(1e-3, np.linalg.norm(wanted) / np.sqrt(wanted.size))
            wanted = wanted - RATE * (scale * direction + 0.1 * wanted)
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)


def newton_schulz(matrix):
    """By its singular values: five times the published polynomial of each, from their share of the norm."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 9, 6)])
def test_muon_makes_the_momentum_of_each_layers_matrix_orthogonal(shape):
    specs = {"w": dataclasses.replace(STACK["w"], shape=shape)}
    with jax.enable_x64(True):
        start, gradients = draw(shape, 1)[0], draw(shape, 4, 1)
        ours = updates(OptimizerConfig(name="muon", muon_momentum=0.9), specs, {"w": start}, gradients)
    wanted, m = np.array(start), np.zeros(shape)
    for gradient in map(np.asarray, gradients):
        m = 0.9 * m + 0.1 * gradient
        for layer in range(3):
            direction = 0.2 * max(shape[1:]) ** 0.5 * newton_schulz(0.9 * m[layer] + 0.1 * gradient[layer])
            wanted[layer] -= RATE * (direction + 0.01 * wanted[layer])
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-13)


def test_muon_takes_heads_jointly_and_leaves_what_is_no_layers_matrix_to_adamw():
    specs, config = declare_parameters(tiny().model), OptimizerConfig(name="muon", muon_adamw_rate=0.3)
    matrices = {name: orthogonalised_axes(spec) for name, spec in specs.items()}
    assert matrices["decoder.layers.self_attention.query"] == (("embed",), ("decoder.self.heads", "decoder.self.qk"))
    assert matrices["encoder.layers.mlp.wo"] == (("embed",), ("encoder.mlp",))
    others = {name for name, axes in matrices.items() if axes is None}
    assert others == {name for name in specs if name.endswith(("norm", "relative_bias"))} | {
        "token_embedding", "lm_head",
    }  # fmt: skip
    moments = declare_moments(config, specs)
    assert moments["first_moment"].keys() == specs.keys()
    assert moments["second_moment"].keys() == others
    factors = learning_rate_factors(config, specs)
    assert factors.keys() == others
    assert all((factor == np.float32(0.3)).all() for factor in factors.values())
    heads = {"w": ParamSpec(("embed", "heads", "qk"), ("embed",), gain=False, shape=(6, 2, 3))}
    joint = {"w": ParamSpec(("embed", "mlp"), ("embed",), gain=False, shape=(6, 6))}
    with jax.enable_x64(True):
        start, gradient = draw((6, 6), 2)
        apart = updates(config, heads, {"w": start.reshape(6, 2, 3)}, [gradient.reshape(6, 2, 3)])
        together = updates(config, joint, {"w": start}, [gradient])
    np.testing.assert_allclose(apart.reshape(6, 6), together, rtol=1e-12)


def test_an_update_of_muon_is_of_the_size_of_adamws():
    for shape in ((64, 48), (16, 128)):
        specs = {"w": dataclasses.replace(MATRIX["w"], shape=shape)}
        moved = updates(
            OptimizerConfig(name="muon", weight_decay=0), specs, {"w": jnp.zeros(shape)}, [draw(shape, 1)[0]]
        )
        assert 0.15 * RATE < float(jnp.sqrt(jnp.mean(moved**2))) < 0.25 * RATE


@pytest.mark.parametrize(
    ("sizes", "collectives"),
    [
        ((1, 4, 2), {"all-to-all"}),
        ((2, 2, 2), {"all-to-all", "all-gather"}),  # which replicas along `data` have shared out among them
        ((8, 1, 1), set()),  # as many zeros would be gathered as there are replicas more than layers
    ],
)
def test_on_a_mesh_muon_moves_whole_layers_between_devices_and_gathers_no_matrix(sizes, collectives):
    specs = {
        "wi": ParamSpec(("layers", "embed", "mlp"), ("embed",), gain=False, shape=(3, 8, 12)),
        "out": ParamSpec(("layers", "heads", "vo", "embed"), ("heads", "vo"), gain=False, shape=(3, 4, 3, 8)),
    }
    config, mesh = OptimizerConfig(name="muon"), make_mesh(MeshConfig(*sizes))

    def update(parameters, gradients):
        before = init_moments(config, specs, parameters), jnp.int32(0), jnp.asarray(RATE)
        return apply_optimizer(config, specs, init_multipliers(specs), parameters, gradients, *before)[0]

    with jax.enable_x64(True):
        parameters, gradients = (
            {name: draw(spec.shape, 1, seed + index)[0] for index, (name, spec) in enumerate(specs.items())}
            for seed in (0, 10)
        )
        shardings = param_shardings(specs, mesh)
        options = {"xla_backend_optimization_level": 0}
        with jax.set_mesh(mesh):
            jitted = jax.jit(update, in_shardings=(shardings,) * 2, out_shardings=shardings, compiler_options=options)
            program = jitted.lower(parameters, gradients).compile()
            got = program(*jax.device_put((parameters, gradients), (shardings,) * 2))
        wanted = jax.jit(update, compiler_options=options)(parameters, gradients)
        for name in specs:
            np.testing.assert_allclose(got[name], wanted[name], rtol=0, atol=1e-13)
    text = program.as_text()
    assert {kind for kind in ("all-to-all", "all-gather", "all-reduce") if kind in text} == collectives


def test_weight_decay_is_a_share_of_the_weights_whatever_the_optimizer():
    for name in NAMES:
        config = OptimizerConfig(name=name, weight_decay=0.5)
        after = updates(config, MATRIX, {"w": jnp.full((6, 4), 2.0)}, [jnp.zeros((6, 4))])
        np.testing.assert_allclose(after, 2.0 * (1 - RATE * 0.5), rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_a_parameter_of_its_own(name):
    config = OptimizerConfig(name=name, min_dim_size_to_factor=4)
    with jax.enable_x64(True):
        start, gradients = draw((3, 4, 6), 1)[0] * jnp.array([1.0, 10, 0.1]).reshape(3, 1, 1), draw((3, 4, 6), 3, 1)
        stacked = updates(config, STACK, {"w": start}, gradients)
        layer = {"w": STACK["w"].restrict(("mlp", "embed"))}
        for index in range(3):
            alone = updates(config, layer, {"w": start[index]}, [gradient[index] for gradient in gradients])
            np.testing.assert_allclose(stacked[index], alone, rtol=1e-12)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon"])
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


def test_with_muon_created_rows_and_columns_disturb_the_old_ones_and_created_layers_do_not():
    config, start, gradients = OptimizerConfig(name="muon"), draw((3, 4, 6), 1)[0], draw((3, 4, 6), 3, 1)
    deeper = created_last(init_multipliers(STACK), "layers", 1)
    old = {"w": dataclasses.replace(STACK["w"], shape=(2, 4, 6))}
    grown = updates(config, STACK, {"w": start}, gradients, deeper)
    alone = updates(config, old, {"w": start[:2]}, [gradient[:2] for gradient in gradients])
    np.testing.assert_allclose(grown[:2], alone, rtol=1e-5)
    wider = created_last(init_multipliers(STACK), "mlp", 1)
    old = {"w": dataclasses.replace(STACK["w"], shape=(3, 3, 6))}
    grown = updates(config, STACK, {"w": start}, gradients, wider)
    alone = updates(config, old, {"w": start[:, :3]}, [gradient[:, :3] for gradient in gradients])
    assert float(jnp.max(jnp.abs(grown[:, :3] - alone))) > 0.1 * RATE


@pytest.mark.parametrize("name", ["adafactor", "adamw-scaled"])
def test_created_entries_take_the_scale_of_the_old_ones_and_a_clipping_of_their_own(name):
    config = OptimizerConfig(name=name, weight_decay=0)
    multipliers = created_last(init_multipliers(STACK), "mlp", 1)
    start = jnp.ones((3, 4, 6)).at[:, 3].set(0) * jnp.array([2.0, 5, 1]).reshape(3, 1, 1)
    after = updates(config, STACK, {"w": start}, [jnp.ones((3, 4, 6))], multipliers)
    scale = np.array([2.0, 5, 1]).reshape(3, 1, 1)
    np.testing.assert_allclose(start - after, np.broadcast_to(RATE * scale, (3, 4, 6)), rtol=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "adamw-scaled"])
def test_a_created_layer_of_zeros_takes_the_scale_of_the_inherited_ones(name):
    config = OptimizerConfig(name=name, weight_decay=0)
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


def test_moments_in_bfloat16_are_the_exact_ones_on_average_and_one_of_their_neighbours_always():
    values = jnp.concatenate([draw((500,), 1)[0].astype(jnp.float32), jnp.array([0, 1.5, jnp.inf, -jnp.inf, jnp.nan])])
    drawn = jax.jit(jax.vmap(lambda step: round_stochastically(values, 7, step)))(jnp.arange(4000)).astype(float)
    np.testing.assert_array_equal(drawn[:, -5:], np.broadcast_to(values[-5:], (4000, 5)))  # what needs no rounding
    values, drawn = np.asarray(values[:-5], np.float64), np.asarray(drawn[:, :-5], np.float64)
    gap = np.abs(values) * 2.0**-7
    assert np.all(np.abs(drawn - values) < gap)
    assert np.all([len(set(column)) == 2 for column in drawn.T])
    assert np.max(np.abs(drawn.mean(0) - values) / gap) < 5 * 0.5 / 4000**0.5  # five standard errors
    other = round_stochastically(jnp.asarray(values), 8, 0)
    assert 0.1 < np.mean(np.asarray(other, np.float64) != drawn[0]) < 0.6


@pytest.mark.parametrize("name", NAMES)
def test_with_moments_in_bfloat16_an_optimizer_goes_nearly_the_same_way(name):
    config = OptimizerConfig(name=name, min_dim_size_to_factor=100, beta1=0.9, beta2=0.999)
    start, gradients = draw((6, 4), 1)[0], draw((6, 4), 30, 1)
    exact = updates(config, MATRIX, {"w": start}, gradients)
    narrow = dataclasses.replace(config, moment_dtype="bfloat16")
    kept = init_moments(narrow, MATRIX, {"w": start})
    assert {array.dtype for group in kept for array in group.values()} == {jnp.dtype(jnp.bfloat16)}
    got = updates(narrow, MATRIX, {"w": start}, gradients)
    assert float(jnp.linalg.norm(got - exact)) < 0.1 * float(jnp.linalg.norm(exact - start))
    assert name == "lion" or (got != exact).all()  # the signs are the same


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


@pytest.mark.parametrize("name", NAMES)
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
    assert {name: OptimizerConfig(name=name).momentum for name in NAMES} == {
        "adamw": 0.9, "adamw-scaled": 0.9, "adafactor": 0.0, "muon": 0.9, "sgd": 0.9, "lion": 0.95,
    }  # fmt: skip
    assert OptimizerConfig(name="adafactor", beta1=0.5).momentum == 0.5
    config = OptimizerConfig(name="adafactor", rewarm_steps=3, schedule_shift=-2)
    assert OptimizerConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adam"}, "optimizer.name='adam' must be one of adamw, adamw-scaled, adafactor, muon, sgd, lion"),
        ({"muon_momentum": 1.0}, r"optimizer.muon_momentum=1.0 must lie in \[0, 1\)"),
        ({"muon_adamw_rate": 0.0}, "optimizer.muon_adamw_rate=0.0 must be positive"),
        ({"beta1": 1.0}, r"optimizer.beta1=1.0 must lie in \[0, 1\)"),
        ({"moment_dtype": "float16"}, "optimizer.moment_dtype='float16' must be one of float32, bfloat16"),
        ({"rewarm_steps": -1}, "rewarm_steps=-1 must not be negative"),
        ({"rewarm_peak": 0.0}, "rewarm_peak=0.0 must be positive"),
        ({"clipping_threshold": 0.0}, "clipping_threshold=0.0 must be positive"),
        ({"min_dim_size_to_factor": 0}, "min_dim_size_to_factor=0 must be at least 1"),
    ],
)
def test_settings_outside_their_range_are_named(fields, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**fields)
