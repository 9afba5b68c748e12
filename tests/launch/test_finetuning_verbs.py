"""Fine-tuning through its commands: the best by a score of summaries, longer inputs, few-shot tables."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

import t5pegasus.manifest
from launch.attempts import read_attempt
from launch.recipes.few_shot import choose_pairs, summarise_cells
from launch.staging import local_checkpoint
from launch.verbs import few_shot, finetune, pretrain
from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    find_last_good,
    list_checkpoints,
    load_checkpoint_info,
    save_checkpoint,
)
from t5pegasus.checkpoint.folder import is_chunk
from t5pegasus.config import DataConfig, ModelConfig, RunConfig
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.evaluate import DEFINITIONS
from t5pegasus.json_files import read_json
from t5pegasus.model.t5 import init_parameters
from t5pegasus.text.read import Document
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer
from t5pegasus.train.metrics import read_metrics

CHARACTERS = "东西南北城区路桥站馆园校医院市场今明早晚雨晴开闭修建"


def write_pairs(path, count, seed):
    """Texts of 60 to 90 characters whose first four are the summary."""
    draw = random.Random(seed)
    texts = ["".join(draw.choices(CHARACTERS, k=draw.randint(60, 90))) for _ in range(count)]
    lines = [json.dumps({"text": text, "summary": text[:4]}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return {name: write_pairs(folder / f"{name}.jsonl", *of) for name, of in {"train": (40, 0), "dev": (6, 1)}.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model that claims to have been trained on sources of 16 tokens."""
    root = tmp_path_factory.mktemp("source")
    tokenizer = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted(set(CHARACTERS))])
    tokenizer.save(root / "tokenizer")
    model = ModelConfig(
        vocab_size=tokenizer.vocab_size, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_encoder_layers=1,
        num_decoder_layers=1, dropout_rate=0.0, decoder_start_token_id=2, eos_token_id=3,
        relative_attention_num_buckets=8, relative_attention_max_distance=16,
    )  # fmt: skip
    info = CheckpointInfo(RunConfig(model=model, data=DataConfig(16, 8)), 7, 56, "float32", tokenizer.fingerprint)
    parameters = jax.jit(init_parameters, static_argnums=0)(model, 0)
    arrays = {f"parameters.{name}": np.asarray(array) for name, array in parameters.items()}
    save_checkpoint(root / "checkpoint", arrays, info, root / "tokenizer")
    return root / "checkpoint"


def test_it_keeps_the_best_by_a_score_of_summaries_of_sources_longer_than_in_pretraining(
    checkpoint, pairs, tmp_path, capsys
):
    run_path = tmp_path / "run"
    command = [
        str(checkpoint), "--train-path", str(pairs["train"]), "--heldout-path", str(pairs["dev"]),
        "--run-path", str(run_path), "--epochs", "3", "--data.max-source-tokens", "96", "--data.max-target-tokens", "8",
        "--train.batch-size", "8", "--train.evaluate-every-steps", "4", "--train.save-every-steps", "100",
        "--train.keep-checkpoints", "1", "--keep-best", "rouge-1", "--train.max-scored-pairs", "4",
        "--optimizer.learning-rate", "0.01", "--optimizer.warmup-steps", "1", "--optimizer.freeze", "*.relative_bias",
        "--mesh.fsdp", "2", "--mesh.tensor", "2",
    ]  # fmt: skip
    finetune.main(command)
    printed = capsys.readouterr().out
    best, last = find_checkpoint(run_path), find_last_good(run_path)
    info = load_checkpoint_info(last)
    assert info.config.data.max_source_tokens == 96 > load_checkpoint_info(checkpoint).config.data.max_source_tokens
    assert info.config.train.max_scored_pairs == 4
    scores = {entry["step"]: entry["rouge-1"] for entry in info.history}
    marked = [entry["step"] for entry in info.history if entry.get("best")]
    assert scores.keys() == {0, 4, 8, 12, 15}
    assert int(best.name) == marked[-1]
    assert scores[marked[-1]] == max(list(scores.values())[1:])
    assert {path.name for path in list_checkpoints(run_path)} == {best.name, last.name}
    assert f"best rouge-1: {scores[marked[-1]]:.2f} % at step {best.name}" in printed
    assert f"checkpoint: {best}" in printed
    finetune.main(command)
    assert capsys.readouterr().out == printed


def test_to_know_a_checkpoints_config_no_array_is_read(checkpoint, monkeypatch):
    read, describe = [], t5pegasus.manifest._describe_file
    monkeypatch.setattr(t5pegasus.manifest, "_describe_file", lambda path: read.append(path) or describe(path))
    config, _ = pretrain._choose_config(None, None, checkpoint)
    assert config == load_checkpoint_info(checkpoint).config
    assert local_checkpoint(checkpoint, arrays=False) == checkpoint
    names = {str(path.relative_to(checkpoint)) for path in read}
    assert "checkpoint.json" in names
    assert not any(is_chunk(name) for name in names)


@pytest.mark.slow
def test_two_processes_write_and_score_the_summaries_of_one(checkpoint, pairs, tmp_path):
    command = [
        "finetune", str(checkpoint), "--train-path", str(pairs["train"]), "--heldout-path", str(pairs["dev"]),
        "--epochs", "1", "--data.max-source-tokens", "96", "--data.max-target-tokens", "8", "--train.batch-size", "8",
        "--train.evaluate-every-steps", "3", "--train.sample-every-steps", "3", "--train.num-samples", "5",
        "--keep-best", "rouge-1", "--mesh.fsdp", "2", "--run-path",
    ]  # fmt: skip
    finetune.main([*command[1:], str(tmp_path / "one")])
    launched = ["launch", "local", "--processes", "2", "--", *command, str(tmp_path / "two")]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *launched], check=False, capture_output=True, text=True, timeout=280,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        [
            record
            for record in read_metrics(tmp_path / name / "metrics.jsonl")
            if record["kind"] in ("heldout", "sample")
        ]
        for name in ("one", "two")
    )
    assert [record["kind"] for record in one] == [record["kind"] for record in two]
    assert any(sample["summary"] for record in one for sample in record.get("samples", ()))
    for ours, theirs in zip(two, one):
        assert ours.get("samples") == theirs.get("samples")
        assert ours.get("rouge-1") == theirs.get("rouge-1")
        assert ours.get("loss", 0.0) == pytest.approx(theirs.get("loss", 0.0), rel=1e-5)


def test_it_says_why_it_stopped_early(checkpoint, pairs, tmp_path, capsys):
    finetune.main([
        str(checkpoint), "--train-path", str(pairs["train"]), "--heldout-path", str(pairs["dev"]),
        "--run-path", str(tmp_path / "run"), "--epochs", "3", "--train.batch-size", "8", "--keep-best", "loss",
        "--patience", "2", "--train.evaluate-every-steps", "1", "--train.save-every-steps", "100",
        "--data.max-source-tokens", "96", "--data.max-target-tokens", "8", "--optimizer.learning-rate", "1e-30",
    ])  # fmt: skip
    assert "stopped at step 3 of 15: loss did not improve in 2 evaluations\n" in capsys.readouterr().out


def test_pairs_that_cannot_be_used_are_counted_and_so_are_those_cut_off(checkpoint, pairs, tmp_path, capsys):
    lines = pairs["train"].read_text(encoding="utf-8").splitlines()[:4]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join([*lines, '{"text": "东西', json.dumps({"text": "东" * 10, "summary": "北"})]) + "\n")
    command = [str(checkpoint), "--train-path", str(path), "--run-path", str(tmp_path / "run"), "--keep-best", "loss"]
    with pytest.raises(UsageError, match="needs held-out examples"):
        finetune.main([*command, "--data.max-source-tokens", "32", "--data.max-target-tokens", "5"])
    said = capsys.readouterr().err
    assert f"{path}: 5 of 6 pairs, 1 left out: not valid JSON; cut off where longer: 4 texts at 32 tokens" in said


def test_what_goes_wrong_with_the_pairs_is_in_the_record_of_the_attempt(checkpoint, pairs, tmp_path, monkeypatch):
    """The watchdog of the other processes reads it there, and so does who asks why the job ended."""

    def fail(*_):
        raise OSError(5, "the disk fails")

    monkeypatch.setattr("t5pegasus.corpus.build.build_examples", fail)
    with pytest.raises(OSError, match="the disk fails"):
        finetune.main([str(checkpoint), "--train-path", str(pairs["train"]), "--run-path", str(tmp_path / "run")])
    ended = read_attempt(tmp_path / "run", 1)[0]["ended"]
    assert (ended["code"], ended["how"], ended["message"]) == (46, "failed", "[Errno 5] the disk fails")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep-best", "rouge-3"], "keep_best='rouge-3' is no score; perhaps you meant 'rouge-"),
        (["--keep-best", "bleu"], "keep_best='bleu' scores summaries of held-out pairs; give --heldout-path PAIRS"),
        (["--patience", "2"], "patience=2 counts evaluations .* keep_best=None must name the score"),
    ],
)
def test_what_cannot_be_kept_is_said_before_training(checkpoint, pairs, tmp_path, flags, message):
    with pytest.raises(UsageError, match=message):
        finetune.main([str(checkpoint), "--train-path", str(pairs["train"]), "--run-path", str(tmp_path), *flags])
    assert not (tmp_path / "config.json").exists()


def documents(*texts):
    return [Document(str(number), text, title=text[:1]) for number, text in enumerate(texts)]


def test_smaller_sets_are_part_of_larger_ones_whatever_the_order_of_the_file():
    everything = documents(*(f"{number} 篇" for number in range(5000)))
    ten, hundred = (choose_pairs(everything, size, (0, 1)) for size in (10, 100))
    for seed in (0, 1):
        assert [pair.text for pair in hundred[seed][:10]] == [pair.text for pair in ten[seed]]
    assert {pair.text for pair in ten[0]} != {pair.text for pair in ten[1]}
    again = choose_pairs(reversed([*everything, *everything]), 100, (1,))
    assert [pair.text for pair in again[1]] == [pair.text for pair in hundred[1]]
    assert len({pair.text for pair in hundred[0]}) == 100


def test_a_table_is_mean_and_sample_deviation():
    cells = [{"size": 10, "seed": seed, "scores": {"x": value}} for seed, value in enumerate((1.0, 2.0, 4.0))]
    table = summarise_cells([{"size": 0, "seed": None, "scores": {"x": 5.0}}, *cells], ["x"])
    assert table[0] == {"x": {"mean": 5.0, "seeds": 1}}
    assert table[10]["x"] == {"mean": np.mean([1, 2, 4]), "std": pytest.approx(np.std([1, 2, 4], ddof=1)), "seeds": 3}
    assert few_shot.format_table(table, ("x",)).split("\n")[1:] == [
        f"{0:>7}{'5.00':>16}",
        f"{10:>7}{'2.33 ± 1.53':>16}",
    ]


def test_few_shot_makes_a_table_once_and_then_only_what_is_missing(checkpoint, pairs, tmp_path, capsys, monkeypatch):
    output_path = tmp_path / "few"

    def command(*sizes, train="train"):
        return [
            str(checkpoint), "--train-path", str(pairs[train]), "--heldout-path", str(pairs["dev"]), "--output-path",
            str(output_path), "--sizes", *map(str, sizes), "--seeds", "0", "1", "--updates", "3", "--train.batch-size",
            "8", "--data.max-source-tokens", "96", "--data.max-target-tokens", "8", "--scores", "rouge-1",
        ]  # fmt: skip

    few_shot.main(command(4))
    printed = capsys.readouterr().out
    result = read_json(output_path / "few_shot.json")
    assert [(cell["size"], cell["seed"]) for cell in result["cells"]] == [(0, None), (4, 0), (4, 1)]
    assert result["cells"][0]["scores"].keys() == {"heldout-loss", *DEFINITIONS}
    losses = [cell["scores"]["heldout-loss"] for cell in result["cells"]]
    assert result["table"]["4"]["heldout-loss"]["mean"] == pytest.approx(np.mean(losses[1:]))
    config = RunConfig.from_json(read_json(output_path / "size-4-seed-1" / "run" / "config.json")["config"])
    assert (config.train.seed, config.data.seed, config.train.steps) == (1, 1, 3)
    first = output_path / "size-4-seed-0" / "run"
    start, end = (json.loads(line) for line in (first / "metrics.jsonl").read_text().split("\n") if '"heldout"' in line)
    # Without training, one device and eight agree but for rounding.
    assert (start["loss"], end["loss"]) == (pytest.approx(losses[0], abs=1e-5), losses[1])
    assert not (first / "checkpoints").exists()
    assert "rouge-1" in printed
    assert f"results: {output_path / 'few_shot.json'}" in printed

    made = []
    few_shot_run = few_shot_module().train_run
    monkeypatch.setattr(
        few_shot_module(), "train_run", lambda *a, **k: made.append(a[1].run_path) or few_shot_run(*a, **k)
    )
    few_shot.main(command(4))
    assert (made, capsys.readouterr().out) == ([], printed)
    few_shot.main(command(2, 4))
    assert made == [output_path / f"size-2-seed-{seed}" / "run" for seed in (0, 1)]
    for seed in (0, 1):
        small, large = ((output_path / f"size-{size}-seed-{seed}" / "train.jsonl").read_text() for size in (2, 4))
        assert large.startswith(small)
    with pytest.raises(ArtifactError, match=r"size-4-seed-0/cell.json was made with the training set of .*; choose"):
        few_shot.main(command(4, train="dev"))
    with pytest.raises(ArtifactError, match=r"size-0/cell.json was made with train.steps=3, got 4; choose another"):
        few_shot.main([*command(4), "--updates", "4"])
    with pytest.raises(UsageError, match=r"wants 41 different pairs, .*train.jsonl holds 40 that can be used"):
        few_shot.main(command(4, 41))


def few_shot_module():
    import launch.recipes.few_shot

    return launch.recipes.few_shot


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "10", "10"], r"sizes=\(10, 10\) must be different whole numbers from 1 on"),
        (["--updates", "0"], "updates=0 must be at least 1"),
        (["--scores", "rouge-9"], "'rouge-9' is no score; perhaps you meant 'rouge-"),
    ],
)
def test_few_shot_settings_that_cannot_work_say_so(checkpoint, pairs, tmp_path, flags, message):
    paths = ["--train-path", str(pairs["train"]), "--heldout-path", str(pairs["dev"]), "--output-path", str(tmp_path)]
    with pytest.raises(UsageError, match=message):
        few_shot.main([str(checkpoint), *paths, *flags])


def test_defaults_of_few_shot_are_finetunes_with_few_pairs_in_mind():
    wanted = dataclasses.asdict(finetune.DEFAULT_OPTIMIZER) | {"warmup_steps": 0}
    assert dataclasses.asdict(few_shot.OptimizerFlags()) == wanted
