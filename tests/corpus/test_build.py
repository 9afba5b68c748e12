"""Laws of a build: nothing is lost, and the bytes depend on input, tokenizer and configuration alone."""

import dataclasses
import fcntl
import functools
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import zstandard

from t5pegasus.corpus import exchange, units
from t5pegasus.corpus.build import BuildConfig, build_examples, describe_drops
from t5pegasus.corpus.engines import run_tasks
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, DataError, T5PegasusError, UsageError
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer

CHARACTERS = [chr(0x4E00 + 7 * index) for index in range(600)]
CONFIG = BuildConfig(max_source_tokens=256, max_target_tokens=96, heldout_documents=9, seed=5)


def random_document(random):
    sentences = ["".join(random.choice(CHARACTERS, random.integers(16, 30))) for _ in range(random.integers(6, 12))]
    return "。".join(sentences) + "。"


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [random_document(random) for _ in range(200)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "。", *CHARACTERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    adopt_vocabulary(folder / "vocab.txt").save(folder / "saved")
    return folder / "saved"


def write_json_lines(path, records):
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(content.encode()) if path.suffix == ".gz" else content.encode())
    return path


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    records = [{"id": f"d{index}", "text": text} for index, text in enumerate(texts)]
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", records)


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "MAX_UNIT_CHARACTERS", 4000)


def read_tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def reference(corpus, tokenizer_path, tmp_path_factory):
    """The examples of an uninterrupted build in one process."""
    output = tmp_path_factory.mktemp("reference") / "examples"
    assert build_examples([corpus], tokenizer_path, output, CONFIG, num_workers=1)
    return output


def all_examples(folder):
    with ExampleShards(folder) as shards:
        shards.verify()
        return [(tuple(source.tolist()), tuple(target.tolist())) for source, target in shards.read(range(len(shards)))]


def test_examples_hold_every_character_of_the_documents(reference, texts):
    tokenizer = load_tokenizer(reference / "tokenizer")
    held = all_examples(reference / "heldout")
    examples = all_examples(reference) + held
    assert len(held) == CONFIG.heldout_documents  # each of these documents is one chunk
    assert len(examples) == len(set(examples)) == len(texts)
    parts = [tokenizer.decode(list(source)) + tokenizer.decode(list(target)) for source, target in examples]
    assert Counter(map("".join, map(sorted, parts))) == Counter(map("".join, map(sorted, texts)))
    assert all(len(source) >= len(target) and target[-1] == tokenizer.end_id for source, target in examples)


def test_the_manifest_accounts_for_every_document(reference, texts):
    manifest = json.loads((reference / "manifest.json").read_text(encoding="utf-8"))
    documents = manifest["documents"]
    assert documents["read"] == len(texts) == documents["kept"] + documents["heldout"]
    assert documents["dropped"] == {}
    assert documents["bytes"] == sum(len(text.encode()) for text in texts)
    lengths = np.load(reference / "lengths.npy")
    assert manifest["num_examples"] == len(lengths) == sum(manifest["length_histograms"]["source"])
    assert [manifest["num_source_tokens"], manifest["num_target_tokens"]] == lengths.sum(axis=0).tolist()
    assert manifest["num_unknown_tokens"] == 0


def test_workers_and_unit_borders_do_not_change_a_byte(corpus, tokenizer_path, reference, tmp_path, monkeypatch):
    build_examples([corpus], tokenizer_path, tmp_path / "two", CONFIG, num_workers=2)
    assert read_tree(tmp_path / "two") == read_tree(reference)
    monkeypatch.setattr(units, "MAX_UNIT_CHARACTERS", 777)
    build_examples([corpus], tokenizer_path, tmp_path / "cut", CONFIG, num_workers=1)
    assert read_tree(tmp_path / "cut") == read_tree(reference)
    assert not list(tmp_path.glob(".*"))


def test_shards_are_slices_of_one_global_order(corpus, tokenizer_path, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "TOKENS_PER_SHARD", 3000)
    build_examples([corpus], tokenizer_path, tmp_path / "many", CONFIG, num_workers=1)
    assert len(list((tmp_path / "many").glob("examples-*"))) > 5
    assert all_examples(tmp_path / "many") == all_examples(reference)


def test_files_and_their_order_change_nothing_but_the_account(texts, tokenizer_path, reference, tmp_path):
    records = [{"id": f"d{index}", "text": text} for index, text in enumerate(texts)]
    first = write_json_lines(tmp_path / "a.jsonl.gz", records[:90])
    second = write_json_lines(tmp_path / "b.jsonl", records[90:])
    build_examples([second, first], tokenizer_path, tmp_path / "examples", CONFIG, num_workers=1)
    with ExampleShards(tmp_path / "examples") as ours, ExampleShards(reference) as theirs:
        assert ours.fingerprint == theirs.fingerprint


def test_another_seed_is_another_order_of_the_same_examples(corpus, tokenizer_path, reference, tmp_path):
    config = BuildConfig(max_source_tokens=256, max_target_tokens=96, seed=6)
    build_examples([corpus], tokenizer_path, tmp_path / "examples", config, num_workers=1)
    ours, theirs = all_examples(tmp_path / "examples"), all_examples(reference) + all_examples(reference / "heldout")
    assert ours != theirs
    assert sorted(ours) == sorted(theirs)


def test_bad_records_and_duplicates_are_counted_not_used(texts, tokenizer_path, tmp_path, reference):
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"id": f"d{index}", "text": text}, ensure_ascii=False) for index, text in enumerate(texts)]
    lines += [
        lines[3], lines[3].replace("d3", "x"), "{", "[1]", '{"id": "no text"}',
        json.dumps({"text": "短。"}, ensure_ascii=False),
        json.dumps({"text": "only English in this one, " * 5}),
        json.dumps({"text": "一" * 40}, ensure_ascii=False),
    ]  # fmt: skip
    path.write_text("\n".join(lines), encoding="utf-8")
    build_examples([path], tokenizer_path, tmp_path / "examples", CONFIG, num_workers=1)
    assert all_examples(tmp_path / "examples") == all_examples(reference)
    documents = json.loads((tmp_path / "examples" / "manifest.json").read_text(encoding="utf-8"))["documents"]
    assert documents["dropped"]["duplicate"] == 2
    assert sum(documents["dropped"].values()) == 8
    assert documents["read"] == len(lines) == documents["kept"] + documents["heldout"] + 8
    assert describe_drops(documents) is None
    assert "duplicate" in str(describe_drops({"read": 10, "dropped": {"duplicate": 5, "too short": 1}}))


def test_pairs_from_json_and_tabs_are_the_same_examples(texts, tokenizer_path, tmp_path):
    config = BuildConfig(kind="pairs", max_source_tokens=64, max_target_tokens=16)
    records = [{"text": text[10:], "summary": text[:10]} for text in texts]
    path = write_json_lines(
        tmp_path / "pairs.jsonl.gz", [*records, {"text": "没有摘要"}, {"text": "", "summary": "空"}]
    )
    build_examples([path], tokenizer_path, tmp_path / "json", config, num_workers=1)
    tabbed = tmp_path / "pairs.tsv"
    rows = [f"{record['summary']}\t{record['text']}" for record in records]
    tabbed.write_text("\r\n".join([*rows, "no tab"]), encoding="utf-8")
    build_examples([tabbed], tokenizer_path, tmp_path / "tabs", config, num_workers=1)
    examples = all_examples(tmp_path / "json")
    assert examples == all_examples(tmp_path / "tabs")
    tokenizer = load_tokenizer(tokenizer_path)
    wanted = {
        (tuple(tokenizer.encode_source(r["text"], 64)), tuple(tokenizer.encode_target(r["summary"], 16)))
        for r in records
    }
    assert set(examples) == wanted
    with ExampleShards(tmp_path / "json") as shards:
        assert shards.manifest["documents"]["dropped"] == {"empty text": 1, "no summary and text": 1}


def test_a_finished_build_stops_and_another_request_is_refused(corpus, tokenizer_path, reference, tmp_path):
    before = read_tree(reference)
    assert not build_examples([corpus], tokenizer_path, reference, CONFIG, num_workers=1)
    with pytest.raises(ArtifactError, match=r"seed=5, now seed=8"):
        build_examples([corpus], tokenizer_path, reference, dataclasses.replace(CONFIG, seed=8), num_workers=1)
    other = write_json_lines(tmp_path / "corpus.jsonl", [{"text": "另一个文件"}])
    with pytest.raises(ArtifactError, match="inputs="):
        build_examples([other], tokenizer_path, reference, CONFIG, num_workers=1)
    assert read_tree(reference) == before


def test_nothing_usable_is_a_data_error_with_the_reasons(tokenizer_path, tmp_path):
    path = write_json_lines(tmp_path / "corpus.jsonl", [{"text": "短。"}, {"text": "也短。"}, {"no": "text"}])
    with pytest.raises(DataError, match=r"3 documents.*too short \(2\).*no text \(1\)") as caught:
        build_examples([path], tokenizer_path, tmp_path / "examples", CONFIG, num_workers=1)
    assert caught.value.exit_code == 44
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["corpus.jsonl"]


@pytest.mark.parametrize("name", ["corpus.jsonl.gz", "corpus.jsonl.zst"])
def test_an_input_that_was_cut_off_is_refused_in_words(corpus, tokenizer_path, tmp_path, name):
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    for content in (compress(corpus.read_bytes())[:-30], b"not compressed"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is damaged or cut off"):
            build_examples([tmp_path / name], tokenizer_path, tmp_path / "examples", CONFIG, num_workers=1)
        assert not (tmp_path / "examples").exists()


def test_holding_out_everything_is_refused(corpus, tokenizer_path, tmp_path):
    with pytest.raises(UsageError, match="heldout_documents=200"):
        build_examples([corpus], tokenizer_path, tmp_path / "examples", BuildConfig(heldout_documents=200), 1)


def test_an_output_in_use_is_left_alone(corpus, tokenizer_path, tmp_path):
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "thesis.txt").write_text("important", encoding="utf-8")
    with pytest.raises(UsageError, match="in use"):
        build_examples([corpus], tokenizer_path, tmp_path / "examples", CONFIG, num_workers=1)
    work = tmp_path / ".other.building"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process"):
            build_examples([corpus], tokenizer_path, tmp_path / "other", CONFIG, num_workers=1)


COMMAND = """
import os, signal, sys
import t5pegasus.corpus.units as units
units.MAX_UNIT_CHARACTERS = 4000
from launch.cli import main
left = int(sys.argv[1])
def kill_at_rename(event, _):
    global left
    if event == "os.rename":
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill_at_rename)
code = main(sys.argv[2:])
assert "jax" not in sys.modules
sys.exit(code)
"""


def command(kill_at_rename, corpus, tokenizer_path, output, num_workers):
    flags = {
        "--tokenizer-path": tokenizer_path, "--output-path": output, "--max-source-tokens": 256,
        "--max-target-tokens": 96, "--heldout-documents": 9, "--seed": 5, "--num-workers": num_workers,
    }  # fmt: skip
    arguments = [str(part) for flag in flags.items() for part in flag]
    return [sys.executable, "-c", COMMAND, str(kill_at_rename), "build", str(corpus), *arguments]


def test_killed_before_any_rename_it_continues_to_the_same_bytes(corpus, tokenizer_path, reference, tmp_path):
    """All that a build commits it commits by a rename: kill -9 before one of them, again and again."""
    output = tmp_path / "examples"
    kills = 0
    for kill_at_rename in (1, 10, 40, 45, 12, 2, 4, 5, 8, 10**9):
        assert not output.exists()
        line = command(kill_at_rename, corpus, tokenizer_path, output, num_workers=1)
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        kills += 1
    assert kills >= 8
    assert "next: t5pegasus pretrain" in done.stdout
    assert read_tree(output) == read_tree(reference)
    assert not list(tmp_path.glob(".*"))


def test_killed_with_its_workers_it_continues_with_others(corpus, tokenizer_path, reference, tmp_path):
    output = tmp_path / "examples"
    work = tmp_path / ".examples.building"
    build = subprocess.Popen(command(10**9, corpus, tokenizer_path, output, num_workers=2), stderr=subprocess.PIPE)
    try:
        while not list((work / "units").glob("0*")) and build.poll() is None:
            time.sleep(0.002)
    finally:
        build.kill()
    build.communicate()  # ends only when the workers, who share its stderr, have ended too
    assert not output.exists()
    with pytest.raises(ArtifactError, match=r"interrupted build.*seed=5, now seed=0"):
        build_examples([corpus], tokenizer_path, output, dataclasses.replace(CONFIG, seed=0), 1)
    build_examples([corpus], tokenizer_path, output, CONFIG, num_workers=1)
    assert read_tree(output) == read_tree(reference)


def _die(task):
    os._exit(9)


def test_a_worker_that_dies_is_reported_not_waited_for():
    with pytest.raises(T5PegasusError, match="worker processes ended early"):
        list(run_tasks(functools.partial(functools.partial, _die), range(3), num_workers=2))
    assert list(run_tasks(functools.partial(functools.partial, _die), [], num_workers=2)) == []


def test_real_text_builds(tmp_path, shared_data):
    pairs = shared_data / "summarization" / "csl_dev.jsonl"
    adopt_vocabulary(shared_data / "vocab" / "t5_pegasus_vocab_50000.txt").save(tmp_path / "tokenizer")
    build_examples([pairs], tmp_path / "tokenizer", tmp_path / "examples", BuildConfig(kind="pairs"), 1)
    with ExampleShards(tmp_path / "examples") as shards:
        documents = shards.manifest["documents"]
        assert documents["kept"] == len(shards) > 0.9 * documents["read"]


@pytest.fixture(scope="module")
def sentinel_tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentinels")
    unused = [f"[unused{number}]" for number in range(1, 30)]
    vocabulary = ["[PAD]", *reversed(unused), "[UNK]", "[CLS]", "[SEP]", "。", *CHARACTERS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    adopt_vocabulary(folder / "vocab.txt").save(folder / "saved")
    return folder / "saved"


SPANS = dataclasses.replace(CONFIG, objective="span-corruption", max_source_tokens=60, max_target_tokens=20)


def test_texts_to_corrupt_are_the_documents_in_pieces_that_fit_a_row(corpus, texts, sentinel_tokenizer_path, tmp_path):
    build_examples([corpus], sentinel_tokenizer_path, tmp_path / "one", SPANS, num_workers=1)
    build_examples([corpus], sentinel_tokenizer_path, tmp_path / "two", SPANS, num_workers=2)
    assert read_tree(tmp_path / "two") == read_tree(tmp_path / "one")
    tokenizer = load_tokenizer(sentinel_tokenizer_path)
    with ExampleShards(tmp_path / "one") as shards, ExampleShards(tmp_path / "one" / "heldout") as held:
        assert shards.manifest["config"]["objective"] == "span-corruption"
        corruption = shards.corruption
        assert corruption == held.corruption
        assert [tokenizer.token(index) for index in corruption.sentinel_ids[:2]] == ["[unused1]", "[unused2]"]
        assert corruption.prefix_ids == (tokenizer.start_id,)
        longest = corruption.longest(60, 20)
        assert len(corruption.sentinel_ids) == corruption.count(np.array(longest))[1]
        pieces = [each.source for folder in (shards, held) for each in folder.read(range(len(folder)))]
        assert all(len(each.target) == 0 for each in shards.read(range(len(shards))))
    assert max(map(len, pieces)) <= longest < 2 * min(map(len, pieces))
    characters = Counter("".join(tokenizer.decode(piece.tolist()) for piece in pieces).replace(" ", ""))
    assert characters == Counter("".join(texts))


def test_what_span_corruption_cannot_do_is_said(corpus, tokenizer_path, sentinel_tokenizer_path, reference, tmp_path):
    with pytest.raises(UsageError, match=r"has 0 of the \d+ tokens \[unused1\]"):
        build_examples([corpus], tokenizer_path, tmp_path / "examples", SPANS, num_workers=1)
    long = dataclasses.replace(SPANS, max_source_tokens=2000, max_target_tokens=900)
    with pytest.raises(UsageError, match=r"has 29 of the .* make shorter rows"):
        build_examples([corpus], sentinel_tokenizer_path, tmp_path / "examples", long, num_workers=1)
    for fields, message in (
        ({"kind": "pairs"}, "is for documents"),
        ({"corruption_rate": 1.0}, "corruption_rate=1.0"),
        ({"mean_span_tokens": 0.5}, "mean_span_tokens=0.5"),
        ({"objective": "prefix"}, "objective='prefix'"),
    ):
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(SPANS, **fields)
    short = dataclasses.replace(SPANS, max_target_tokens=2)
    with pytest.raises(UsageError, match="max_target_tokens=2"):
        build_examples([corpus], sentinel_tokenizer_path, tmp_path / "examples", short, num_workers=1)
    shutil.copytree(reference, tmp_path / "reference")
    other = dataclasses.replace(CONFIG, objective="span-corruption")
    with pytest.raises(ArtifactError, match="objective"):  # another objective is another folder
        build_examples([corpus], sentinel_tokenizer_path, tmp_path / "reference", other, num_workers=1)
    assert "objective" not in json.loads((reference / "manifest.json").read_text(encoding="utf-8"))["config"]
