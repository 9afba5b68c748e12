"""A small checkpoint as training would leave it, and examples of its tokenizer."""

from pathlib import Path

import numpy as np
import pytest

from t5pegasus.checkpoint import CheckpointInfo, save_checkpoint
from t5pegasus.config import DataConfig, ModelConfig, RunConfig
from t5pegasus.data.records import pack_record, token_dtype
from t5pegasus.data.shard_files import save_array, shard_name, write_manifest, write_shard
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.optimizer import init_multipliers
from t5pegasus.train.state import TrainState, state_to_arrays

MODEL = ModelConfig(
    vocab_size=120, d_model=12, d_kv=4, d_ff=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
)  # fmt: skip
TOKENIZER_FINGERPRINT = "f" * 64


def write_checkpoint(path: Path, *, with_optimizer: bool) -> Path:
    random, specs = np.random.default_rng(0), declare_parameters(MODEL)

    def draw(scale: float) -> dict[str, np.ndarray]:
        return {name: np.float32(scale) * random.random(spec.shape, np.float32) for name, spec in specs.items()}

    parameters = {name: draw(1.0)[name] - np.float32(0 if spec.gain else 0.5) for name, spec in specs.items()}
    if with_optimizer:
        multipliers = {axis: type(one)(*map(np.asarray, one)) for axis, one in init_multipliers(specs).items()}
        state = TrainState(np.int32(30), np.uint32(240), parameters, draw(1e-2), draw(1e-4), multipliers)
    else:
        state = TrainState(np.int32(30), np.uint32(240), parameters, {}, {}, {})
    tokenizer = path.with_name(path.name + "-tokenizer")
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.txt").write_text("的\n", encoding="utf-8")
    config = RunConfig(model=MODEL, data=DataConfig(max_source_tokens=24, max_target_tokens=8))
    info = CheckpointInfo(
        config, 30, 240, "float32", TOKENIZER_FINGERPRINT, "e" * 64, history=({"step": 30, "loss": 2.0},)
    )
    save_checkpoint(path, state_to_arrays(state), info, tokenizer)
    return path


def write_examples(folder: Path, count: int, tokenizer_fingerprint: str = TOKENIZER_FINGERPRINT) -> Path:
    folder.mkdir(parents=True)
    random, dtype = np.random.default_rng(count), token_dtype(MODEL.vocab_size)
    examples = [(random.integers(3, 100, 9), random.integers(3, 100, 4)) for _ in range(count)]
    shard = write_shard(folder / shard_name(0, 1), (pack_record(*example, dtype) for example in examples))
    save_array(folder / "lengths.npy", np.array([[9, 4]] * count, np.int32))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("的\n", encoding="utf-8")
    write_manifest(
        folder, shards=[shard], config={}, documents={}, num_unknown_tokens=0, vocab_size=MODEL.vocab_size,
        tokenizer_fingerprint=tokenizer_fingerprint, pad_id=MODEL.pad_token_id, start_id=MODEL.decoder_start_token_id,
        end_id=MODEL.eos_token_id,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "30", with_optimizer=True)


@pytest.fixture(scope="session")
def converted_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("converted") / "parameters", with_optimizer=False)


@pytest.fixture(scope="session")
def examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_examples(tmp_path_factory.mktemp("data") / "examples", count=40)
    write_examples(folder / "heldout", count=10)
    return folder


@pytest.fixture(scope="session")
def foreign_examples_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("foreign") / "examples", 10, tokenizer_fingerprint="a" * 64)
