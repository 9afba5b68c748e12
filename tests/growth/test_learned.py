"""Laws of learned growth: it begins at the lossless one, its gradients are right, training lowers the loss."""

import dataclasses
import itertools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SOURCE, STEP, trained_state

from growth import learned_checkpoint
from growth.choices import Choices, LearnedMaps
from growth.dense_maps import MAPS, deviate, init_deltas
from growth.evidence import draw_batches
from growth.explain import explain
from growth.grow import grow_checkpoint
from growth.learned import apply_maps, count_training_flops, learn_growth, pure_map_gradients
from growth.learned_checkpoint import learn_arrays
from growth.mesh import grow_on_mesh
from growth.operators import writes_stream
from growth.state import grow_state
from growth.t5 import plan_growth
from launch.growth_events import plan_events
from launch.growth_schedule import read_stage
from t5pegasus.axes import dual_multipliers, logical_axis
from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.config import NUMERICS, DataConfig, MeshConfig, RunConfig, TrainConfig
from t5pegasus.errors import ArtifactError, DivergedError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.manifest import MANIFEST
from t5pegasus.sharding import make_mesh

MODEL = dataclasses.replace(SOURCE, vocab_size=42, num_heads=2)
CHANGES = {"d_model": 18, "d_kv": 7, "d_ff": 22, "num_heads": 4, "num_encoder_layers": 3, "num_decoder_layers": 2}
LEARNED = {"steps": 6, "learning_rate": 0.02}
RUN = RunConfig(
    model=MODEL,
    data=DataConfig(max_source_tokens=12, max_target_tokens=6),
    train=TrainConfig(batch_size=8, z_loss=0.0, compute_dtype="float32"),
)


def plan(model=MODEL, changes=CHANGES, **choices):
    return plan_growth(model, dataclasses.replace(model, **changes), {"learned": LEARNED, **choices}, step=STEP)


def random_deltas(growth, scale=0.1):
    random = np.random.default_rng(3)
    deltas = init_deltas(growth.specs, growth.plan.maps, np.float64)
    return jax.tree.map(lambda each: scale * random.standard_normal(each.shape), deltas)


def single_precision():
    state = trained_state(MODEL)
    return jax.tree.map(lambda each: each.astype(np.float32) if each.dtype == np.float64 else each, state)


def batches(count):
    return itertools.repeat(draw_batches(MODEL, RUN.data, 0)[0], count)


def mesh_of(*sizes):
    return make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])


@pytest.fixture(scope="module")
def on_one_device():
    return learn_growth(single_precision(), plan(), RUN, batches(6), mesh_of(1, 1, 1))


def dense(axis, spec, entry, delta, kind):
    """The lossless map and what training added, as matrices of one parameter."""
    scale = dual_multipliers(axis, spec, entry)[0]
    base = np.zeros((entry.size, entry.source_size))
    base[np.arange(entry.size), entry.sources] = scale
    if kind == "layers":
        if writes_stream(spec):
            base[entry.created] = 0
        return base, base + delta
    if kind in ("vocab", "relpos_buckets"):
        for place, mixture in zip(np.flatnonzero(entry.created), entry.mixtures):
            base[place] = 1 / entry.source_size if mixture is None else 0
            base[place, list(mixture or ())] = 1 / len(mixture or (1,))
        return base, base
    if spec.gain:
        return base, base
    base[entry.created] = 0
    shared = entry.read if axis in spec.contracted else entry.written
    return base, base + (scale / shared)[:, None] * delta


@pytest.mark.parametrize("family", NUMERICS)
@pytest.mark.parametrize("operator", ["duplicate", "pad"])
def test_a_parameter_is_the_product_of_its_maps(family, operator):
    model = dataclasses.replace(MODEL, **NUMERICS[family])
    growth = plan(model, {**CHANGES, "vocab_size": 45}, axes={"embed": operator, "*.mlp": operator})
    deltas, parameters = random_deltas(growth), trained_state(model).parameters
    for name, spec in growth.specs.items():
        lossless = changed = parameters[name]
        for place, axis in enumerate(spec.axes):
            if axis not in growth.plan.maps:
                continue
            role = "read" if axis in spec.contracted else "written"
            if logical_axis(axis) == "layers":
                role = "writers" if writes_stream(spec) else "others"
            delta = deltas.get(axis, {}).get(role, 0.0)
            letters = string.ascii_lowercase[: len(spec.axes)]
            formula = f"Z{letters[place]},{letters}->{letters.replace(letters[place], 'Z')}"
            before, after = dense(axis, spec, growth.plan.maps[axis], delta, logical_axis(axis))
            lossless, changed = np.einsum(formula, before, lossless), np.einsum(formula, after, changed)
        moved = deviate(parameters[name], spec, growth.plan.maps, deltas)
        got = np.zeros_like(changed) if moved is None else moved
        np.testing.assert_allclose(got, changed - lossless, rtol=0, atol=1e-13 * np.abs(changed).max(), err_msg=name)


@pytest.mark.parametrize("choices", [{}, {"axes": {"embed": "pad", "*.layers": {"operator": "stack"}}}])
def test_maps_that_learned_nothing_are_the_lossless_growth(choices):
    growth, state = plan(**choices), trained_state(MODEL)
    lossless = grow_state(state, growth.lossless)
    zeros = init_deltas(growth.specs, growth.plan.maps, np.float64)
    grown = apply_maps(state.parameters, lossless.parameters, growth, zeros)
    for name, wanted in lossless.parameters.items():
        np.testing.assert_array_equal(grown[name], wanted, err_msg=name)


def test_gradients_of_the_maps_are_differences_of_the_loss():
    growth, state = plan(), trained_state(MODEL)
    lossless = grow_state(state, growth.lossless).parameters
    config = dataclasses.replace(RUN, model=growth.target)
    batch = next(batches(1))
    with jax.enable_x64(True):
        quick = {"xla_backend_optimization_level": 0}  # compiling is most of the time
        find = jax.jit(pure_map_gradients(growth, config, jnp.float64), compiler_options=quick)
        deltas = random_deltas(growth, 0.01)
        _, gradients = find(deltas, state.parameters, lossless, batch)
        random, step = np.random.default_rng(0), 1e-5
        for axis, roles in deltas.items():
            for role, delta in roles.items():
                direction = random.standard_normal(delta.shape)

                def loss(length, axis=axis, role=role, delta=delta, direction=direction):
                    moved = {**deltas, axis: {**deltas[axis], role: delta + length * direction}}
                    return float(find(moved, state.parameters, lossless, batch)[0])

                wanted = (loss(step) - loss(-step)) / (2 * step)
                got = float(np.sum(np.asarray(gradients[axis][role]) * direction))
                assert got == pytest.approx(wanted, rel=1e-6, abs=1e-9), (axis, role)


def test_training_the_maps_lowers_the_loss(on_one_device):
    training = on_one_device.training
    assert len(training.losses) == 6
    assert training.lossless_loss == pytest.approx(training.losses[0], rel=1e-6)  # on the same batch
    assert training.losses[-1] < training.lossless_loss - 0.05
    assert on_one_device.training.flops > 0


def test_all_but_the_parameters_is_grown_without_loss(on_one_device):
    growth = plan()
    lossless = grow_state(single_precision(), growth.lossless)
    for group in ("first_moment", "second_moment", "multipliers"):
        jax.tree.map(np.testing.assert_array_equal, getattr(on_one_device.state, group), getattr(lossless, group))
    assert on_one_device.state.step == STEP
    moved = {name for name, array in lossless.parameters.items()
             if not np.array_equal(array, on_one_device.state.parameters[name])}  # fmt: skip
    assert moved == {name for name, spec in growth.specs.items() if not _is_final_gain(spec)}


def _is_final_gain(spec):
    return spec.gain and not any(logical_axis(axis) == "layers" for axis in spec.axes)


@pytest.mark.slow
def test_a_mesh_trains_the_maps_of_one_device(on_one_device):
    again = learn_growth(single_precision(), plan(), RUN, batches(6), mesh_of(2, 2, 2))
    np.testing.assert_allclose(again.training.losses, on_one_device.training.losses, rtol=2e-5)
    for name, wanted in on_one_device.state.parameters.items():
        # Adam divides by the gradient's size, so a gradient near 0 may turn sign under rounding: hence not tighter.
        np.testing.assert_allclose(again.state.parameters[name], wanted, rtol=0, atol=2e-3, err_msg=name)


def test_the_same_training_gives_the_same_bits_and_the_moving_average_its_maps(on_one_device):
    growth, state = plan(), single_precision()
    state = state._replace(ema={name: 2 * array for name, array in state.parameters.items()})
    grown, training = learn_growth(state, growth, RUN, batches(6), mesh_of(1, 1, 1))
    assert training == on_one_device.training
    jax.tree.map(np.testing.assert_array_equal, grown.parameters, on_one_device.state.parameters)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, 2 * b, rtol=1e-6), grown.ema, grown.parameters)


@pytest.mark.parametrize(
    ("learned", "wanted"),
    [
        ({"step": 3}, "unknown field 'step'; perhaps you meant 'steps'"),
        ([], "learned is a list"),
        ({"steps": 0}, "learned.steps=0"),
        ({"steps": True}, "learned.steps=True"),
        ({"learning_rate": 0}, "learned.learning_rate=0"),
        ({"learning_rate": "fast"}, "learned.learning_rate='fast'"),
        ({"batch_size": 0.5}, "learned.batch_size=0.5"),
    ],
)
def test_a_plan_with_unfit_learned_maps_is_refused(learned, wanted):
    with pytest.raises(UsageError, match=wanted):
        Choices.from_json({"learned": learned})


def test_learned_maps_are_no_exact_dynamics():
    with pytest.raises(UsageError, match="dynamics=exact keeps it"):
        Choices.from_json({"learned": {}, "dynamics": "exact"})


def test_plans_say_what_is_learned_only_where_something_is():
    assert "learned" not in Choices().to_json()
    assert "learned maps" not in explain(plan().lossless, ["parameters"])
    table = explain(plan(), ["parameters"])
    assert "promise: L, another function" in table
    assert "learned maps: trained for 6 updates on the run's batches" in table
    choices = Choices.from_json({"learned": {"steps": 7}})
    assert choices.to_json()["learned"] == {
        "steps": 7,
        "learning_rate": LearnedMaps().learning_rate,
        "batch_size": None,
    }
    assert Choices.from_json(choices.to_json()) == choices
    assert (plan().plan.promise, plan().lossless.plan.promise) == ("L", "R")
    assert plan().hash != plan().lossless.hash


def test_growth_without_batches_refuses_learned_maps():
    with pytest.raises(UsageError, match="learn_growth takes them"):
        grow_state(trained_state(MODEL), plan())
    with pytest.raises(UsageError, match="learn_growth takes them"):
        grow_on_mesh(trained_state(MODEL), plan(), mesh_of(1, 1, 1))
    with pytest.raises(UsageError, match="the plan has no learned maps"):
        learn_growth(trained_state(MODEL), plan().lossless, RUN, batches(6), mesh_of(1, 1, 1))


def test_batches_must_be_of_the_size_and_fit_the_mesh():
    state, growth = single_precision(), plan(learned={**LEARNED, "batch_size": 7})
    with pytest.raises(UsageError, match="batch_size=7 is not a multiple"):
        learn_growth(state, growth, RUN, batches(6), mesh_of(2, 1, 1))
    with pytest.raises(UsageError, match="a batch has 8 rows, 7 were wanted"):
        learn_growth(state, growth, RUN, batches(6), mesh_of(1, 1, 1))
    with pytest.raises(UsageError, match="0 batches were given, 6 are wanted"):
        learn_growth(state, plan(), RUN, batches(0), mesh_of(1, 1, 1))


def test_a_loss_that_is_no_number_ends_the_training():
    state = single_precision()
    broken = {name: np.full_like(array, np.nan) for name, array in state.parameters.items()}
    with pytest.raises(DivergedError, match="the loss is nan at update 0 of the maps"):
        learn_growth(state._replace(parameters=broken), plan(), RUN, batches(6), mesh_of(1, 1, 1))


def test_a_checkpoint_grows_by_learned_maps(checkpoint_path, examples_path, tmp_path):
    info = load_checkpoint_info(checkpoint_path)
    target = dataclasses.replace(info.config.model, d_model=18)
    choices = {"learned": {"steps": 2, "batch_size": 8}}
    with pytest.raises(UsageError, match="trained on examples: give those of the checkpoint's run"):
        grow_checkpoint(checkpoint_path, target, tmp_path / "grown", choices=choices)
    made = grow_checkpoint(
        checkpoint_path, target, tmp_path / "grown", choices=choices, examples_path=examples_path, receipt="logits"
    )
    receipt = made.receipt
    assert (receipt.promise, receipt.arrays.structure, receipt.arrays.largest_error) == ("L", (), 0)
    assert receipt.logits["float32"].maximum > 0
    grown = load_checkpoint_info(made.path)
    entry = grown.lineage[-1]
    assert entry["plan"]["learned"]["steps"] == 2
    assert entry["learning_flops"] == count_training_flops(made.growth, info.config) > 0
    assert MAPS in read_json(made.path / MANIFEST)["files"]
    with pytest.raises(ArtifactError, match="grown by another set of examples"):
        grow_checkpoint(checkpoint_path, target, made.path, choices=choices, examples_path=examples_path / "heldout")


def test_interrupted_learning_goes_on_with_the_maps_it_has(checkpoint_path, examples_path, tmp_path, monkeypatch):
    info = load_checkpoint_info(checkpoint_path)
    growth = plan_growth(
        info.config.model, dataclasses.replace(info.config.model, d_ff=20), {"learned": {"steps": 2, "batch_size": 8}}
    )
    first = learn_arrays(checkpoint_path, info, growth, examples_path, tmp_path)
    monkeypatch.setattr(learned_checkpoint, "train_maps", None)
    again = learn_arrays(checkpoint_path, info, growth, examples_path, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_a_run_cannot_learn_maps_on_its_way():
    stage = read_stage({"when": {"step": 3}, "to": {"d_ff": 22}, "plan": {"learned": {}}}, "schedule")
    with pytest.raises(UsageError, match="which a run cannot do on its way"):
        plan_events(RUN, [stage])
