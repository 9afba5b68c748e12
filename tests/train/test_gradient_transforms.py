"""Laws of gradient transforms: they reach their group alone, and give after growth r times what they gave before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.axes import AxisMultiplier, ParamSpec
from t5pegasus.config import OptimizerConfig
from t5pegasus.errors import UsageError
from t5pegasus.train.gradient_transforms import make_transform
from t5pegasus.train.optimizer import init_multipliers, leaf_multipliers, make_schedule

SPECS = {
    "embedding": ParamSpec(("vocab", "embed"), (), gain=False, shape=(7, 6)),
    "wi": ParamSpec(("layers", "embed", "mlp"), ("embed",), gain=False, shape=(3, 6, 4)),
    "wo": ParamSpec(("layers", "mlp", "embed"), ("mlp",), gain=False, shape=(3, 4, 6)),
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def draw(seed, specs=SPECS):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=spec.shape)) for name, spec in specs.items()}


def transform(gradients, *transforms, specs=SPECS, parameters=None, multipliers=None):
    config = OptimizerConfig(gradient_transforms=transforms)
    multipliers = multipliers or init_multipliers(specs)
    return make_transform(config, specs)(gradients, parameters or draw(1, specs), multipliers)


def norm(*arrays):
    return float(np.sqrt(sum(np.sum(np.square(array)) for array in arrays)))


def test_without_transforms_gradients_stay_what_they_are():
    gradients = draw(0)
    assert all(after is gradients[name] for name, after in transform(gradients).items())


def test_a_group_is_scaled_by_name_by_axis_or_by_entries_and_nothing_else():
    gradients = draw(0)
    after = transform(gradients, "w*=scale:0.5", "layers[1:]=scale:3", "vocab=scale:2")
    np.testing.assert_allclose(after["embedding"], 2 * gradients["embedding"])
    for name in ("wi", "wo"):
        np.testing.assert_allclose(after[name][0], 0.5 * gradients[name][0])
        np.testing.assert_allclose(after[name][1:], 1.5 * gradients[name][1:])


def test_a_groups_norm_is_clipped_over_all_of_its_parameters_together():
    gradients = draw(0)
    total = norm(gradients["wi"][2], gradients["wo"][2])
    after = transform(gradients, "layers[-1:]=clip:0.25", "vocab=clip:1000")
    for name in ("wi", "wo"):
        np.testing.assert_allclose(after[name][2], 0.25 / total * gradients[name][2], rtol=1e-8)
        np.testing.assert_array_equal(after[name][:2], gradients[name][:2])
    np.testing.assert_array_equal(after["embedding"], gradients["embedding"])


def test_l1_is_the_gradient_of_the_sum_of_magnitudes():
    gradients, parameters = draw(0), draw(1)
    after = transform(gradients, "wi=l1:0.3", parameters=parameters)
    wanted = jax.grad(lambda array: jnp.sum(array * gradients["wi"]) + 0.3 * jnp.sum(jnp.abs(array)))(parameters["wi"])
    np.testing.assert_allclose(after["wi"], wanted)


def test_parameters_without_a_gradient_are_passed_over():
    gradients = {name: array for name, array in draw(0).items() if name != "wi"}
    assert transform(gradients, "w*=scale:0.5", "layers=clip:1", "w*=l1:1").keys() == gradients.keys()


def test_after_growth_they_are_the_image_of_those_before():
    share = np.array([0.7, 0.3] * 4)
    record = AxisMultiplier(np.ones(8), share, np.ones(8), np.ones(8), np.zeros(8, np.int32))
    multipliers = init_multipliers(SPECS) | {"mlp": AxisMultiplier(*map(jnp.asarray, record))}
    grown_specs = {
        name: dataclasses.replace(
            spec, shape=tuple(8 if axis == "mlp" else size for axis, size in zip(spec.axes, spec.shape))
        )
        for name, spec in SPECS.items()
    }

    def image(arrays, which):
        grown = {}
        for name, array in arrays.items():
            place = SPECS[name].axes.index("mlp") if "mlp" in SPECS[name].axes else None
            copies = array if place is None else jnp.repeat(array, 2, place)
            grown[name] = copies * leaf_multipliers(grown_specs[name], multipliers)[which]
        return grown

    transforms = ("w*=clip:0.2", "wi=l1:0.1", "layers[:1]=scale:0.5")
    gradients, parameters = draw(0), draw(1)
    before = transform(gradients, *transforms, parameters=parameters)
    after = transform(
        image(gradients, 1), *transforms, specs=grown_specs, parameters=image(parameters, 0), multipliers=multipliers
    )
    for name, wanted in image(before, 1).items():
        np.testing.assert_allclose(after[name], wanted, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("text", ["vocab", "vocab=clip", "vocab=clip:0", "vocab=clip:-1", "vocab=norm:1", "=clip:1"])
def test_a_transform_that_cannot_be_read_is_refused(text):
    with pytest.raises(UsageError, match=r"gradient_transforms='.*' is not PATTERN=scale:X, PATTERN=clip:X or .*write"):
        OptimizerConfig(gradient_transforms=(text,))


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(UsageError, match="pattern 'vocabulary' fits no parameter and no axis; perhaps you meant vocab"):
        transform(draw(0), "vocabulary=clip:1")


def test_a_piecewise_schedule_passes_through_its_points():
    points = ("10=1", "30=0.5", "40=0")
    schedule = make_schedule(
        OptimizerConfig(learning_rate=2.0, schedule="piecewise", schedule_points=points, warmup_steps=7), 100
    )
    rates = [float(schedule(jnp.int32(update - 1))) for update in (1, 5, 10, 20, 30, 35, 40, 90)]
    np.testing.assert_allclose(rates, [0.2, 1.0, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0], rtol=1e-6, atol=1e-7)
    from_zero = OptimizerConfig(learning_rate=2.0, schedule="piecewise", schedule_points=("0=1", "10=0.5"))
    np.testing.assert_allclose(float(make_schedule(from_zero, 100)(jnp.int32(4))), 1.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schedule": "piecewise"}, "schedule=piecewise with schedule_points=.*: points belong to piecewise"),
        ({"schedule_points": ("1=1",)}, r"schedule=wsd with schedule_points=\['1=1'\]"),
        ({"schedule": "piecewise", "schedule_points": ("5=1", "5=2")}, "has updates 5, 5; give them in rising order"),
        ({"schedule": "piecewise", "schedule_points": ("x=1",)}, "schedule_points='x=1' is not UPDATE=FACTOR"),
        ({"schedule": "piecewise", "schedule_points": ("5=-1",)}, "schedule_points='5=-1' is not UPDATE=FACTOR"),
    ],
)
def test_points_that_make_no_schedule_are_refused(fields, message):
    with pytest.raises(UsageError, match=message):
        OptimizerConfig(**fields)
