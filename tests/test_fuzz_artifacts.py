"""Every reader of artifacts is given files that changed since they were written: read, or refused in words."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from mutations import RANDOM, mutate, mutate_json_bytes, read_or_refuse

from t5pegasus.checkpoint import CheckpointInfo, find_checkpoint, load_arrays, load_checkpoint_info, save_checkpoint
from t5pegasus.config import DataConfig, ModelConfig, RunConfig
from t5pegasus.convert.hf import read_hf
from t5pegasus.convert.hf_config import model_to_hf_config
from t5pegasus.convert.hf_tensors import list_hf_tensors
from t5pegasus.data.packing import load_packing
from t5pegasus.data.records import pack_record, token_dtype
from t5pegasus.data.shard_files import save_array, shard_name, write_manifest, write_shard
from t5pegasus.data.shards import ExampleShards
from t5pegasus.json_files import SCHEMA, write_json
from t5pegasus.report import write_report
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer
from t5pegasus.train.metrics import read_metrics
from t5pegasus.train.run import load_run_record

TOKENIZER = WordpieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"一二三四五六七八九十"])
MODEL = ModelConfig(
    vocab_size=14, d_model=8, d_kv=4, d_ff=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip
CONFIG = RunConfig(model=MODEL, data=DataConfig(8, 4))
few = settings(max_examples=60)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "examples"
    TOKENIZER.save(folder / "tokenizer")
    pairs = [([4 + i % 9, 5, 3], [4 + i % 9, 3]) for i in range(20)]
    dtype = token_dtype(14)
    shard = write_shard(folder / shard_name(0, 1), (pack_record(*pair, dtype) for pair in pairs))
    save_array(folder / "lengths.npy", np.array([[3, 2]] * 20, np.int32))
    write_manifest(
        folder, shards=[shard], config={}, documents={}, num_unknown_tokens=0, vocab_size=14,
        tokenizer_fingerprint=TOKENIZER.fingerprint, pad_id=0, start_id=2, end_id=3,
    )  # fmt: skip
    with ExampleShards(folder) as shards:
        load_packing(shards, CONFIG.data)
    return folder


@pytest.fixture(scope="module")
def run(examples):
    folder = examples.parent / "run"
    info = CheckpointInfo(CONFIG, 4, 16, "float32", TOKENIZER.fingerprint, history=({"step": 4, "loss": 2.0},))
    save_checkpoint(folder / "checkpoints" / "4", {"parameters.x": np.arange(6.0)}, info, examples / "tokenizer")
    paths = {"examples_path": str(examples), "heldout_path": None, "start_from": None}
    write_json(folder / "config.json", {"schema": SCHEMA, "config": CONFIG.to_json(), **paths})
    records = [{"kind": "train", "step": step, "loss": 3.0, "tokens_per_second": 9.5} for step in (1, 2)]
    records.append({"kind": "evaluate", "step": 4, "loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rouge = {"rouge-1": 9.0, "rouge-2": 8.0, "rouge-l": 7.0}
    write_json(folder / "scores.json", {"schema": SCHEMA, "num_pairs": 1, "rouge": {"model": rouge, "lead": rouge}})
    line = json.dumps({"source": "一二", "reference": "一", "summary": "二", "rouge-l": 0.5})
    (folder / "summaries.jsonl").write_text(line + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "hf"
    TOKENIZER.save(folder)
    write_json(folder / "config.json", model_to_hf_config(MODEL))
    tensors = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in list_hf_tensors(MODEL)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


class Changed:
    """A file with other content while the block runs."""

    def __init__(self, path: Path, random) -> None:
        self.path, self.good = path, path.read_bytes()
        self.content = (mutate_json_bytes if path.suffix == ".json" else mutate)(self.good, random)

    def __enter__(self) -> None:
        self.path.write_bytes(self.content)

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(self.good)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def read_examples(folder):
    with ExampleShards(folder) as shards:
        shards.verify()
        table = load_packing(shards, CONFIG.data)
        assert sorted(table.examples.tolist()) == list(range(20))
        assert [len(example.source) for example in shards.read(range(20))] == [3] * 20


@few
@given(random=RANDOM)
def test_examples_are_read_as_they_were_written_or_refused(examples, random):
    read_examples(examples)
    with Changed(random.choice(files_of(examples)), random):
        read_or_refuse(read_examples, examples)


@few
@given(random=RANDOM)
def test_a_checkpoint_is_read_as_it_was_written_or_refused(run, random):
    def read(path):
        assert load_arrays(find_checkpoint(path))["parameters.x"].tolist() == [0, 1, 2, 3, 4, 5]
        assert load_checkpoint_info(path).config == CONFIG

    path = run / "checkpoints" / "4"
    with Changed(random.choice(files_of(path)), random):
        read_or_refuse(read, path)


@few
@given(random=RANDOM)
def test_the_description_alone_is_read_or_refused(run, random):
    with Changed(run / "checkpoints" / "4" / "checkpoint.json", random):
        read_or_refuse(load_checkpoint_info, run / "checkpoints" / "4")


@few
@given(random=RANDOM)
def test_the_record_of_a_run(run, random):
    with Changed(run / "config.json", random):
        read_or_refuse(load_run_record, run)


@few
@given(random=RANDOM)
def test_metrics(run, random):
    with Changed(run / "metrics.jsonl", random):
        for record in read_metrics(run / "metrics.jsonl"):
            assert isinstance(record["step"], int)


@few
@given(random=RANDOM)
def test_the_page_about_a_run(run, random):
    names = ("config.json", "metrics.jsonl", "scores.json", "summaries.jsonl", "checkpoints/4/checkpoint.json")
    with Changed(run / random.choice(names), random):
        read_or_refuse(write_report, [run], run / "report.html")


@few
@given(random=RANDOM)
def test_a_hugging_face_folder(hugging_face, random):
    with Changed(hugging_face / random.choice(("config.json", "model.safetensors")), random):
        read_or_refuse(read_all, hugging_face)


def read_all(folder):
    """Tensors may be read when they are asked for."""
    foreign = read_hf(folder)
    assert dataclasses.is_dataclass(foreign.model)
    for array in foreign.parameters.values():
        np.asarray(array)
