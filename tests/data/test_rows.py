"""Laws of shards, packing and loading on random examples."""

import contextlib
import dataclasses
import errno
import json
import os
import threading
import time
from itertools import islice

import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig
from t5pegasus.data import packing
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.data.packing import load_packing, pack_examples
from t5pegasus.data.records import Example, pack_record, token_dtype, unpack_record
from t5pegasus.data.shard_files import shard_name
from t5pegasus.data.shards import ExampleShards
from t5pegasus.errors import ArtifactError, DataError
from tests.data.example_folders import END, PAD, START, random_examples, write_examples


@pytest.fixture(scope="module")
def examples():
    return random_examples(500)


@pytest.fixture(scope="module")
def folder(examples, tmp_path_factory):
    return write_examples(tmp_path_factory.mktemp("shards") / "examples", examples)


DATA = DataConfig(max_source_tokens=64, max_target_tokens=24, seed=3)


@pytest.fixture
def rows(folder):
    with PackedRows(folder, DATA, PAD, START) as rows:
        yield rows


@pytest.mark.parametrize("vocab_size", [30_000, 65_535, 65_536, 250_112])
def test_a_record_gives_back_its_example(vocab_size):
    dtype = token_dtype(vocab_size)
    assert dtype.itemsize == (2 if vocab_size < 65_536 else 4)
    for example in [
        *random_examples(20, vocab_size=vocab_size),
        Example(np.array([vocab_size - 1]), np.array([0])),
    ]:
        source, target = unpack_record(pack_record(*example, dtype), dtype)
        np.testing.assert_array_equal(source, example.source)
        np.testing.assert_array_equal(target, example.target)


def test_shards_give_examples_at_random_in_any_number(folder, examples):
    with ExampleShards(folder) as shards:
        assert len(shards) == len(examples)
        order = np.random.default_rng(1).permutation(len(examples))
        for index, got in zip(order, shards.read(order)):
            np.testing.assert_array_equal(got.source, examples[index].source)
            np.testing.assert_array_equal(got.target, examples[index].target)
        np.testing.assert_array_equal(shards[7].source, examples[7].source)
        with pytest.raises(IndexError):
            shards[len(examples)]


def test_same_examples_are_the_same_bytes_and_fingerprint(folder, examples, tmp_path):
    again = write_examples(tmp_path / "examples", examples)
    for path in sorted(folder.glob("*.*")):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "lengths", "manifest"])
def test_damage_is_named_with_both_values(examples, tmp_path, damage):
    folder = write_examples(tmp_path / "examples", examples)
    path = folder / {"lengths": "lengths.npy", "manifest": "manifest.json"}.get(damage, shard_name(1, 3))
    content = bytearray(path.read_bytes())
    if damage in ("missing", "manifest"):
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 3] ^= 4
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=path.name) as caught, ExampleShards(folder) as shards:
        shards.verify()
    assert "build" in str(caught.value)
    if damage == "cut":
        assert f"{len(content) - 1} bytes" in str(caught.value)
        assert str(len(content)) in str(caught.value)


def test_a_flipped_bit_never_reaches_training(examples, tmp_path):
    """Without verify: either the read raises, or the flip hit padding and the examples are the true ones."""
    folder = write_examples(tmp_path / "examples", examples[:60], num_shards=1)
    path = folder / shard_name(0, 1)
    content = path.read_bytes()
    raised = 0
    for position in np.random.default_rng(0).integers(len(content), size=60):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            with ExampleShards(folder) as shards:
                got = shards.read(range(60))
        except ArtifactError:
            raised += 1
            continue
        for example, true in zip(got, examples):
            np.testing.assert_array_equal(np.concatenate(example), np.concatenate(true))
    assert raised > 0


@pytest.mark.parametrize("capacity", [(64, 24), (40, 15), (30, 8)])
def test_packing_holds_every_example_once_within_the_capacity(examples, capacity):
    lengths = np.array([[len(s), len(t)] for s, t in examples])
    rows = list(pack_examples(lengths, *capacity))
    assert sorted(index for row in rows for index in row) == list(range(len(examples)))
    fitted = np.minimum(lengths, capacity)
    assert all((fitted[row].sum(axis=0) <= capacity).all() for row in rows)
    fullest = (fitted.sum(axis=0) / np.array(capacity)).max()
    assert len(rows) <= 1.25 * fullest  # the bound no packing can beat, and first-fit's distance from it


def test_packed_rows_hold_each_example_as_it_is_alone(rows, folder, examples):
    data = dataclasses.replace(DATA, pack=False)
    seen = []
    with PackedRows(folder, data, PAD, START) as single:
        assert single.num_rows == len(examples)
        for index, alone in enumerate(load_epoch(single, 1)):
            source, target = examples[index]
            assert alone.encoder_input_tokens[0][: len(source)].tolist() == source.tolist()
            assert alone.decoder_target_tokens[0][: len(target)].tolist() == target.tolist()
            assert alone.decoder_input_tokens[0][: len(target)].tolist() == [START, *target[:-1]]
            assert alone.decoder_loss_weights.sum() == len(target)
            assert (alone.encoder_input_tokens[0][len(source) :] == PAD).all()
    (packed,) = load_epoch(rows, rows.num_rows)
    for row in range(rows.num_rows):
        segments = packed.encoder_segment_ids[row].max()
        members = rows.table.examples[rows.table.row_starts[row] : rows.table.row_starts[row + 1]]
        assert packed.decoder_segment_ids[row].max() == segments == len(members)
        for segment, index in enumerate(members, start=1):
            inside = packed.encoder_segment_ids[row] == segment
            assert packed.encoder_input_tokens[row][inside].tolist() == examples[index].source.tolist()
            assert packed.encoder_positions[row][inside].tolist() == list(range(inside.sum()))
            inside = packed.decoder_segment_ids[row] == segment
            target = examples[index].target
            assert packed.decoder_target_tokens[row][inside].tolist() == target.tolist()
            assert packed.decoder_input_tokens[row][inside].tolist() == [START, *target[:-1]]
            assert packed.decoder_positions[row][inside].tolist() == list(range(inside.sum()))
            assert (packed.decoder_loss_weights[row][inside] == 1).all()
            seen.append(index)
        empty = packed.decoder_segment_ids[row] == 0
        assert (packed.decoder_loss_weights[row][empty] == 0).all()
        assert (packed.decoder_input_tokens[row][empty] == PAD).all()
    assert sorted(seen) == list(range(len(examples)))


def test_an_example_longer_than_a_row_keeps_its_beginning_and_end_token(folder, examples):
    with PackedRows(folder, DataConfig(max_source_tokens=8, max_target_tokens=4), PAD, START) as rows:
        (batch,) = load_epoch(rows, rows.num_rows)
        for row in range(rows.num_rows):
            source, target = examples[rows.table.examples[rows.table.row_starts[row]]]
            tokens = batch.encoder_input_tokens[row][batch.encoder_segment_ids[row] == 1].tolist()
            assert tokens == (source.tolist() if len(source) <= 8 else [*source[:7], END])
            tokens = batch.decoder_target_tokens[row][batch.decoder_segment_ids[row] == 1].tolist()
            assert tokens == (target.tolist() if len(target) <= 4 else [*target[:3], END])


def stream(rows, batch_sizes, num_rows, processes=1):
    """The first `num_rows` rows of the stream, read in portions of changing batch size and process count."""
    position, pieces = 0, []
    for batch_size in batch_sizes:
        parts = np.array_split(np.arange(batch_size), processes)
        with contextlib.ExitStack() as stack:
            loaders = [
                stack.enter_context(contextlib.closing(load_batches(rows, batch_size, position, batch_rows=part)))
                for part in parts
            ]
            for _ in range(3):
                pieces.extend(next(loader) for loader in loaders)
                position += batch_size
    return Batch(*(np.concatenate(arrays)[:num_rows] for arrays in zip(*pieces)))


def test_the_stream_does_not_depend_on_batch_size_or_processes(rows):
    num_rows = 3 * rows.num_rows  # three epochs
    whole = stream(rows, [rows.num_rows], num_rows)
    for batch_sizes, processes in (
        ([rows.num_rows // 2] * 2, 1),
        ([9, rows.num_rows, 4], 1),
        ([rows.num_rows], 4),
    ):
        other = stream(rows, batch_sizes, num_rows, processes)
        for a, b in zip(whole, other):
            np.testing.assert_array_equal(a[: len(b)], b)
    np.testing.assert_array_equal(whole.row_ids, np.arange(num_rows))


def test_every_epoch_is_another_order_of_the_same_rows(rows):
    orders = [[rows.table_row(k, epoch) for k in range(rows.num_rows)] for epoch in range(3)]
    assert all(sorted(order) == list(range(rows.num_rows)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    batch, again = rows.stream_batch([rows.num_rows + 5]), rows.ordered_batch([rows.table_row(5, 1)])
    np.testing.assert_array_equal(batch.encoder_input_tokens, again.encoder_input_tokens)
    assert batch.row_ids.dtype == np.uint32


def test_an_epoch_is_every_row_once_and_then_weightless_rows(rows):
    batch_size = 7
    batches = list(load_epoch(rows, batch_size))
    weights = np.concatenate([batch.decoder_loss_weights for batch in batches])
    assert all(len(batch.row_ids) == batch_size for batch in batches)
    assert (weights[: rows.num_rows].sum(axis=1) > 0).all()
    assert weights[rows.num_rows :].sum() == 0
    assert weights.sum() == sum(len(target) for _, target in (rows.shards[i] for i in range(len(rows.shards))))


def test_a_closed_stream_leaves_no_thread(rows):
    before = threading.active_count()
    with contextlib.closing(load_batches(rows, 4, 0, num_threads=3)) as batches:
        next(batches)
        assert threading.active_count() > before
    deadline = time.monotonic() + 20
    while threading.active_count() > before:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_the_table_is_built_once_and_checked(examples, tmp_path):
    folder = write_examples(tmp_path / "examples", examples)
    with ExampleShards(folder) as shards:
        first = load_packing(shards, DATA)
        (kept,) = folder.glob("packing-*")
        built = kept.stat().st_mtime_ns
        again = load_packing(shards, dataclasses.replace(DATA, seed=99))
        assert kept.stat().st_mtime_ns == built
        np.testing.assert_array_equal(first.examples, again.examples)
        assert 0.7 < first.source_efficiency <= 1
        load_packing(shards, dataclasses.replace(DATA, max_source_tokens=65))
        assert len(list(folder.glob("packing-*"))) == 2
        path = kept / "examples.npy"
        path.write_bytes(path.read_bytes()[:-8] + b"\1" * 8)
        with pytest.raises(ArtifactError, match="delete"):
            load_packing(shards, DATA)


def test_a_full_disk_is_named_while_a_table_is_written(tmp_path):
    for name in ("examples.npy", "row_starts.npy"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as raised:
            packing._write_arrays(folder, np.full((300_000, 2), 9), DATA)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(folder / name))


def test_a_table_is_of_numpys_own_format(tmp_path):
    num_rows = packing._write_arrays(tmp_path, np.full((10, 2), 20), DATA)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.npy", "row_starts.npy"]
    assert num_rows == 10
    for name, wanted in (("examples", np.arange(10)), ("row_starts", np.arange(11))):
        np.save(tmp_path / "wanted.npy", wanted)
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()


@pytest.mark.parametrize("kind", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_is_verified_each_time_and_no_table_made_in_it(
    examples, tmp_path, monkeypatch, kind
):
    folder = write_examples(tmp_path / "examples", examples)
    PackedRows(folder, DATA, PAD, START).close()

    def refuse(path, *_):
        raise OSError(kind, os.strerror(kind), str(path))

    monkeypatch.setattr(packing, "write_json", refuse)
    (folder / shard_name(0, 3)).touch()
    PackedRows(folder, DATA, PAD, START).close()
    with pytest.raises(ArtifactError, match=r"cannot be written \(.*copy them to a folder you may write to"):
        PackedRows(folder, dataclasses.replace(DATA, pack=False), PAD, START)


def test_other_special_ids_than_the_models_are_refused(folder):
    with pytest.raises(ArtifactError, match=r"start_id is 101, the model's is 0"):
        PackedRows(folder, DATA, PAD, 0)


def test_a_target_beyond_the_open_tokens_is_refused_when_it_is_read(folder, examples):
    highest = [int(example.target.max()) for example in examples]
    with PackedRows(folder, DATA, PAD, START, num_open_tokens=max(highest) + 1) as rows:
        every = [rows.ordered_batch([row]) for row in range(rows.num_rows)]
    with PackedRows(folder, DATA, PAD, START, num_open_tokens=max(highest)) as rows:
        index = highest.index(max(highest))
        message = f"target of example {index} holds token {max(highest)}, .* first {max(highest)} tokens are open"
        refused = 0
        for row, batch in enumerate(every):
            if (batch.decoder_target_tokens < max(highest)).all():
                rows.ordered_batch([row])
                continue
            refused += 1
            with pytest.raises(DataError, match=message):
                rows.ordered_batch([row])
        assert refused == 1
        batches = load_batches(rows, 50, 0)
        with contextlib.closing(batches), pytest.raises(DataError, match=message):
            list(islice(batches, rows.num_rows // 50 + 1))


def test_another_schema_or_kind_is_refused(examples, tmp_path):
    folder = write_examples(tmp_path / "examples", examples)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "kind": "documents"}), encoding="utf-8")
    with pytest.raises(ArtifactError, match="'documents'"):
        ExampleShards(folder)
