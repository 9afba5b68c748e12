"""Laws of one update: meshes agree, micro-batches add up, AdamW is AdamW, schedules have their shape."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t5pegasus.config import MeshConfig, OptimizerConfig
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.errors import UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import make_mesh, place_batch
from t5pegasus.train.optimizer import apply_optimizer, init_moments, init_multipliers, make_schedule
from t5pegasus.train.state import evaluated_parameters, init_state
from t5pegasus.train.step import make_train_step


@pytest.fixture(scope="module")
def batches(examples_path, run_config):
    with (
        PackedRows(examples_path, run_config.data, 0, 101) as rows,
        contextlib.closing(load_batches(rows, 8, start_row=0)) as stream,
    ):
        return [next(stream), next(stream)]


def two_updates(config, batches, sizes):
    """Losses and parameters (their average, if it is kept) after two updates on a mesh of these sizes."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    state = init_state(config.model, 0, mesh, config.optimizer, with_ema=config.train.ema_decay > 0)
    train_step = make_train_step(config, mesh)
    losses = []
    for batch in batches:
        state, metrics = train_step(state, place_batch(batch, np.arange(8), 8, mesh))
        losses.append(float(metrics["loss"]))
    assert all(array.sharding.is_fully_replicated for array in jax.tree.leaves(metrics))
    return losses, {name: np.asarray(value) for name, value in evaluated_parameters(state).items()}


@pytest.fixture(scope="module")
def on_one_device(run_config, batches):
    return two_updates(run_config, batches, (1, 1, 1))


@pytest.mark.parametrize(
    "sizes",
    [(1, 8, 1), (2, 2, 2), *(pytest.param(sizes, marks=pytest.mark.slow) for sizes in [(8, 1, 1), (1, 1, 8)])],
)
def test_every_mesh_gives_the_update_of_one_device(run_config, batches, on_one_device, sizes):
    losses, parameters = two_updates(run_config, batches, sizes)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=2e-6)
    for name, wanted in on_one_device[1].items():
        # Two updates of at most lr = 3e-3 each; a gradient near 0 may turn sign under rounding, hence not tighter.
        np.testing.assert_allclose(parameters[name], wanted, rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_micro_batches_give_the_update_of_one_batch(run_config, batches, on_one_device, count):
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, accumulation_steps=count))
    losses, parameters = two_updates(config, batches, (1, 1, 1))
    np.testing.assert_allclose(losses, on_one_device[0], rtol=2e-6)
    for name, wanted in on_one_device[1].items():
        np.testing.assert_allclose(parameters[name], wanted, rtol=0, atol=5e-6, err_msg=name)


@pytest.fixture(scope="module")
def with_every_option(run_config):
    optimizer = dataclasses.replace(
        run_config.optimizer, layer_decay=0.8, rate_factors=("decoder.*=0.5",), freeze=("encoder.layers[:1]", "lm_head")
    )
    train = dataclasses.replace(
        run_config.train, label_smoothing=0.1, decoder_noise_rate=0.4, decoder_noise_examples=0.7, ema_decay=0.5
    )
    return dataclasses.replace(run_config, optimizer=optimizer, train=train)


@pytest.mark.slow
def test_with_every_option_meshes_and_micro_batches_give_the_same_update_too(with_every_option, batches):
    config = dataclasses.replace(
        with_every_option, train=dataclasses.replace(with_every_option.train, accumulation_steps=2)
    )
    (losses, parameters), (wanted_losses, wanted) = (
        two_updates(config, batches, (2, 2, 2)), two_updates(with_every_option, batches, (1, 1, 1))
    )  # fmt: skip
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-6)
    for name, array in wanted.items():
        np.testing.assert_allclose(parameters[name], array, rtol=0, atol=5e-6, err_msg=name)


@pytest.mark.slow
def test_meshes_agree_on_adafactor_whose_moments_are_means_over_split_axes(run_config, batches):
    optimizer = dataclasses.replace(run_config.optimizer, name="adafactor", min_dim_size_to_factor=64)
    config = dataclasses.replace(run_config, optimizer=optimizer)
    (losses, parameters), (wanted_losses, wanted) = (
        two_updates(config, batches, sizes) for sizes in ((2, 2, 2), (1, 1, 1))
    )
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-6)
    for name, array in wanted.items():
        np.testing.assert_allclose(parameters[name], array, rtol=0, atol=5e-6, err_msg=name)


def test_a_batch_that_does_not_divide_is_named(run_config):
    config = dataclasses.replace(run_config, train=dataclasses.replace(run_config.train, batch_size=6))
    with pytest.raises(UsageError, match=r"batch_size=6 is not a multiple .* data×fsdp=8 .*nearest: 8"):
        make_train_step(config, make_mesh(MeshConfig()))


def test_every_seed_that_a_config_admits_makes_a_state(run_config):
    seeds = (0, 2**32 - 1)
    heads = [init_state(run_config.model, seed, make_mesh(MeshConfig())).parameters["lm_head"] for seed in seeds]
    assert len({float(head[0, 0]) for head in heads}) == len(seeds)


def test_adamw_is_optax_adamw_where_nothing_grew(run_config):
    specs = declare_parameters(run_config.model)
    config = OptimizerConfig(beta1=0.8, beta2=0.95, epsilon=1e-5, weight_decay=0.1)
    rng = np.random.default_rng(0)
    parameters = {name: jnp.asarray(rng.normal(size=spec.shape), jnp.float32) for name, spec in specs.items()}
    oracle = optax.adamw(
        2e-3, b1=0.8, b2=0.95, eps=1e-5, weight_decay=0.1, mask={name: spec.decays for name, spec in specs.items()}
    )
    theirs, oracle_state = parameters, oracle.init(parameters)
    moments, ours = init_moments(config, specs, parameters), parameters
    for step in range(3):
        gradients = {name: jnp.asarray(rng.normal(size=spec.shape), jnp.float32) for name, spec in specs.items()}
        updates, oracle_state = oracle.update(gradients, oracle_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        ours, moments = apply_optimizer(
            config, specs, init_multipliers(specs), ours, gradients, moments, jnp.int32(step), jnp.float32(2e-3)
        )
    for name in parameters:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"schedule": "constant"}, {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
        ({"schedule": "cosine"}, {0: 0.1, 9: 1.0, 54: 0.55, 99: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {0: 0.1, 9: 1.0, 79: 1.0, 89: 0.55, 99: 0.1}),
    ],
)
def test_schedules_have_their_shape(fields, wanted):
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=10, **fields), total_steps=100)
    assert {step: pytest.approx(float(schedule(jnp.int32(step))), abs=0.02) for step in wanted} == wanted
