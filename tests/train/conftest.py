"""A folder of small random examples that a tiny model can learn from, and the config of a run on it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.data.records import pack_record, token_dtype
from t5pegasus.data.shard_files import save_array, shard_name, write_manifest, write_shard
from t5pegasus.presets import tiny

VOCAB_SIZE, START, END = 128, 101, 102


def write_examples(folder: Path, count: int, seed: int, tokenizer_fingerprint: str = "f" * 64) -> Path:
    """Sources that count upwards modulo 40; targets repeat their first tokens."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        source = (rng.integers(0, 40) + np.arange(rng.integers(4, 14))) % 40 + 3
        examples.append((np.append(source, END), np.append(source[: rng.integers(2, 4)], END)))
    dtype = token_dtype(VOCAB_SIZE)
    shard = write_shard(folder / shard_name(0, 1), (pack_record(*example, dtype) for example in examples))
    save_array(folder / "lengths.npy", np.array([[len(s), len(t)] for s, t in examples], np.int32))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("…", encoding="utf-8")
    write_manifest(
        folder, shards=[shard], config={}, documents={}, num_unknown_tokens=0, vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint=tokenizer_fingerprint, pad_id=0, start_id=START, end_id=END,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_examples(tmp_path_factory.mktemp("data") / "examples", count=120, seed=0)
    write_examples(folder / "heldout", count=30, seed=1)
    return folder


@pytest.fixture(scope="session")
def foreign_heldout_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out examples of another tokenizer."""
    return write_examples(tmp_path_factory.mktemp("data") / "foreign", count=30, seed=1, tokenizer_fingerprint="e" * 64)


@pytest.fixture(scope="session")
def many_examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_examples(tmp_path_factory.mktemp("data") / "many", count=2000, seed=0)
    write_examples(folder / "heldout", count=100, seed=1)
    return folder


@pytest.fixture(scope="session")
def run_config() -> RunConfig:
    return RunConfig(
        model=dataclasses.replace(tiny().model, vocab_size=VOCAB_SIZE, dropout_rate=0.1),
        data=DataConfig(max_source_tokens=24, max_target_tokens=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        mesh=MeshConfig(),
        train=TrainConfig(
            steps=8, batch_size=8, log_every_steps=1, evaluate_every_steps=4, save_every_steps=4, keep_checkpoints=2
        ),
    )
