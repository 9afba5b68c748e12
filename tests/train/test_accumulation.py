"""Laws of accumulation hidden in moments: it is what its article defines, and keeps no sum of gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import MeshConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import make_mesh
from t5pegasus.train.accumulation import pure_update
from t5pegasus.train.estimate import abstract_batch, abstract_state
from t5pegasus.train.optimizer import (
    accumulate_gradients,
    apply_accumulated,
    apply_optimizer,
    init_moments,
    init_multipliers,
)
from t5pegasus.train.state import start_state

RATE, NUM_MICRO = 0.03, 3
SPECS = {"w": ParamSpec(("embed", "mlp"), ("embed",), gain=False, shape=(6, 4))}
QUICK = {"xla_backend_optimization_level": 0}
HIDDEN = {
    "adamw": OptimizerConfig(accumulate_in_moments=True, beta2=0.95, weight_decay=0.1),
    "adamw-scaled": OptimizerConfig(name="adamw-scaled", accumulate_in_moments=True, beta2=0.95, weight_decay=0.1),
    "sgd": OptimizerConfig(name="sgd", accumulate_in_moments=True, weight_decay=0.1),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def train_hidden(config, start, micro_gradients, factors=None):
    """Parameters after each update by [updates, micro-batches, …] gradients, and the last moments."""

    @jax.jit
    def update(parameters, moments, step, gradients):
        for micro in range(NUM_MICRO):
            moments = accumulate_gradients(
                config, {"w": gradients[micro]}, moments, step, jnp.int32(micro), NUM_MICRO, factors
            )
        rate = jnp.asarray(RATE)
        multipliers = init_multipliers(SPECS)
        return apply_accumulated(config, SPECS, multipliers, parameters, moments, step, rate, factors), moments

    parameters = {"w": jnp.asarray(start)}
    moments, seen = init_moments(config, SPECS, parameters), []
    for step, gradients in enumerate(micro_gradients):
        parameters, moments = update(parameters, moments, jnp.int32(step), jnp.asarray(gradients))
        seen.append(np.asarray(parameters["w"]))
    return seen, moments


def train_plainly(config, start, gradients):
    """The same by whole gradients."""

    @jax.jit
    def update(parameters, moments, step, gradient):
        before = init_multipliers(SPECS), parameters, {"w": gradient}, moments, step, jnp.asarray(RATE)
        return apply_optimizer(config, SPECS, *before)

    parameters = {"w": jnp.asarray(start)}
    moments, seen = init_moments(config, SPECS, parameters), []
    for step, gradient in enumerate(gradients):
        parameters, moments = update(parameters, moments, jnp.int32(step), jnp.asarray(gradient))
        seen.append(np.asarray(parameters["w"]))
    return seen


@pytest.mark.parametrize("name", HIDDEN)
def test_updates_are_those_of_the_articles_recurrence(name):
    """χ, α and t as there: t counts micro-batches from 1, m and v move in each, parameters in every k-th."""
    config, start, gradients = HIDDEN[name], draw(6, 4), draw(5, NUM_MICRO, 6, 4, seed=1)
    found, _ = train_hidden(config, start, gradients)
    theta, m, v, k = start, 0.0, 0.0, NUM_MICRO
    beta1, beta2 = 0.9, 0.95
    for t, gradient in enumerate(gradients.reshape(-1, 6, 4), 1):
        first, last = (t - 1) % k == 0, t % k == 0
        m = ((beta1 - 1) * first + 1) * m + (1.0 if name == "sgd" else 1 - beta1) / k * gradient
        v = ((beta2 - 1) * first + 1) * v + (1 - beta2) / k * gradient**2
        if last:
            updates = t // k
            direction = m / (1 - beta1**updates) / (np.sqrt(v / (1 - beta2**updates)) + config.epsilon)
            direction = m if name == "sgd" else direction
            scale = np.sqrt(np.mean(theta**2)) if name == "adamw-scaled" else 1.0
            theta = theta - RATE * (scale * direction + 0.1 * theta)
            np.testing.assert_allclose(found[updates - 1], theta, rtol=0, atol=1e-13)


def test_sgd_is_plain_accumulation_and_adamw_is_where_all_micro_batches_agree():
    start, gradients = draw(6, 4), draw(5, NUM_MICRO, 6, 4, seed=1)
    alike = np.repeat(gradients[:, :1], NUM_MICRO, axis=1)
    for name, each in (("sgd", gradients), ("adamw", alike), ("adamw-scaled", alike)):
        found, _ = train_hidden(HIDDEN[name], start, each)
        plain = train_plainly(dataclasses.replace(HIDDEN[name], accumulate_in_moments=False), start, each.mean(1))
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-13)


def test_adamws_second_moment_is_larger_by_the_variance_of_micro_batches():
    start, gradients = draw(6, 4), draw(1, NUM_MICRO, 6, 4, seed=1)
    _, moments = train_hidden(HIDDEN["adamw"], start, gradients)
    squared_mean, variance = gradients[0].mean(0) ** 2, gradients[0].var(0)
    np.testing.assert_allclose(moments.second_moment["w"], 0.05 * (squared_mean + variance), rtol=1e-12)
    np.testing.assert_allclose(moments.first_moment["w"], 0.1 * gradients[0].mean(0), rtol=1e-12)


def test_frozen_entries_keep_values_and_moments():
    factors = {"w": np.array([[1, 0, 1, 1]], np.float32)}
    gradients = draw(3, NUM_MICRO, 6, 4, seed=1) * factors["w"]
    start = draw(6, 4)
    found, moments = train_hidden(HIDDEN["adamw"], start, gradients, factors)
    np.testing.assert_array_equal(found[-1][:, 1], start[:, 1])
    assert (found[-1][:, 0] != start[:, 0]).all()
    np.testing.assert_array_equal(moments.first_moment["w"][:, 1], 0)


MODEL = ModelConfig(
    vocab_size=41, d_model=8, d_kv=4, d_ff=10, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip


def draw_batch(rows=4, source=9, target=6):
    random = np.random.default_rng(0)
    inputs = random.integers(3, 41, (rows, source), np.int32)
    targets = random.integers(3, 41, (rows, target), np.int32)
    weights = (np.arange(target) < np.array([[6], [3], [5], [2]])).astype(np.float32)
    return Batch(
        encoder_input_tokens=inputs,
        encoder_segment_ids=np.ones_like(inputs),
        encoder_positions=np.tile(np.arange(source, dtype=np.int32), (rows, 1)),
        decoder_input_tokens=np.concatenate([np.ones((rows, 1), np.int32), targets[:, :-1]], axis=1),
        decoder_target_tokens=targets,
        decoder_loss_weights=weights,
        decoder_segment_ids=np.ones_like(targets),
        decoder_positions=np.tile(np.arange(target, dtype=np.int32), (rows, 1)),
        row_ids=np.arange(rows, dtype=np.uint32),
    )


def update_once(num_micro, **optimizer):
    settings = {"name": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e3, "weight_decay": 0.0} | optimizer
    config = RunConfig(
        model=MODEL,
        optimizer=OptimizerConfig(**settings),
        train=TrainConfig(batch_size=4, accumulation_steps=num_micro, seed=1),
    )
    specs = declare_parameters(MODEL)
    parameters = {
        name: jnp.asarray(spec.init_std * draw(*spec.shape, seed=seed))
        for seed, (name, spec) in enumerate(specs.items())
    }
    update = jax.jit(pure_update(config, specs, jnp.float64), compiler_options=QUICK)
    return update(start_state(parameters, specs, config.optimizer), draw_batch(), jnp.asarray(0.1))


@pytest.fixture(scope="module")
def plain():
    with jax.enable_x64(True):
        return update_once(2)


def test_micro_batches_weigh_by_their_target_tokens(plain):
    """The first has 11 of 16, the second 5: their sum is the gradient of the batch all the same."""
    hidden = update_once(2, accumulate_in_moments=True)
    for name, wanted in plain.parameters.items():
        np.testing.assert_allclose(hidden.parameters[name], wanted, rtol=0, atol=1e-13, err_msg=name)
    for ours, wanted in zip(jax.tree.leaves(hidden.sums), jax.tree.leaves(plain.sums)):
        np.testing.assert_allclose(ours, wanted, rtol=1e-12)
    assert float(hidden.norm) > float(plain.norm)  # noise of the micro-batches is in their norms


@pytest.mark.slow
def test_one_micro_batch_is_the_batch(plain):
    hidden = update_once(1, accumulate_in_moments=True)
    np.testing.assert_allclose(hidden.norm, plain.norm, rtol=1e-12)
    np.testing.assert_allclose(hidden.norms, plain.norms, rtol=1e-6)
    for name, wanted in plain.parameters.items():
        np.testing.assert_allclose(hidden.parameters[name], wanted, rtol=0, atol=1e-13, err_msg=name)


@pytest.mark.slow
def test_each_micro_batch_is_clipped_by_itself(plain):
    limit = 1e-3 * float(plain.norm)
    hidden = update_once(2, accumulate_in_moments=True, max_grad_norm=limit)
    moved = float(jnp.sqrt(sum(jnp.sum(jnp.square(each)) for each in hidden.moments.first_moment.values())))
    assert 0.3 * limit < moved <= limit * (1 + 1e-6)


def test_no_sum_of_gradients_is_carried_from_micro_batch_to_micro_batch():
    """The outer scan carries moments and nothing else of the parameters' shapes."""
    config = RunConfig(model=MODEL, train=TrainConfig(batch_size=4, accumulation_steps=2))
    data = dataclasses.replace(config.data, max_source_tokens=8, max_target_tokens=4)
    config = dataclasses.replace(config, data=data, optimizer=OptimizerConfig(accumulate_in_moments=True))
    specs, mesh = declare_parameters(MODEL), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    with jax.enable_x64(False):
        program = jax.make_jaxpr(pure_update(config, specs, jnp.float32))(state, batch, rate)
    scans = [equation for equation in program.eqns if equation.primitive.name == "scan"]
    (outer,) = [each for each in scans if each.params["length"] == 2 and each.params["num_carry"] > 1]
    first = outer.params["num_consts"]
    carried = [variable.aval.shape for variable in outer.invars[first : first + outer.params["num_carry"]]]
    assert sorted(carried) == sorted(leaf.shape for leaf in jax.tree.leaves(state.moments))


@pytest.mark.parametrize(
    "settings", [{"name": "lion"}, {"name": "muon"}, {"name": "adafactor", "beta1": 0.9}, {"beta1": 0.0}]
)
def test_optimizers_that_need_more_than_moments_are_refused(settings):
    with pytest.raises(UsageError, match=r"accumulate_in_moments with name=.*, beta1=.*choose one of them"):
        OptimizerConfig(accumulate_in_moments=True, **settings)


def test_an_update_cannot_be_skipped_whose_moments_are_gone():
    with pytest.raises(UsageError, match=r"on_divergence=skip with optimizer.accumulate_in_moments.*abort or rollback"):
        RunConfig(optimizer=HIDDEN["adamw"], train=TrainConfig(on_divergence="skip"))
