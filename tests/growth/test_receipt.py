"""Laws of the receipt: it lets right growths of every kind pass, and names what is wrong with a damaged one."""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import growth.gradients as growth_gradients
import growth.operators as growth_operators
from growth.acceptance import check_receipt, find_failures
from growth.evidence import load_evidence
from growth.execution import execute_growth
from growth.gradients import check_gradients
from growth.index_map import IndexMap
from growth.receipt import LogitDifference, Receipt
from growth.t5 import plan_growth
from growth.verify import Request, measure_apart, measure_growth
from t5pegasus.arrays import load_arrays
from t5pegasus.axes import ParamSpec
from t5pegasus.checkpoint import load_checkpoint_info, save_arrays, save_checkpoint
from t5pegasus.config import NUMERICS, OptimizerConfig
from t5pegasus.errors import ArtifactError
from t5pegasus.train.state import state_to_arrays
from tests.growth.conftest import MODEL, write_checkpoint
from tests.growth.small_models import trained_state

TWICE = ("arrays", "derivation")
CREATED = {"embed": "pad", "*.mlp": "pad", "*.vo": "pad"}
MANY = {"d_model": 17, "d_ff": 20, "d_kv": 6, "num_decoder_layers": 2, "vocab_size": 126, "num_masked_tokens": 6}


class Grown:
    """A growth whose checkpoint lacks nothing but its manifest and its name."""

    def __init__(self, source: Path, folder: Path, changes: dict, choices: dict | None = None):
        info = load_checkpoint_info(source)
        target = dataclasses.replace(info.config.model, **changes)
        self.growth = plan_growth(
            info.config.model, target, {"seed": 3, **(choices or {})}, step=info.step, optimizer=info.config.optimizer
        )
        self.source, self.folder = source, folder
        config = self.growth.change_config(info.config, info.step)
        execute_growth(source, self.growth, folder, dataclasses.replace(info, config=config), {"plan": "a test's"})
        self.batches, self.evidence = load_evidence(source, info, 3, None)

    def measure(self, level: str, folder: Path | None = None) -> Receipt:
        request = Request(self.source, folder or self.folder, self.growth, self.batches, self.evidence, level)
        return measure_growth(request)

    def damage(self, folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
        """A copy with other arrays."""
        arrays = {name: np.array(array) for name, array in load_arrays(self.folder).items()}
        change(arrays)
        save_arrays(folder, arrays)
        shutil.copy(self.folder / "checkpoint.json", folder)
        return folder


@pytest.fixture(scope="module")
def many(checkpoint_path, tmp_path_factory) -> Grown:
    return Grown(checkpoint_path, tmp_path_factory.mktemp("many") / "grown", MANY, {"axes": CREATED})


@pytest.fixture(scope="module")
def whole_receipt(many) -> Receipt:
    return many.measure("full")


def source_of(folder: Path, optimizer: OptimizerConfig | None = None, **numerics) -> Path:
    """A checkpoint in other numerics, or of another optimizer."""
    original = write_checkpoint(folder / "original", with_optimizer=True)
    model = dataclasses.replace(MODEL, **numerics)
    info = load_checkpoint_info(original)
    config = dataclasses.replace(info.config, model=model, optimizer=optimizer or info.config.optimizer)
    state = jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, trained_state(model, optimizer)
    )
    if config.optimizer.moment_dtype == "bfloat16":
        first, second = (
            {name: array.astype(jnp.bfloat16) for name, array in group.items()}
            for group in (state.first_moment, state.second_moment)
        )
        state = state._replace(first_moment=first, second_moment=second)
    info = dataclasses.replace(info, config=config, step=int(state.step), rows=int(state.rows))
    save_checkpoint(folder / "source", state_to_arrays(state), info, original / "tokenizer")
    return folder / "source"


def test_created_entries_of_every_kind_pass_the_whole_receipt(many, whole_receipt):
    receipt = whole_receipt
    check_receipt(receipt)
    assert receipt.promise == "M"
    assert receipt.logits.keys() == {"float32", "bfloat16", "float64"}
    assert receipt.logits["float64"].maximum < 1e-13 * receipt.logits["float64"].largest_logit
    assert receipt.new_tokens is not None
    assert (receipt.new_tokens.number, receipt.new_tokens.masked) == (6, True)
    assert receipt.new_tokens.largest_probability_ratio == 0
    assert receipt.gradients is not None
    assert max(receipt.gradients.elementwise, receipt.gradients.summed) < 1e-13
    created = {axis: each.created for axis, each in receipt.liveness.items()}
    assert created["embed"] == 5
    assert created["decoder.layers"] == 1
    assert created["encoder.mlp"] == 4
    assert all(each.alive == each.created for each in receipt.liveness.values())
    assert receipt.arrays.structure == ()
    assert receipt.arrays.largest_derived_error < 8
    assert receipt.arrays.derived > 1000


def test_the_receipt_survives_its_json(whole_receipt):
    assert Receipt.from_json(json.loads(json.dumps(whole_receipt.to_json(), allow_nan=False))) == whole_receipt


def wrong_entry(arrays):
    wo = arrays["parameters.encoder.layers.mlp.wo"]
    wo.reshape(-1)[np.argmax(np.abs(wo))] *= 1 + 1e-5


def wrong_moments(arrays):
    arrays["first_moment.decoder.layers.mlp.wo"] *= 1.5


def another_step(arrays):
    arrays["step"] += 1


def missing_array(arrays):
    del arrays["second_moment.lm_head"]


def wrong_record(arrays):
    arrays["multipliers.embed.read"][:] = 1


def silent_units(arrays):
    for name in ("wi_0", "wi_1"):
        wi = arrays[f"parameters.encoder.layers.mlp.{name}"]
        wi[..., arrays["multipliers.encoder.mlp.inherited"] == 0] = 0


@pytest.mark.parametrize(
    ("change", "level", "names"),
    [
        (wrong_entry, "arrays", ["arrays: parameters.encoder.layers.mlp.wo"]),
        (wrong_moments, "arrays", [f"{check}: first_moment.decoder.layers.mlp.wo" for check in TWICE]),
        (wrong_record, "arrays", ["derivation: multipliers.embed.read"]),
        (another_step, "arrays", ["structure: step is 31"]),
        (missing_array, "arrays", ["structure: array second_moment.lm_head is absent"]),
        (silent_units, "full", ["liveness: after two updates no gradient has reached the new entries of axis enc"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("whole_receipt")  # which has compiled what is needed
def test_a_damaged_growth_fails_the_right_check_by_name(many, tmp_path, change, level, names):
    failures = find_failures(many.measure(level, many.damage(tmp_path / "damaged", change)))
    for name in names:
        assert any(failure.startswith(name) for failure in failures), failures


def test_an_epsilon_that_is_off_is_seen_in_float64(many, tmp_path):
    folder = many.damage(tmp_path / "damaged", lambda _: None)
    info = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    info["config"]["model"]["layer_norm_epsilon"] *= 1.5
    (folder / "checkpoint.json").write_text(json.dumps(info), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"layer_norm_epsilon is 1\.5\d*e-06, 1e-06 was wanted"):
        check_receipt(many.measure("arrays", folder))
    target = dataclasses.replace(many.growth.target, layer_norm_epsilon=1.5e-6)
    with jax.enable_x64(True):
        parameters = {n.removeprefix("parameters."): a for n, a in load_arrays(many.source, ("parameters.",)).items()}
        _, logits = check_gradients(many.growth, target, parameters, many.batches[0], 3)
    assert not logits.is_rounding
    assert 1e-8 < logits.maximum < 1e-4


def test_an_uneven_split_of_equal_copies_keeps_sums_and_not_gradients(checkpoint_path, monkeypatch):
    """A norm's backward pass gives each copy an equal share, whatever share of it is read."""
    growth = plan_growth(MODEL, dataclasses.replace(MODEL, d_model=24), {"dynamics": "exact"})
    (batch,), _ = load_evidence(checkpoint_path, load_checkpoint_info(checkpoint_path), 3, None)
    parameters = {n.removeprefix("parameters."): a for n, a in load_arrays(checkpoint_path, ("parameters.",)).items()}
    share = np.tile([0.7, 0.3], 12)

    def split(axis: str, spec: ParamSpec, record: IndexMap) -> tuple[np.ndarray, np.ndarray]:
        assert np.all(record.written == 1)  # equal copies
        if spec.gain:
            return np.ones(24), share
        return (share, np.ones(24)) if axis in spec.contracted else (np.ones(24), share)

    errors = {}
    for name in ("even", "uneven"):
        with jax.enable_x64(True):
            errors[name], logits = check_gradients(growth, growth.target, parameters, batch, 3)
        assert logits.maximum < 1e-13 * logits.largest_logit, name
        assert errors[name].summed < 1e-13, name
        for module in (growth_gradients, growth_operators):
            monkeypatch.setattr(module, "dual_multipliers", split)
    assert errors["even"].elementwise < 1e-13
    assert 0.1 < errors["uneven"].elementwise < 0.5


@pytest.mark.parametrize(
    ("changes", "choices"),
    [
        ({"d_model": 18, "d_ff": 40, "num_heads": 3}, {"state": "asymmetric"}),
        ({"d_model": 24, "d_ff": 24}, {"axes": {"embed": {"operator": "duplicate", "scale_gains": True}}, "noise": 2}),
        ({"d_ff": 24, "num_heads": 4}, {"axes": {"*.heads": {"operator": "duplicate", "first_share": 0.7}}}),
        ({"d_model": 17}, {"axes": {"embed": {"operator": "pad", "layout": "tail", "scale_gains": True}}}),
        ({"d_ff": 40, "d_model": 19, "d_kv": 5}, {"dynamics": "exact"}),
        ({"vocab_size": 123, "d_model": 16}, {"axes": {"vocab": {"operator": "add", "rows": [[1, 2], [3], [5, 7]]}}}),
        ({"num_encoder_layers": 3}, {"axes": {"*.layers": "stack"}}),
        ({"relative_attention_boundaries": (128, 256), "num_heads": 3}, {}),
    ],
)  # fmt: skip
def test_the_arrays_of_every_kind_of_plan_are_derived_a_second_time(checkpoint_path, tmp_path, changes, choices):
    receipt = Grown(checkpoint_path, tmp_path / "grown", changes, choices).measure("arrays")
    assert find_failures(receipt) == []
    assert receipt.arrays.largest_derived_error < 8


@pytest.mark.parametrize(("name", "moment_dtype"), [("adafactor", "float32"), ("sgd", "float32"), ("muon", "bfloat16")])
def test_the_state_of_other_optimizers_is_derived_too(tmp_path, name, moment_dtype):
    optimizer = OptimizerConfig(name=name, min_dim_size_to_factor=8, moment_dtype=moment_dtype)
    source = source_of(tmp_path, optimizer)
    grown = Grown(source, tmp_path / "grown", {"d_model": 18, "d_ff": 24, "num_encoder_layers": 2}, {"axes": CREATED})
    assert any(array.startswith("row_moment.") for array in load_arrays(source)) == (name == "adafactor")
    assert find_failures(grown.measure("arrays")) == []


def test_new_layers_alone_are_bitwise_the_same(checkpoint_path, tmp_path):
    receipt = Grown(checkpoint_path, tmp_path / "grown", {"num_encoder_layers": 2}).measure("logits")
    check_receipt(receipt)
    assert (receipt.promise, receipt.bitwise) == ("B", True)
    assert "bitwise equal" in str(receipt)


def test_a_class_b_growth_that_only_rounds_says_so_and_passes(whole_receipt):
    receipt = dataclasses.replace(whole_receipt, promise="B")
    check_receipt(receipt)
    assert "not bitwise with this device's kernels" in str(receipt)


def test_every_printed_ratio_is_that_of_the_numbers_beside_it(whole_receipt):
    mean_is_worse = LogitDifference(4e-6, 6e-7, 5e-6, 4e-7, 3.0)
    text = str(dataclasses.replace(whole_receipt, logits={"float32": mean_is_worse}))
    assert "max |Δlogit| 4.0e-06 (0.80 × the permutation floor 5.0e-06)" in text
    assert "root mean square 6.0e-07 (1.50 × the permutation floor 4.0e-07)" in text
    maximum_is_worse = LogitDifference(6e-6, 2e-7, 5e-6, 4e-7, 3.0)
    text = str(dataclasses.replace(whole_receipt, logits={"float32": maximum_is_worse}))
    assert "max |Δlogit| 6.0e-06 (1.20 × the permutation floor 5.0e-06)" in text
    assert "root mean square" not in text


def test_open_tokens_take_the_probability_that_is_stated(checkpoint_path, tmp_path):
    receipt = Grown(checkpoint_path, tmp_path / "grown", {"vocab_size": 150}).measure("logits")
    check_receipt(receipt)
    assert receipt.new_tokens is not None
    assert receipt.new_tokens.bound is not None
    assert receipt.new_tokens.bound == pytest.approx(np.log(1.25))
    assert 0 < receipt.new_tokens.mean_log_added_mass <= receipt.new_tokens.bound
    assert receipt.nll_difference == pytest.approx(receipt.new_tokens.mean_log_added_mass, abs=1e-6)
    too_much = dataclasses.replace(receipt.new_tokens, bound=receipt.new_tokens.mean_log_added_mass / 2)
    assert "new tokens: they take" in find_failures(dataclasses.replace(receipt, new_tokens=too_much))[0]


def test_stacked_layers_state_their_change_and_promise_nothing_more(checkpoint_path, tmp_path):
    grown = Grown(checkpoint_path, tmp_path / "grown", {"num_decoder_layers": 2}, {"axes": {"*.layers": "stack"}})
    receipt = grown.measure("logits")
    check_receipt(receipt)
    assert receipt.promise == "L"
    assert not receipt.logits["float32"].is_rounding
    assert find_failures(dataclasses.replace(receipt, keeps_logits=True))[0].startswith("logits in float32")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["t5-1.0", "bert4keras"])
def test_other_numerics_pass_the_whole_receipt(tmp_path, family):
    numerics = NUMERICS[family]
    grown = Grown(source_of(tmp_path, **numerics), tmp_path / "grown", {"d_model": 20, "d_ff": 24, "num_heads": 3})
    receipt = grown.measure("full")
    check_receipt(receipt)
    assert all(each.parted == each.copied for each in receipt.liveness.values())


@pytest.mark.slow
def test_copies_that_stay_like_each_other_are_seen(checkpoint_path, tmp_path, monkeypatch):
    # With a rate of their own, two copies of one unit part from it, and never from each other.
    monkeypatch.setattr("growth.t5.check_plan", lambda *_: [])  # which refuses that
    changes = {"d_ff": 3 * MODEL.d_ff, "num_heads": 4}
    receipt = Grown(checkpoint_path, tmp_path / "grown", changes, {"noise": 0.0}).measure("full")
    for axis, parted in (("encoder.mlp", 0), ("encoder.self.heads", 2)):
        assert receipt.liveness[axis].parted == parted
    assert any("liveness: after two updates 0 of 32 copies along axis encoder.mlp" in f for f in find_failures(receipt))


@pytest.mark.slow
def test_exact_dynamics_passes_without_new_capacity(checkpoint_path, tmp_path):
    grown = Grown(checkpoint_path, tmp_path / "grown", {"d_model": 24, "d_ff": 24}, {"dynamics": "exact"})
    receipt = grown.measure("full")
    check_receipt(receipt)
    assert all(each.parted == 0 for axis, each in receipt.liveness.items() if axis == "embed")
    locked = find_failures(dataclasses.replace(receipt, exact_dynamics=False))
    assert "liveness: after two updates 0 of 12 copies along axis embed have parted" in locked


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_never_passes(whole_receipt, value):
    logits = {"float32": LogitDifference(value, value, 1e-6, 1e-7, 3.0)}
    for keeps_logits in (True, False):
        receipt = dataclasses.replace(whole_receipt, logits=logits, keeps_logits=keeps_logits)
        with pytest.raises(ArtifactError, match=r"logits in float32: max \|Δlogit\| is (nan|inf)"):
            check_receipt(receipt)
    with pytest.raises(ArtifactError, match="the source's loss on random tokens, seed 3 is nan"):
        check_receipt(dataclasses.replace(whole_receipt, source_nll=np.nan))


@dataclasses.dataclass
class EndsItsReader:
    """What a process does that reads it from a pickle."""

    code: str

    def __reduce__(self):
        return exec, (self.code,)


@pytest.mark.parametrize("signal", [9, 6])
def test_a_measuring_process_that_is_killed_is_told_from_a_growth_that_fails(many, signal):
    reader = EndsItsReader(f"import os; os.kill(os.getpid(), {signal})")
    request = Request(many.source, many.folder, cast(Any, reader), [], "", "full")
    with pytest.raises(OSError, match="want of memory") as caught:
        measure_apart(request)
    assert caught.value.errno == errno.ENOMEM
