"""Training after growth is the image of the source's training, whichever the optimizer: 25 updates in lockstep.

The model is small, and grown by hand: token embedding, two gated-free blocks with RMS norm, untied head.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.axes import AxisMultiplier, ParamSpec, dual_multipliers
from t5pegasus.config import OptimizerConfig
from t5pegasus.train.optimizer import (
    Moments,
    apply_optimizer,
    declare_moments,
    init_moments,
    init_multipliers,
    weighted_norm,
)

SIZES = {"embed": 6, "mlp": 5, "vocab": 8, "layers": 2}
OPTIMIZERS = {
    "adamw": OptimizerConfig(name="adamw", epsilon=1e-3, weight_decay=0.1),
    "adamw-scaled": OptimizerConfig(name="adamw-scaled", epsilon=1e-3, weight_decay=0.1),
    "muon": OptimizerConfig(name="muon", epsilon=1e-3, weight_decay=0.1),
    "sgd": OptimizerConfig(name="sgd", weight_decay=0.1),
    "lion": OptimizerConfig(name="lion", weight_decay=0.1),
    "adafactor": OptimizerConfig(name="adafactor", min_dim_size_to_factor=5, weight_decay=0.1),
    "adafactor, unscaled, with beta1, not factored": OptimizerConfig(
        name="adafactor", min_dim_size_to_factor=100, beta1=0.8, scale_by_parameter=False, clipping_threshold=0.5
    ),
}
RATES = {"adamw": 0.02, "adamw-scaled": 0.05, "muon": 0.02, "sgd": 0.5, "lion": 0.005, "adafactor": 0.05}
HALF, UNEVEN = np.array([0.5, 0.5]), np.array([0.7, 0.3])
MAPS = {
    "even": {"embed": [HALF] * 6, "mlp": [HALF] * 5},
    "uneven": {"embed": [UNEVEN] * 6, "mlp": [UNEVEN, HALF] * 2 + [UNEVEN]},
    "fractional": {"embed": [HALF] * 3 + [np.ones(1)] * 3, "mlp": [np.array([0.2, 0.3, 0.5])] + [np.ones(1)] * 4},
}
"""Per axis, for each entry the shares of its copies."""


def declare(sizes):
    def spec(*axes, contracted=(), gain=False):
        return ParamSpec(axes, contracted, gain, tuple(sizes[axis] for axis in axes))

    return {
        "embedding": spec("vocab", "embed"),
        "gain": spec("layers", "embed", gain=True),
        "wi": spec("layers", "embed", "mlp", contracted=("embed",)),
        "wo": spec("layers", "mlp", "embed", contracted=("mlp",)),
        "head": spec("embed", "vocab", contracted=("embed",)),
    }


def loss(parameters, tokens, targets):
    def norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-2)

    x = parameters["embedding"][tokens]
    for layer in range(SIZES["layers"]):
        y = norm(x) * parameters["gain"][layer][None]
        x = x + jax.nn.gelu(y @ parameters["wi"][layer]) @ parameters["wo"][layer]
    logits = norm(x) @ parameters["head"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1))


def batch(step):
    random = np.random.default_rng(step)
    return random.integers(0, 7, 16), random.integers(0, 8, 16)  # row 7 of the embedding has no gradient


def make_update(config, specs):
    """One jitted update with clipping, which a small norm makes sure of."""
    config = dataclasses.replace(config, max_grad_norm=0.05 if config.name == "sgd" else 0.2)
    rate = RATES[config.name]

    def update(parameters, moments, multipliers, step, tokens, targets):
        value, gradients = jax.value_and_grad(loss)(parameters, tokens, targets)
        clip = jnp.minimum(1.0, config.max_grad_norm / weighted_norm(gradients, specs, multipliers))
        gradients = {name: clip * gradient for name, gradient in gradients.items()}
        return value, *apply_optimizer(
            config, specs, multipliers, parameters, gradients, moments, step, rate / jnp.sqrt(step + 1.0)
        )

    return jax.jit(update, compiler_options={"xla_backend_optimization_level": 0})  # compiling is most of the time


def train(update, parameters, moments, multipliers, first_step, num_steps):
    losses = []
    for step in range(first_step, first_step + num_steps):
        value, parameters, moments = update(parameters, moments, multipliers, jnp.int32(step), *batch(step))
        losses.append(float(value))
    return parameters, moments, losses


def grow_axis(shares, *, stream):
    """(source of each entry, what growth multiplies along the axis) for entries with these shares of copies."""
    source = np.repeat(np.arange(len(shares)), [len(each) for each in shares])
    share = np.concatenate(shares)
    ratio = len(source) / len(shares) if stream else 1.0
    ones = np.ones(len(source))
    written, read = (np.sqrt(ratio * share), np.sqrt(share / ratio)) if stream else (ones, share)
    born = np.full(len(source), 3, np.int32)
    return source, AxisMultiplier(written, read, ratio * ones, ones, born)


def expand(array, spec, maps, scale):
    """Copies along each axis, multiplied by scale(s, r) of the growth along it."""
    array = np.asarray(array)
    for position, axis in enumerate(spec.axes):
        if axis in maps:
            source, record = maps[axis]
            along = [-1 if dimension == position else 1 for dimension in range(array.ndim)]
            array = np.take(array, source, position) * scale(*dual_multipliers(axis, spec, record)).reshape(along)
    return jnp.asarray(array)


def grow(config, parameters, moments, multipliers, maps):
    sizes = SIZES | {axis: len(multipliers[axis].written) for axis in multipliers}
    specs = declare(sizes)
    grown = {name: expand(array, specs[name], maps, lambda s, r: s) for name, array in parameters.items()}
    declared = declare_moments(config, specs)
    grown_moments = Moments(*(
        {name: expand(array, declared[kind][name].spec, maps, lambda s, r, p=declared[kind][name].power: r**p)
        for name, array in group.items()} for kind, group in moments._asdict().items()
    ))  # fmt: skip
    records = {}
    for axis, before in multipliers.items():
        source, record = maps.get(axis, (np.arange(sizes[axis]), before._replace(written=1, read=1, ratio=1)))
        factors = (record.written, record.read, record.ratio)
        kept = AxisMultiplier(*(np.asarray(field)[source] for field in before))
        records[axis] = kept._replace(
            **{field: old * new for field, old, new in zip(kept._fields, kept, factors)}, born=record.born
        )
    return grown, grown_moments, records


@pytest.fixture(scope="module", params=list(OPTIMIZERS))
def source(request):
    """An optimizer, and a model that it has trained for three updates, in float64."""
    with jax.enable_x64(True):
        config, specs = OPTIMIZERS[request.param], declare(SIZES)
        random = np.random.default_rng(0)
        parameters = {name: jnp.asarray(0.5 * random.normal(size=spec.shape)) for name, spec in specs.items()}
        parameters["wo"] = parameters["wo"].at[1].multiply(3)  # layers of different scales
        update, multipliers = make_update(config, specs), init_multipliers(specs)
        trained = train(update, parameters, init_moments(config, specs, parameters), multipliers, 0, 3)[:2]
        yield config, specs, trained, multipliers, train(update, *trained, multipliers, 3, 25)


def check_lockstep(source, growths):
    config, _, trained, multipliers, (wanted, _, wanted_losses) = source
    parameters, moments = trained
    for maps in growths:
        grown = {axis: grow_axis(shares, stream=axis == "embed") for axis, shares in maps.items()}
        parameters, moments, multipliers = grow(config, parameters, moments, multipliers, grown)
        specs = declare({axis: len(record.written) for axis, record in multipliers.items()})
        wanted = {name: expand(array, specs[name], grown, lambda s, r: s) for name, array in wanted.items()}
    update = make_update(config, specs)
    got, _, losses = train(update, parameters, moments, multipliers, 3, 25)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-12)
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=0, atol=1e-12, err_msg=name)
        assert float(jnp.max(jnp.abs(array - parameters[name]))) > 1e-2, name
    plain = init_multipliers(specs)
    return max(np.abs(np.array(train(update, parameters, moments, plain, 3, 25)[2]) - wanted_losses))


@pytest.mark.parametrize("how", list(MAPS))
def test_after_growth_training_is_the_image_of_the_sources(source, how):
    with jax.enable_x64(True):
        without = check_lockstep(source, [MAPS[how]])
    assert without > 1e-3, "the same training without growth's record must differ"


def test_two_growths_compose(source):
    again = {"embed": [UNEVEN] + [np.ones(1)] * 8, "mlp": [HALF] + [np.ones(1)] * 6}
    with jax.enable_x64(True):
        check_lockstep(source, [MAPS["fractional"], again])
