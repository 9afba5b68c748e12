"""What `convert` prints about a model before anything is written, and of another vocabulary: through the verb."""

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hf_models import MODELS, WORDS, copy_with, draw_parameters

from launch.verbs import convert
from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.errors import DataError, UsageError
from t5pegasus.text.tokenizer import load_tokenizer
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

SENTENCES = "天地玄黄。宇宙洪荒。日月盈昃。辰宿列张。寒来暑往。天地寒暑。日月星辰。来往宇宙。\n"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": SENTENCES * 6}, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def loss_printed(printed: str) -> float:
    return float(re.search(r"loss +([0-9.]+) nats", printed)[1])


def run(capsys, *argv) -> str:
    convert.main([str(argument) for argument in argv])
    return capsys.readouterr().out


def test_check_says_what_a_source_is_and_writes_nothing(checkpoints, exported, text: Path, tmp_path: Path, capsys):
    before = sorted(tmp_path.rglob("*"))
    ours = run(capsys, "--check", checkpoints["t5-1.0"], "--text", text)
    assert "checkpoint of step 0" in ours
    assert "7,976" in ours
    assert "t5-1.0 (relu, tied head, logits × d_model^-0.5)" in ours
    assert "pad 0, start 2, end 3, unknown 1" in ours
    assert f"pseudo-summaries of {text}" in ours
    theirs = run(capsys, "--check", exported["t5-1.0"], "--text", text)
    assert "Hugging Face folder" in theirs
    assert loss_printed(theirs) == loss_printed(ours)
    assert sorted(tmp_path.rglob("*")) == before


def test_pairs_are_measured_as_pairs(checkpoints, tmp_path: Path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"text": "天地玄黄", "summary": "天地"}, ensure_ascii=False) + "\n", encoding="utf-8")
    printed = run(capsys, "--check", checkpoints["hf-mt5"], "--text", pairs)
    assert f"1 pairs of {pairs}, 3 target tokens" in printed


def test_logits_of_another_scale_are_recognised(exported, text: Path, tmp_path: Path, capsys):
    """A port of T5 PEGASUS taken for an mT5: the logits lack their scale, here made large enough to matter."""

    def change(config, tensors):
        tensors["lm_head.weight"] *= 60

    port = copy_with(exported["hf-mt5"], tmp_path / "port", change)
    wrong = run(capsys, "--check", port, "--text", text)
    assert loss_printed(wrong) > 20
    assert "--numerics bert4keras" in wrong
    right = run(capsys, "--check", port, "--text", text, "--numerics", "bert4keras")
    assert loss_printed(right) < loss_printed(wrong) / 3
    assert "bert4keras (gated-gelu-erf, own head, logits × d_model^-0.5, relative bias in cross-attention)" in right


def test_a_model_that_knows_nothing_is_near_guessing(tmp_path: Path, text: Path, capsys):
    model = MODELS["hf-mt5"]
    parameters = draw_parameters(model)
    parameters["lm_head"] = np.zeros_like(parameters["lm_head"])
    checkpoint = save_imported(Imported(model, parameters, WordpieceTokenizer(WORDS)), tmp_path / "uniform")
    assert loss_printed(run(capsys, "--check", checkpoint, "--text", text)) == pytest.approx(math.log(24), abs=1e-4)


def test_a_text_without_examples_is_refused(checkpoints, tmp_path: Path):
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "天。"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no example can be made of pseudo-summaries of .*short\.jsonl"):
        convert.main(["--check", str(checkpoints["hf-mt5"]), "--text", str(short)])
    short.write_text("not JSON\n" * 3, encoding="utf-8")
    with pytest.raises(DataError, match=r"not valid JSON \(3\)"):
        convert.main(["--check", str(checkpoints["hf-mt5"]), "--text", str(short)])


def test_a_model_that_is_not_finite_is_not_called_good(exported, text: Path, tmp_path: Path, capsys):
    broken = copy_with(
        exported["hf-mt5"], tmp_path / "broken", lambda _, tensors: tensors["shared.weight"].fill(np.nan)
    )
    printed = run(capsys, "--check", broken, "--text", text)
    assert "nan nats" in printed
    assert "not finite" in printed
    assert "guessing" not in printed


def test_retokenize_writes_a_checkpoint_and_what_became_of_each_token(checkpoints, text: Path, tmp_path: Path, capsys):
    order = [0, 1, 2, 3, *range(23, 3, -1)]
    WordpieceTokenizer([*(WORDS[old] for old in order), "春"]).save(tmp_path / "tokenizer")
    source, output = checkpoints["hf-mt5"], tmp_path / "out"
    printed = run(capsys, source, output, "--retokenize", tmp_path / "tokenizer")
    assert "wordpiece 24 → wordpiece 25 tokens" in printed
    assert re.search(r"direct match +20 ", printed)
    assert "unknown: 春" in printed
    assert json.loads((output / "retokenize.json").read_text(encoding="utf-8"))["unknown"] == ["春"]
    info = load_checkpoint_info(output)
    assert info.config.model == dataclasses.replace(MODELS["hf-mt5"], vocab_size=25)
    assert load_tokenizer(output / "tokenizer").fingerprint == info.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["SOURCE"], "OUTPUT is missing"),
        (["SOURCE", "out", "--check"], "--check writes nothing"),
        (["SOURCE", "out", "--text", "x.jsonl"], "give --check"),
        (["SOURCE", "--check", "--retokenize", "t"], "retokenize first"),
        (["SOURCE", "--check", "--max-examples", "0"], "max_examples=0"),
        (["SOURCE", "out", "--numerics", "hf-mt5"], "--numerics is for a foreign source"),
        (["SOURCE", "out", "--tokenizer-path", "t"], "--tokenizer-path is for a foreign source"),
        (["HF", "out", "--lossy"], "--lossy is for an export"),
        (["SOURCE", "--check", "--lossy"], "--lossy is for an export"),
        (["SOURCE", "out", "--retokenize", "t", "--lossy"], "--lossy is for an export"),
    ],
)
def test_flags_that_mean_nothing_are_refused(checkpoints, exported, tmp_path: Path, monkeypatch, argv, message: str):
    monkeypatch.chdir(tmp_path)
    paths = {"SOURCE": str(checkpoints["hf-mt5"]), "HF": str(exported["hf-mt5"])}
    with pytest.raises(UsageError, match=message):
        convert.main([paths.get(argument, argument) for argument in argv])
