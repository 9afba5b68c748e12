"""Laws of mixtures: which source and which of its rows comes at row k follows from k, seed and changes alone."""

import contextlib
import itertools

import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.data.mixed_rows import MixedRows
from t5pegasus.data.mixture import Change, MixtureSchedule, change_weights
from t5pegasus.data.records import Example
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import UsageError
from tests.data.example_folders import END, PAD, START, random_examples, write_examples

CHANGES = (
    Change(0, {"a": 0.7, "b": 0.3}),
    Change(1000, {"a": 0.2, "b": 0.3, "c": 0.5}),
    Change(1500, {"c": 1.0, "a": 0.0}),
    Change(1600, {"b": 2.0, "a": 1.0, "c": 1.0}),
)
DATA = DataConfig(max_source_tokens=64, max_target_tokens=24, seed=3)


def spread(schedule, rows):
    names, numbers = np.empty(len(rows), object), np.full(len(rows), -1)
    for name, places, of_source in schedule.assign(np.asarray(rows)):
        names[places], numbers[places] = name, of_source
    return names, numbers


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_every_source_goes_on_where_it_stopped_and_counts_are_exact(seed):
    schedule = MixtureSchedule(CHANGES, seed)
    names, numbers = spread(schedule, np.arange(2500))
    seen = dict.fromkeys("abc", 0)
    for row, (name, number) in enumerate(zip(names, numbers)):
        if row % 7 == 0 or 990 < row < 1010:
            assert schedule.count(row) == {source: seen[source] for source in schedule.count(row)}
        assert number == seen[name]
        seen[name] += 1
    assert set(names[1500:1600]) == {"c"}


def test_any_part_of_the_rows_is_as_in_the_whole():
    schedule = MixtureSchedule(CHANGES, 5)
    names, numbers = spread(schedule, np.arange(2000))
    random = np.random.default_rng(0)
    for _ in range(50):
        rows = random.permutation(2000)[: random.integers(1, 90)]
        some = spread(schedule, rows)
        np.testing.assert_array_equal(some[0], names[rows])
        np.testing.assert_array_equal(some[1], numbers[rows])


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 0.5}, {"a": 0.7, "b": 0.29, "c": 0.01}, {"a": 1, "b": 2, "c": 4}])
def test_every_stretch_of_rows_holds_each_source_in_its_proportion(weights):
    schedule = MixtureSchedule((Change(0, weights),), 1)
    total = sum(weights.values())
    names, _ = spread(schedule, np.arange(4096))
    for name, weight in weights.items():
        counts = np.concatenate([[0], np.cumsum(names == name)])
        for length in (8, 64, 1024):
            off = counts[length:] - counts[:-length] - length * weight / total
            assert np.abs(off).max() < 5
        for row in (10**6, 10**9, 2**31):
            assert abs(schedule.count(row)[name] - row * weight / total) < 8


def test_one_source_is_its_own_stream_and_seeds_give_other_orders():
    names, numbers = spread(MixtureSchedule((Change(0, {"a": 3.0}),), 9), np.arange(100, 300))
    np.testing.assert_array_equal(numbers, np.arange(100, 300))
    assert set(names) == {"a"}
    orders = [tuple(spread(MixtureSchedule(CHANGES, seed), np.arange(200))[0]) for seed in range(5)]
    assert len(set(orders)) == 5


def test_changes_are_only_added_and_only_if_something_changed():
    begun = change_weights((), 0, {"a": 0.7, "b": 0.3})
    assert change_weights(begun, 100, {"b": 3.0, "a": 7.0}) == begun
    assert change_weights(begun, 100, {"a": 0.7, "b": 0.3, "c": 0.0}) == begun
    changed = change_weights(begun, 100, {"a": 0.5, "b": 0.5})
    assert changed == (*begun, Change(100, {"a": 0.5, "b": 0.5}))
    assert change_weights(changed, 100, {"a": 0.6, "b": 0.4}) == (*begun, Change(100, {"a": 0.6, "b": 0.4}))
    assert tuple(Change.from_json(change.to_json()) for change in changed) == changed


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pseudo-summaries of two corpora, and texts to corrupt."""
    folder = tmp_path_factory.mktemp("sources")
    corruption = SpanCorruption(0.15, 3.0, tuple(range(1, 60)), (START,), END)
    nothing = np.empty(0, np.int32)
    texts = [Example(example.source, nothing) for example in random_examples(90, seed=3, longest=(60, 3))]
    return {
        "few": write_examples(folder / "few", random_examples(60, seed=1)),
        "many": write_examples(folder / "many", random_examples(200, seed=2)),
        "spans": write_examples(folder / "spans", texts, corruption=corruption),
    }


def open_mixture(folders, weights, changes=None, data=DATA):
    rows = MixedRows({name: PackedRows(folders[name], data, PAD, START) for name in weights}, weights, data.seed)
    if changes is not None:
        fingerprints = {name: source.shards.fingerprint for name, source in zip(rows.names, rows.sources)}
        rows.follow(tuple(Change(row, {fingerprints[name]: w for name, w in of.items()}) for row, of in changes))
    return rows


MIXED = {"few": 0.5, "many": 0.3, "spans": 0.2}
CHANGED = [(0, MIXED), (45, {"few": 0.2, "spans": 0.8}), (77, {"many": 1.0}), (90, {"many": 0.4, "few": 0.6})]


def read_stream(rows, batch_sizes, num_rows, processes, num_threads):
    """The first rows of the stream, with a new loader whenever the batch size changes, as after a resume."""
    position, pieces = 0, []
    for batch_size in itertools.cycle(batch_sizes):
        if position >= num_rows:
            break
        parts = np.array_split(np.arange(batch_size), processes)
        with contextlib.ExitStack() as stack:
            loaders = [
                stack.enter_context(
                    contextlib.closing(
                        load_batches(rows, batch_size, position, batch_rows=part, num_threads=num_threads)
                    )
                )
                for part in parts
            ]
            for _ in range(2):
                pieces.extend(next(loader) for loader in loaders)
                position += batch_size
    return Batch(*(np.concatenate(arrays)[:num_rows] for arrays in zip(*pieces)))


@pytest.mark.parametrize("changes", [None, CHANGED])
def test_the_stream_depends_on_nothing_but_seed_and_changes(folders, changes):
    with open_mixture(folders, MIXED, changes) as rows:
        num_rows = 120  # several epochs of the small sources
        whole = rows.stream_batch(np.arange(num_rows))
        for batch_sizes, processes, num_threads in (([40, 20], 1, 1), ([8, 23], 2, 2), ([20], 4, 3)):
            other = read_stream(rows, batch_sizes, num_rows, processes, num_threads)
            for name, a, b in zip(Batch._fields, whole, other):
                np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_array_equal(whole.row_ids, np.arange(num_rows))


def test_each_row_is_of_the_source_it_names_and_epochs_repeat_nothing(folders):
    with open_mixture(folders, MIXED, CHANGED) as rows, contextlib.ExitStack() as stack:
        alone = [stack.enter_context(PackedRows(folders[name], DATA, PAD, START)) for name in rows.names]
        whole = rows.stream_batch(np.arange(200))
        taken = np.bincount(whole.source_ids).tolist()
        for source, count in enumerate(taken):
            expected = alone[source].stream_batch(np.arange(count))
            for name in set(Batch._fields) - {"row_ids", "source_ids"}:
                np.testing.assert_array_equal(getattr(whole, name)[whole.source_ids == source], getattr(expected, name))
        # The rows of a source, over all changes, are its epochs one behind the other: each row once in each.
        few = rows.sources[0]
        order = [few.table_row(k % few.num_rows, k // few.num_rows) for k in range(taken[0])]
        assert taken[0] > few.num_rows
        assert sorted(order[: few.num_rows]) == list(range(few.num_rows))


def test_an_epoch_over_a_mixture_is_all_tables_behind_each_other(folders):
    with open_mixture(folders, MIXED) as rows:
        batches = list(load_epoch(rows, 16))
        full = [batch.decoder_loss_weights.sum(axis=1) > 0 for batch in batches]
        # No batch is of two sources; the last of each is filled up.
        assert all((batch.source_ids[each] == batch.source_ids[0]).all() for batch, each in zip(batches, full))
        sources = np.concatenate([batch.source_ids[each] for batch, each in zip(batches, full)])
        ids = np.concatenate([batch.row_ids[each] for batch, each in zip(batches, full)])
    assert np.bincount(sources).tolist() == [source.num_rows for source in rows.sources]
    assert (np.diff(sources) >= 0).all()
    np.testing.assert_array_equal(ids, np.arange(rows.num_rows))


def test_sources_that_do_not_belong_together_are_refused(folders, tmp_path):
    again = write_examples(tmp_path / "again", random_examples(60, seed=1))
    with pytest.raises(UsageError, match="again holds the same examples as few"):
        open_mixture({**folders, "again": again}, {"few": 1, "again": 1})
    other = write_examples(tmp_path / "other", random_examples(60, seed=8), tokenizer="g")
    with pytest.raises(UsageError, match=r"other has another tokenizer than .*few: g…, f… was wanted"):
        open_mixture({**folders, "other": other}, {"few": 1, "other": 1})


@pytest.mark.parametrize(
    ("entries", "message"),
    [(("examples",), "no FOLDER=WEIGHT"), (("a=x",), "no FOLDER=WEIGHT"), (("a=-1",), "no FOLDER=WEIGHT"),
     (("a=inf",), "no FOLDER=WEIGHT"), (("a=1", "a=2"), "names a twice"),
     (("x/a=1", "x/a/=2", "b=1"), "names x/a twice"), (("a=0", "b=0"), "every weight is 0")],
)  # fmt: skip
def test_words_for_mixtures_that_are_none(entries, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(mixture=entries)
    assert DataConfig(mixture=("runs/a=b=0.5",)).mixture_weights() == {"runs/a=b": 0.5}
