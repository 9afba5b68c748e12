import dataclasses
import io
import json
import shutil
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from launch.cli import main
from t5pegasus.checkpoint import CheckpointInfo, load_checkpoint_info, save_checkpoint
from t5pegasus.config import DataConfig, ModelConfig, RunConfig
from t5pegasus.data.records import Example
from t5pegasus.errors import DataError
from t5pegasus.evaluate import DEFINITIONS, score_pairs
from t5pegasus.evaluate.heldout import measure_heldout_loss
from t5pegasus.model.t5 import bind, init_parameters
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

PAIRS = [
    {"id": "a", "text": "新图书馆今天开馆。首日读者很多。", "summary": "图书馆开馆"},
    {"text": "地铁三号线东延段开始试运行。全长九公里。设六座车站。", "summary": "地铁东延段试运行"},
    {"text": "没有摘要的文章。", "summary": " "},
    {"text": "果园里的苹果熟了。农民忙着采摘。", "summary": "苹果熟了"},
]


@pytest.fixture(scope="module")
def run_path(tmp_path_factory):
    """A run folder with one checkpoint of a random model."""
    root = tmp_path_factory.mktemp("evaluate")
    characters = sorted(set("".join(pair["text"] + pair["summary"] for pair in PAIRS)) - {" "})
    tokenizer = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters])
    tokenizer.save(root / "tokenizer")
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=2, eos_token_id=3,
    )  # fmt: skip
    info = CheckpointInfo(
        config=RunConfig(model=model, data=DataConfig(48, 16)),
        step=7,
        rows=56,
        compute_dtype="float32",
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    parameters = jax.jit(init_parameters, static_argnums=0)(model, 0)
    arrays = {f"parameters.{name}": np.asarray(array) for name, array in parameters.items()}
    save_checkpoint(root / "run" / "checkpoints" / "7", arrays, info, root / "tokenizer")
    return root / "run"


@pytest.fixture
def pairs_path(tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in PAIRS), encoding="utf-8")
    return path


def read_lines(text):
    return [json.loads(line) for line in text.split("\n") if line.startswith("{")]


def test_heldout_loss_is_the_mean_over_all_target_tokens(run_path):
    config = load_checkpoint_info(run_path / "checkpoints" / "7").config
    parameters = jax.jit(init_parameters, static_argnums=0)(config.model, 0)
    random = np.random.default_rng(2)
    draw = lambda count: random.integers(4, config.model.vocab_size, count).astype(np.int32)  # noqa: E731
    examples = [Example(draw(source), draw(target)) for source, target in ((5, 3), (40, 16), (20, 7), (9, 1))]
    # Here every example has a row of its own; there they are packed.
    sources, targets = (np.stack([np.pad(side, (0, 40 - len(side))) for side in sides]) for sides in zip(*examples))
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=config.model.decoder_start_token_id)

    @jax.jit
    def compute_logits(parameters):
        model = bind(config.model, parameters)
        segments = (sources > 0).astype(np.int32)
        positions = np.arange(inputs.shape[1])[None], np.arange(sources.shape[1])[None]
        encoded = model.encode(sources, segments)
        return model.decode(inputs, np.ones_like(inputs), encoded, segments, positions=positions)

    losses = -jax.nn.log_softmax(compute_logits(parameters))
    losses = np.take_along_axis(np.asarray(losses), targets[..., None], axis=-1)[..., 0][targets > 0]
    for batch_size in (1, 4):
        measured = measure_heldout_loss(config, parameters, examples, batch_size)
        assert measured["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    highest = max(int(example.target.max()) for example in examples)
    num_masked = config.model.vocab_size - highest
    masked = dataclasses.replace(config, model=dataclasses.replace(config.model, num_masked_tokens=num_masked))
    with pytest.raises(DataError, match=f"held-out examples: the target of example . holds token {highest}"):
        measure_heldout_loss(masked, parameters, examples, 1)


def test_evaluate_writes_scores_and_summaries_into_the_run(run_path, pairs_path, capsys):
    assert main(["evaluate", str(run_path), "--pairs-path", str(pairs_path), "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    scores = json.loads((run_path / "scores.json").read_text(encoding="utf-8"))
    records = read_lines((run_path / "summaries.jsonl").read_text(encoding="utf-8"))
    assert scores["num_pairs"] == 3
    assert scores["dropped"] == {"empty summary": 1}
    assert scores["step"] == 7
    assert scores["num_truncated"] == 0
    assert set(scores["definitions"]) == {*DEFINITIONS, "model", "lead", "copied_percent"}
    references = [record["reference"] for record in records]
    leads = [record["source"].split("。")[0] + "。" for record in records]
    wanted = {
        "model": score_pairs(references, [record["summary"] for record in records]),
        "lead": score_pairs(references, leads),
    }
    for system, figures in wanted.items():
        found = scores["systems"][system]["scores"]
        assert {name: found[name]["value"] for name in figures} == figures
        assert all(found[name]["low"] <= figures[name] + 1e-9 for name in figures)
    for name, interval in scores["difference_from_lead"].items():
        assert interval["value"] == pytest.approx(wanted["model"][name] - wanted["lead"][name])
    assert scores["systems"]["lead"]["mean_characters"] == pytest.approx(sum(map(len, leads)) / 3)
    assert [record["id"] for record in records] == ["a", "dev.jsonl:2", "dev.jsonl:4"]
    for record in records:
        own = score_pairs([record["reference"]], [record["summary"]])
        assert record["scores"] == pytest.approx({name: own[name] for name in record["scores"]}, abs=1e-4)
    for found in scores["lengths"].values():
        assert sum(part["num_pairs"] for part in found) == 3
    assert f"{scores['heldout_loss']:.4f}" in printed
    assert all(f"{figure:.2f}" in printed for figure in wanted["lead"].values())
    assert max(map(len, printed.split("\n\nscores: ")[0].split("\n")[1:])) <= 100
    assert "empty summary" in printed
    assert str(run_path / "scores.json") in printed
    # The checkpoint is left as its manifest says, and evaluates again; beside it, if it is in no run.
    assert (
        main(["evaluate", str(run_path), "--pairs-path", str(pairs_path), "--batch-size", "2", "--max-examples", "1"])
        == 0
    )
    assert json.loads((run_path / "scores.json").read_text(encoding="utf-8"))["num_pairs"] == 1


def test_scores_of_a_lone_checkpoint_lie_beside_it(run_path, pairs_path, tmp_path, capsys):
    lone = tmp_path / "grown"
    shutil.copytree(run_path / "checkpoints" / "7", lone)
    with pairs_path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": PAIRS[0]["text"] * 9, "summary": "图书馆"}, ensure_ascii=False) + "\n")
    assert main(["evaluate", str(lone), "--pairs-path", str(pairs_path), "--batch-size", "2", "--num-beams", "2"]) == 0
    assert json.loads((tmp_path / "grown.scores" / "scores.json").read_text(encoding="utf-8"))["num_truncated"] == 1
    printed = capsys.readouterr().out
    assert "cut off: 1 texts" in printed
    assert main(["report", str(tmp_path / "grown.scores")]) == 0


def test_the_oracle_takes_the_best_of_the_candidates(run_path, pairs_path, tmp_path, capsys):
    drawn = ["--temperature", "1", "--num-return", "8", "--max-new-tokens", "3", "--batch-size", "2"]
    arguments = ["evaluate", str(run_path), "--pairs-path", str(pairs_path), "--output-path", str(tmp_path)]
    assert main([*arguments, *drawn]) == 0
    assert "oracle: of the candidates" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    records = read_lines((tmp_path / "summaries.jsonl").read_text(encoding="utf-8"))
    references = [record["reference"] for record in records]
    assert all(1 < len(record["candidates"]) <= 8 for record in records)
    assert [record["summary"] for record in records] == [record["candidates"][0] for record in records]
    best = [
        max(score_pairs([reference], [text])["rouge-l"] for text in record["candidates"])
        for reference, record in zip(references, records)
    ]
    figures = {system: scores["systems"][system]["scores"]["rouge-l"]["value"] for system in ("model", "oracle")}
    assert figures["oracle"] == pytest.approx(np.mean(best))
    assert figures["model"] < figures["oracle"]
    assert scores["generation"]["num_return"] == 8


def test_pairs_without_any_use_are_bad_data(run_path, tmp_path, capsys):
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": "文章。", "summary": ""}\n', encoding="utf-8")
    assert main(["evaluate", str(run_path), "--pairs-path", str(path)]) == 44
    assert "1 empty summary" in capsys.readouterr().err


def test_summarize_reads_json_lines_or_text_from_file_or_stdin(run_path, pairs_path, tmp_path, capsys, monkeypatch):
    arguments = ["summarize", str(run_path), "--batch-size", "2"]
    assert main([*arguments, "--input", str(pairs_path)]) == 0
    from_json = read_lines(capsys.readouterr().out)
    assert [set(record) for record in from_json] == [{"id", "summary"}, {"summary"}, {"summary"}, {"summary"}]
    assert from_json[0]["id"] == "a"
    text = "".join(pair["text"] + "\n" for pair in PAIRS)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text.encode("utf-8"))))
    assert main(arguments) == 0
    from_stdin = read_lines(capsys.readouterr().out)
    assert [record["summary"] for record in from_stdin] == [record["summary"] for record in from_json]


def test_summarize_refuses_what_it_cannot_do(run_path, tmp_path, capsys):
    assert main(["summarize", str(run_path), "--num-beams", "2", "--temperature", "1"]) == 2
    assert "num_beams=2" in capsys.readouterr().err
    assert main(["summarize", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": 5}\n', encoding="utf-8")
    assert main(["summarize", str(run_path), "--input", str(path)]) == 44
    assert '"text" is 5' in capsys.readouterr().err
