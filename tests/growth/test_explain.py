"""`--explain`: the whole plan as a table, from the checkpoint's description alone."""

import dataclasses
import logging
import shutil

import pytest

from growth.evidence import draw_batches, expect_evidence
from growth.grow import _announce
from growth.receipt import LEVELS
from growth.receipt_costs import estimate_receipt
from growth.t5 import plan_growth
from launch import cli
from t5pegasus.model.t5 import count_parameters
from t5pegasus.presets import preset

HEAD = ("axis", "from → to", "operator", "promise", "set in motion by", "state")


def explain(capsys: pytest.CaptureFixture, *argv: object) -> str:
    assert cli.main(["grow", *map(str, argv), "--explain"]) == 0
    return capsys.readouterr().out


def test_each_axis_has_its_sizes_operator_promise_breaker_and_rule_for_moments(capsys):
    table = explain(capsys, "base", "--to", "d_model=1000,d_ff=4096,num_decoder_layers=14")
    lines = table.splitlines()
    assert tuple(cell.strip() for cell in lines[1].split("  ") if cell) == HEAD
    rows = {line.split("  ")[1].strip(): line for line in lines[2:] if line.startswith("  ") and line[2] != " "}
    for axes, cells in {
        "decoder.layers": ("12 → 14", "insert, at=interposed", "  B  ", "copied readers", "v as copied"),
        "*.mlp": ("2,048 → 4,096", "duplicate", "  R  ", "noise that cancels", "r·m, r²·v"),
        "embed": ("768 → 1,000", "duplicate (some)", "  R  ", "noise that cancels", "r·m, r²·v"),
    }.items():
        assert all(cell in rows[axes] for cell in cells), rows[axes]
    for what in ("promise: R, ", "learning rate: ", "parameters: ", "surgery: reads ", "receipt: about "):
        assert f"\n{what}" in table
    assert "parameters + first_moment + second_moment" in table


def test_a_pattern_stands_for_axes_only_where_a_plan_file_would_mean_the_same(capsys):
    table = explain(capsys, "base", "--to", "d_ff=4096,num_heads=16,num_encoder_layers=14,d_kv=96")
    axes = [line[2:].partition("  ")[0] for line in table.splitlines()[2:] if line.startswith("  ") and line[2] != " "]
    assert axes == ["*.heads", "*.qk, *.vo", "*.mlp", "encoder.layers"]
    assert max(map(len, table.splitlines()[1:10])) < 128


def test_it_reads_no_array_and_writes_nothing(checkpoint_path, tmp_path, capsys):
    folder = shutil.copytree(checkpoint_path, tmp_path / "source")
    wanted = explain(capsys, folder, "--to", "d_model=17")
    for file in folder.glob("arrays/*/c/**/*"):
        if file.is_file():
            file.unlink()
    assert explain(capsys, folder, "--to", "d_model=17") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_estimate_of_a_receipt_counts_parameters_and_the_rows_that_are_compared():
    small, base = preset("small"), preset("base")
    growth = plan_growth(small.model, dataclasses.replace(small.model, d_ff=2048))
    larger = plan_growth(small.model, dataclasses.replace(small.model, d_ff=4096))
    random = expect_evidence(base.data, with_examples=False)
    heldout = expect_evidence(base.data, with_examples=True)
    costs = {level: estimate_receipt(growth, level, random) for level in LEVELS}
    assert costs["full"].bytes > costs["logits"].bytes > costs["arrays"].bytes
    assert costs["full"].seconds > costs["logits"].seconds > costs["arrays"].seconds
    for level in ("full", "logits"):
        longer = estimate_receipt(growth, level, heldout)
        assert longer.bytes > costs[level].bytes
        assert longer.seconds > costs[level].seconds
        added = count_parameters(larger.target) - count_parameters(growth.target)
        assert estimate_receipt(larger, level, random).bytes - costs[level].bytes >= 4 * added
    assert estimate_receipt(growth, "arrays", heldout) == costs["arrays"]


def test_too_little_memory_is_said_before_anything_is_grown(monkeypatch, caplog):
    small = preset("small")
    growth = plan_growth(small.model, dataclasses.replace(small.model, d_ff=2048))
    batches = draw_batches(small.model, small.data, 0)
    for available, warned in ((10**8, True), (10**12, False), (None, False)):
        caplog.clear()
        monkeypatch.setattr("growth.grow.read_available_bytes", lambda available=available: available)
        with caplog.at_level(logging.INFO):
            _announce(growth, "full", batches)
        assert (
            f"about {estimate_receipt(growth, 'full', expect_evidence(small.data, with_examples=False))}" in caplog.text
        )
        assert ("--receipt logits about" in caplog.text and "--receipt arrays about" in caplog.text) == warned
