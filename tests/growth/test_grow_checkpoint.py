import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from growth.blocks import LeafGrowth
from growth.evidence import expect_evidence
from growth.grow import grow_checkpoint
from growth.receipt import LARGEST_FLOOR_RATIO, Receipt
from growth.receipt_costs import estimate_receipt
from growth.t5 import plan_growth
from launch import cli
from launch.verbs.grow import choose_target, default_output_path
from t5pegasus.checkpoint import has_optimizer_state, load_arrays, load_checkpoint_info, verify_checkpoint
from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.presets import preset

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = {"d_model": 17, "num_heads": 3, "num_decoder_layers": 2}
TO = ",".join(f"{field}={size}" for field, size in SIZES.items())


@pytest.fixture(scope="session")
def target(checkpoint_path) -> ModelConfig:
    return dataclasses.replace(load_checkpoint_info(checkpoint_path).config.model, **SIZES)


@pytest.fixture(scope="session")
def grown(checkpoint_path, target, tmp_path_factory):
    return grow_checkpoint(checkpoint_path, target, tmp_path_factory.mktemp("grown") / "grown", choices={"seed": 3})


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_grown_checkpoint_is_one_of_the_same_form(checkpoint_path, target, grown):
    verify_checkpoint(grown.path)
    before, after = load_checkpoint_info(checkpoint_path), load_checkpoint_info(grown.path)
    assert after.config == grown.growth.change_config(before.config, before.step)
    assert after.config.model == target
    assert after.config.optimizer.rewarm_steps == 250
    for field in ("step", "rows", "compute_dtype", "tokenizer_fingerprint", "examples_fingerprint", "history"):
        assert getattr(after, field) == getattr(before, field)
    arrays, sources = load_arrays(grown.path), load_arrays(checkpoint_path)
    assert {name: array.dtype for name, array in arrays.items()} == {name: a.dtype for name, a in sources.items()}
    for name, spec in declare_parameters(target).items():
        for group in ("parameters", "first_moment", "second_moment"):
            assert arrays[f"{group}.{name}"].shape == spec.shape
    assert (grown.path / "tokenizer" / "vocab.txt").read_bytes() == (
        checkpoint_path / "tokenizer" / "vocab.txt"
    ).read_bytes()


def test_the_lineage_names_plan_and_source(checkpoint_path, target, grown):
    (entry,) = load_checkpoint_info(grown.path).lineage
    plan = plan_growth(load_checkpoint_info(checkpoint_path).config.model, target, {"seed": 3}, step=30)
    assert entry["plan_hash"] == plan.hash == grown.growth.hash
    assert entry["plan"] == json.loads(json.dumps(plan.to_json()))
    assert entry["source_fingerprint"] == verify_checkpoint(checkpoint_path)["fingerprint"]
    assert entry["step"] == 30


def test_the_receipt_is_saved_and_within_rounding(grown):
    receipt = json.loads((grown.path / "receipt.json").read_text(encoding="utf-8"))
    assert receipt["plan_hash"] == grown.growth.hash
    assert receipt["logits"].keys() == {"float32", "bfloat16", "float64"}
    float32 = receipt["logits"]["float32"]
    assert float32["maximum"] <= LARGEST_FLOOR_RATIO * float32["floor_maximum"] < 1e-4
    assert receipt["num_permutations"] >= 8
    assert abs(receipt["nll_difference"]) < 1e-5
    assert receipt["evidence"] == "random tokens, seed 3"
    assert receipt["source_parameters"] < receipt["grown_parameters"]
    assert Receipt.from_json(receipt) == grown.receipt


def test_costs_lie_beside_the_checkpoint_in_which_they_would_change_bytes(grown):
    costs = json.loads(grown.path.with_name("grown.costs.json").read_text(encoding="utf-8"))
    assert costs.pop("schema") == 1
    assert costs == grown.costs._asdict()
    assert costs["bytes_written"] >= grown.receipt.grown_bytes
    evidence = expect_evidence(load_checkpoint_info(grown.path).config.data, with_examples=False)
    expected = estimate_receipt(grown.growth, "full", evidence).bytes
    assert 0.7 * expected < costs["receipt_peak_bytes"] < 1.3 * expected
    assert "seconds" not in (grown.path / "receipt.json").read_text(encoding="utf-8")


def test_a_finished_growth_run_again_says_so_and_another_one_is_refused(
    checkpoint_path, converted_path, target, grown, tmp_path
):
    before = all_bytes(grown.path)
    again = grow_checkpoint(checkpoint_path, target, grown.path, choices={"seed": 3})
    assert again.already_there
    assert again.receipt == grown.receipt
    with pytest.raises(ArtifactError, match=rf"another plan: {grown.growth.hash[:12]}"):
        grow_checkpoint(checkpoint_path, target, grown.path, choices={"seed": 4})
    with pytest.raises(ArtifactError, match="another source checkpoint"):
        grow_checkpoint(converted_path, target, grown.path, choices={"seed": 3})
    with pytest.raises(ArtifactError, match="no grown checkpoint"):
        grow_checkpoint(checkpoint_path, target, tmp_path, choices={"seed": 3})
    assert all_bytes(grown.path) == before


def test_the_source_is_no_place_for_the_output(checkpoint_path, target):
    for output_path in (checkpoint_path, checkpoint_path / "grown", checkpoint_path / "arrays" / ".." / "grown"):
        with pytest.raises(UsageError, match=r"lies in the checkpoint that is to grow.*choose another --output-path"):
            grow_checkpoint(checkpoint_path, target, output_path, receipt="arrays")
    verify_checkpoint(checkpoint_path)


def test_a_checkpoint_without_optimizer_state_grows_too(converted_path, target, tmp_path):
    done = grow_checkpoint(converted_path, target, tmp_path / "grown", receipt="arrays")
    assert (done.receipt.level, done.receipt.logits) == ("arrays", {})
    assert "receipt of arrays only" in str(done.receipt)
    assert not has_optimizer_state(done.path)
    assert {f"parameters.{name}" for name in declare_parameters(target)} < load_arrays(done.path).keys()


def test_growth_is_compared_on_heldout_text_of_the_same_tokenizer(
    checkpoint_path, target, examples_path, foreign_examples_path, tmp_path
):
    done = grow_checkpoint(checkpoint_path, target, tmp_path / "grown", examples_path=examples_path, receipt="logits")
    assert done.receipt.logits.keys() == {"float32", "bfloat16"}
    assert done.receipt.evidence == str(examples_path / "heldout")
    assert done.receipt.num_target_tokens == 10 * 4
    with pytest.raises(
        UsageError, match=f"examples have another tokenizer than .*: {'a' * 12}…, {'f' * 12}… was wanted"
    ):
        grow_checkpoint(checkpoint_path, target, tmp_path / "other", examples_path=foreign_examples_path)


@pytest.mark.parametrize(("error", "found"), [(1e-4, r"[^;]*e-0\d"), (np.nan, "nan")])
def test_a_growth_that_changes_the_function_is_refused_and_leaves_nothing(
    checkpoint_path, target, tmp_path, monkeypatch, error, found
):
    compute = LeafGrowth.compute

    def inexact(leaf, block, target):
        is_final_norm = leaf.shape == (SIZES["d_model"],)  # nothing else has one dimension of this size
        return compute(leaf, block, target) * np.float32(1 + error * is_final_norm)

    monkeypatch.setattr(LeafGrowth, "compute", inexact)
    expected = rf"arrays: .* is off by .*; logits in float32: max \|Δlogit\| is {found} .* floor = "
    with pytest.raises(ArtifactError, match=expected):
        grow_checkpoint(checkpoint_path, target, tmp_path / "grown", receipt="logits")
    assert list(tmp_path.iterdir()) == []


def test_killed_and_run_again_it_writes_the_same_bytes(checkpoint_path, grown, tmp_path, capsys):
    output_path = tmp_path / "grown"
    command = ["grow", str(checkpoint_path), "--to", TO, "--seed", "3", "--output-path", str(output_path)]
    killed = (
        "import os, signal, growth.grow\n"
        "growth.grow.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"  # arrays written, receipt not
        f"from launch.cli import main; main({command})"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(
        [sys.executable, "-c", killed], cwd=tmp_path, env=environment, check=False, capture_output=True, timeout=240
    )
    assert result.returncode == -9, result.stderr.decode()
    assert not output_path.exists()
    assert (tmp_path / "grown.unfinished" / "checkpoint" / "arrays").is_dir()
    assert cli.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "grown.costs.json"]
    assert all_bytes(output_path) == all_bytes(grown.path)
    printed = capsys.readouterr().out
    for expected in (
        "embed",
        "12 → 17",
        "receipt: R, max |Δlogit|",
        f"checkpoint: {output_path}",
        f"next: t5pegasus pretrain --start-from {output_path}",
    ):
        assert expected in printed
    assert cli.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(checkpoint_path, grown, tmp_path):
    output_path = tmp_path / "grown"
    command = ["launch", "local", "--processes", "2", "--", "grow", str(checkpoint_path), "--to", TO, "--seed", "3"]
    script = "import sys; from launch.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", script, *command, "--output-path", str(output_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_NUM_CPU_DEVICES": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("next: t5pegasus") == 1
    assert not (tmp_path / "grown.unfinished").exists()
    assert all_bytes(output_path) == all_bytes(grown.path)


def test_the_target_is_the_source_with_the_sizes_that_were_named():
    source = dataclasses.replace(preset("base").model, vocab_size=999, dropout_rate=0.0)
    nothing = dict.fromkeys(("d_model", "d_ff", "num_heads", "d_kv", "num_encoder_layers", "num_decoder_layers"))
    large = preset("large").model
    assert choose_target(source, "large", nothing) == dataclasses.replace(large, vocab_size=999, dropout_rate=0.0)
    named = choose_target(source, "d_model=800, d_ff=4096", nothing | {"d_model": 900})
    assert named == dataclasses.replace(source, d_model=900, d_ff=4096)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("lage", "perhaps you meant 'large'"),
        ("d_modle=96", "perhaps you meant 'd_model'"),
        ("vocab_size=96", "'vocab_size' cannot be grown by a number"),
        ("d_ff=24,d_ff=32", "d_ff is given twice"),
        ("d_model=wide", "d_model='wide' is not a whole number"),
        (None, "nothing says how large"),
    ],
)
def test_a_target_that_cannot_be_read_is_refused_with_the_nearest_one(to, message):
    with pytest.raises(UsageError, match=message):
        choose_target(ModelConfig(), to, {"d_model": None, "d_ff": None})


def test_output_lies_beside_the_run_unless_said_otherwise(tmp_path):
    assert default_output_path(tmp_path / "run") == tmp_path / "run-grown"
    assert default_output_path(tmp_path / "run" / "checkpoints" / "30") == tmp_path / "run-grown"
