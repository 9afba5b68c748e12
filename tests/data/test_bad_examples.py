"""What is damaged behind the table is left out by name, alike everywhere; what can be seen at start is refused."""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.data.quarantine import Quarantine
from t5pegasus.data.records import Example, pack_record, token_dtype, unpack_records
from t5pegasus.data.shard_files import shard_name
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, DataError
from tests.data.example_folders import END, PAD, START, random_examples, write_examples

DATA = DataConfig(max_source_tokens=64, max_target_tokens=24, seed=3, max_bad_examples=5)
EXAMPLES = random_examples(90, seed=4)


@pytest.fixture
def folder(tmp_path):
    """With its packing table, so that checksums have been compared already."""
    write_examples(tmp_path / "examples", EXAMPLES)
    PackedRows(tmp_path / "examples", DATA, PAD, START).close()
    return tmp_path / "examples"


def damage(folder, index):
    """Flip a bit in the record of one example, and keep size and time of the file, as a failing disk does."""
    path = folder / shard_name(index // 30, 3)
    record = pack_record(EXAMPLES[index].source, EXAMPLES[index].target, token_dtype(30_000))
    content, status = path.read_bytes(), path.stat()
    assert content.count(record) == 1
    at = content.index(record) + len(record) // 2
    path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_record_leaves_its_segment_empty_and_all_else_as_it_was(folder, caplog):
    with PackedRows(folder, DATA, PAD, START) as rows:
        whole = rows.ordered_batch(range(rows.num_rows))
    bad = [7, 31, 32]
    for index in bad:
        damage(folder, index)
    quarantine = Quarantine(5)
    with PackedRows(folder, DATA, PAD, START, quarantine=quarantine) as rows:
        batch = rows.ordered_batch(range(rows.num_rows))
        again = rows.stream_batch(np.arange(2 * rows.num_rows))
        for row in range(rows.num_rows):
            members = rows.table.examples[rows.table.row_starts[row] : rows.table.row_starts[row + 1]].tolist()
            assert batch.num_bad_examples[row] == sum(index in bad for index in members)
            for segment, index in enumerate(members, start=1):
                inside = batch.decoder_segment_ids[row] == segment
                before = whole.decoder_segment_ids[row] == segment
                expected = [] if index in bad else whole.decoder_target_tokens[row][before].tolist()
                assert batch.decoder_target_tokens[row][inside].tolist() == expected
                sources = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == segment]
                assert len(sources) == (0 if index in bad else len(EXAMPLES[index].source))
    assert again.num_bad_examples.sum() == 2 * len(bad)
    assert again.decoder_loss_weights.sum() == 2 * batch.decoder_loss_weights.sum()
    assert len(quarantine) == 3
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3  # each once, however often its row is read
    assert all(shard_name(index // 30, 3) in line and f"example {index} " in line for index, line in zip(bad, named))


def test_a_disk_that_fails_is_no_bad_example(tmp_path):
    """Another process may read the same row from a disk that works."""
    folder = write_examples(tmp_path / "examples", random_examples(3000, seed=6))
    with PackedRows(folder, DATA, PAD, START) as rows:
        path = folder / shard_name(1, 3)
        opened = [int(link.name) for link in Path("/proc/self/fd").iterdir() if link.resolve() == path]
        failing = os.open(tmp_path, os.O_RDONLY)  # reading a folder fails
        for descriptor in opened:
            os.dup2(failing, descriptor)
        os.close(failing)
        batches = load_batches(rows, rows.num_rows, 0)
        with contextlib.closing(batches), pytest.raises(OSError, match=r"pread\(\) failed") as raised:
            next(batches)
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(path))


def test_too_many_open_files_are_no_damage(tmp_path):
    folder = write_examples(tmp_path / "examples", EXAMPLES, 8)
    opened = {int(link.name) for link in Path("/proc/self/fd").iterdir()}
    free = (number for number in itertools.count() if number not in opened)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, 6, None)), hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            ExampleShards(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_of_them_than_allowed_end_the_run(folder):
    for index in range(10, 16):
        damage(folder, index)
    with PackedRows(folder, DATA, PAD, START) as rows, pytest.raises(DataError, match=r"6 examples .*=5 are allowed"):
        rows.ordered_batch(range(rows.num_rows))


def test_those_met_before_a_stop_count_once_and_wherever_the_folder_lies_now(folder, caplog):
    for index in range(10, 16):
        damage(folder, index)
    moved = folder.rename(folder.with_name("moved"))
    with PackedRows(moved, DATA, PAD, START) as rows:
        rows.recall([10, 11])
        found = rows.find_bad_examples(
            [k for k in range(rows.num_rows) if not {12, 13, 14, 15} & set(members(rows, k))]
        )
        assert {bad.index for bad in found} <= {10, 11}
        assert caplog.records == []
        with pytest.raises(DataError, match="6 examples"):
            rows.ordered_batch(range(rows.num_rows))


def members(rows, k):
    row = rows.table_row(k, 0)
    return rows.table.examples[rows.table.row_starts[row] : rows.table.row_starts[row + 1]].tolist()


@pytest.mark.parametrize("vocab_size", [30_000, 70_000])
def test_every_kind_of_bad_record_is_known_by_its_reason(vocab_size):
    dtype = token_dtype(vocab_size)
    good = pack_record([5, 6, 7], [8, 9], dtype)
    header_bytes = 4
    records = [
        good,
        good[: -dtype.itemsize],
        good + b"\0",
        pack_record([5, 6], [7, 8, 9], dtype),
        pack_record([5, 6, 7], [8, vocab_size], dtype),
        b"",
        good[: header_bytes - 1],
        good,
    ]
    sources, targets, faults = unpack_records(records, np.array([[3, 2]] * len(records)), vocab_size)
    assert sorted(faults) == [1, 2, 3, 4, 5, 6]
    assert "bytes" in faults[1]
    assert faults[3] == "its header says 2 source tokens, 3 were written"
    assert faults[4] == f"it holds token {vocab_size}, the vocabulary has {vocab_size}"
    for at in range(len(records)):
        assert sources[at].tolist() == ([] if at in faults else [5, 6, 7])
        assert targets[at].tolist() == ([] if at in faults else [8, 9])


def test_ids_outside_the_vocabulary_are_left_out_though_checksums_agree(tmp_path):
    examples = random_examples(40, vocab_size=30_000)
    examples[11] = Example(np.append(examples[11].source[:-1], [31_000, END]), examples[11].target)
    folder = write_examples(tmp_path / "examples", examples)
    quarantine = Quarantine(5)
    with PackedRows(folder, DATA, PAD, START, quarantine=quarantine) as rows:
        batch = rows.ordered_batch(range(rows.num_rows))
    assert batch.num_bad_examples.sum() == len(quarantine) == 1
    assert batch.encoder_input_tokens.max() < 30_000


def test_a_row_of_bad_examples_alone_is_an_empty_row(folder):
    data = DataConfig(max_source_tokens=64, max_target_tokens=24, pack=False)
    PackedRows(folder, data, PAD, START).close()
    damage(folder, 3)
    with PackedRows(folder, data, PAD, START) as rows:
        batch = rows.ordered_batch([3])
    empty = {name: getattr(batch, name) for name in set(Batch._fields) - {"row_ids", "num_bad_examples"}}
    assert all((array == 0).all() for array in empty.values())


@pytest.mark.parametrize("how", ["vanished", "truncated", "empty", "duplicate", "swapped", "changed", "listed twice"])
def test_shards_that_are_not_the_manifests_are_refused_at_start_by_name(folder, how):
    first, second = (folder / shard_name(index, 3) for index in (0, 1))
    content = second.read_bytes()
    if how == "vanished":
        second.unlink()
    elif how == "truncated":
        second.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        second.write_bytes(b"")
    elif how == "duplicate":
        shutil.copy(first, second)
    elif how == "swapped":  # of the same size: only its content tells
        second.write_bytes(content[:1000] + content[1000:][::-1])
    elif how == "changed":
        second.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
    else:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        manifest["shards"][0] = manifest["shards"][1]
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    name = "manifest.json" if how == "listed twice" else second.name
    with pytest.raises(ArtifactError, match=name):
        PackedRows(folder, DATA, PAD, START)


def test_a_folder_that_lists_a_shard_twice_and_says_so_consistently_is_refused(tmp_path, monkeypatch):
    from t5pegasus.data import shard_files

    real = shard_files.write_manifest

    def twice(folder, **fields):
        return real(folder, **{**fields, "shards": [fields["shards"][0], fields["shards"][0]]})

    monkeypatch.setattr("tests.data.example_folders.write_manifest", twice)
    with pytest.raises(ArtifactError, match="lists it twice"):
        ExampleShards(write_examples(tmp_path / "examples", EXAMPLES[:20], 2))


def test_shards_are_verified_again_only_if_they_were_touched(folder, monkeypatch):
    verified = []
    monkeypatch.setattr(ExampleShards, "verify", lambda self, shards=(): verified.append([s.file for s in shards]))
    PackedRows(folder, DATA, PAD, START).close()
    assert verified == []
    (folder / shard_name(2, 3)).touch()
    for _ in range(2):  # the second start knows
        PackedRows(folder, DATA, PAD, START).close()
    assert verified == [[shard_name(2, 3)]]
