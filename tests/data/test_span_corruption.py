"""Laws of span corruption, held against a plain implementation that goes token by token."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from t5pegasus.config import DataConfig
from t5pegasus.data.hashing import example_keys, mix
from t5pegasus.data.loader import PackedRows, load_epoch
from t5pegasus.data.packing import load_packing
from t5pegasus.data.records import Example, Sequences
from t5pegasus.data.shards import ExampleShards
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.errors import ArtifactError, UsageError
from tests.data.example_folders import END, PAD, START, write_examples

CORRUPTION = SpanCorruption(0.15, 3.0, tuple(range(1, 60)), (START,), END)
DATA = DataConfig(max_source_tokens=64, max_target_tokens=24, seed=3)
NOTHING = np.empty(0, np.int32)


def draw_texts(num, longest=200, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(200, 30_000, random.integers(2, longest)).astype(np.int32) for _ in range(num)]


def splitmix(value):
    """Of Java's SplittableRandom, in Python integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


def divide_plainly(total, count, key):
    """A total as a sum of positive numbers: borders are the places between its items with the smallest hashes."""
    ranked = sorted(range(1, total), key=lambda place: splitmix((key + place * 0x9E3779B97F4A7C15) % 2**64))
    return [end - begin for begin, end in itertools.pairwise([0, *sorted(ranked[: count - 1]), total])]


def corrupt_plainly(corruption, text, key):
    """Source and target of one text by the words of the paper, with the same choice of borders."""
    lost = min(max(round(len(text) * corruption.rate), 1), len(text) - 1)
    spans = min(max(round(lost / corruption.mean_span_tokens), 1), lost, len(text) - lost)
    kept_spans = divide_plainly(len(text) - lost, spans, splitmix(key ^ 0x9E3779B97F4A7C15))
    lost_spans = divide_plainly(lost, spans, splitmix(key))
    source, target, rest = list(corruption.prefix_ids), [], list(text)
    for kept, cut, sentinel in zip(kept_spans, lost_spans, corruption.sentinel_ids):
        source += [*rest[:kept], sentinel]
        target += [sentinel, *rest[kept : kept + cut]]
        rest = rest[kept + cut :]
    assert not rest
    return [*source, corruption.end_id], [*target, corruption.end_id]


@pytest.mark.parametrize(
    "corruption",
    [CORRUPTION, CORRUPTION._replace(prefix_ids=()), CORRUPTION._replace(rate=0.5, mean_span_tokens=4.5),
     CORRUPTION._replace(rate=0.9, mean_span_tokens=1.0)],
)  # fmt: skip
def test_it_is_what_the_plain_words_say(corruption):
    texts = draw_texts(60, 120)
    keys = example_keys(7, np.arange(60) % 3, np.arange(60))
    sources, targets = corruption.corrupt(Sequences.of(texts), keys)
    for at, (text, key) in enumerate(zip(texts, keys.tolist())):
        source, target = corrupt_plainly(corruption, text.tolist(), key)
        assert sources[at].tolist() == source
        assert targets[at].tolist() == target
    lengths = corruption.lengths(np.array([len(text) for text in texts]))
    np.testing.assert_array_equal(lengths, np.stack([sources.lengths, targets.lengths], axis=1))


def test_the_figures_of_the_paper():
    """568 tokens make 512 and 114 with the end tokens of T5, which writes nothing in front (§3.1.4, 15 % in threes)."""
    plain = CORRUPTION._replace(prefix_ids=())
    assert plain.longest(512, 114) == 568
    assert plain.lengths(np.array([568])).tolist() == [[512, 114]]


def test_every_token_appears_once_and_sentinels_in_order():
    texts = draw_texts(200)
    sources, targets = CORRUPTION.corrupt(Sequences.of(texts), example_keys(0, np.zeros(200, int), np.arange(200)))
    for at, text in enumerate(texts):
        source, target = sources[at].tolist(), targets[at].tolist()
        sentinels = [token for token in source if token < 100]
        assert sentinels == [token for token in target if token < 100] == list(range(1, len(sentinels) + 1))
        spans = {key: list(group) for key, group in _group_behind_sentinels(target[:-1])}
        assert all(spans.values())
        restored = [part for token in source[1:-1] for part in (spans[token] if token < 100 else [token])]
        assert restored == text.tolist()
        assert source[0] == START
        assert source[-1] == target[-1] == END


def _group_behind_sentinels(target):
    places = [at for at, token in enumerate(target) if token < 100]
    return [(target[at], target[at + 1 : end]) for at, end in zip(places, [*places[1:], len(target)])]


def test_all_divisions_into_spans_are_equally_likely():
    corruption = CORRUPTION._replace(rate=0.5, mean_span_tokens=2.0)  # of 12 tokens 6 are kept and 6 lost, in 3 spans
    texts = Sequences.of([np.arange(200, 212)] * 20_000)
    sources, targets = corruption.corrupt(texts, mix(np.arange(20_000)))
    for sequences, margin in ((sources, 1), (targets, 0)):
        table = sequences.tokens.reshape(20_000, -1)
        places = Counter(map(bytes, (table[:, margin:-1] < 100).astype(np.uint8)))
        assert len(places) == 10  # ways to write 6 as a sum of 3
        chi_squared = sum((count - 2000) ** 2 / 2000 for count in places.values())
        assert chi_squared < 27.9  # exceeded once in a thousand times by 9 degrees of freedom


@pytest.fixture(scope="module")
def texts():
    return draw_texts(120, 150, seed=5)


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    examples = [Example(text, NOTHING) for text in texts]
    return write_examples(tmp_path_factory.mktemp("texts") / "examples", examples, corruption=CORRUPTION)


def test_rows_hold_each_text_corrupted_and_the_table_is_exact(folder, texts):
    with PackedRows(folder, DATA, PAD, START) as rows:
        longest = CORRUPTION.longest(64, 24)
        (batch,) = load_epoch(rows, rows.num_rows)
        seen = []
        for row in range(rows.num_rows):
            for segment, index in enumerate(_members(rows.table, row), start=1):
                key = int(example_keys(DATA.seed, np.array([0]), np.array([index]))[0])
                source, target = corrupt_plainly(CORRUPTION, texts[index][:longest].tolist(), key)
                inside = batch.encoder_segment_ids[row] == segment
                assert batch.encoder_input_tokens[row][inside].tolist() == source
                inside = batch.decoder_segment_ids[row] == segment
                assert batch.decoder_target_tokens[row][inside].tolist() == target
                assert batch.decoder_input_tokens[row][inside].tolist() == [START, *target[:-1]]
                seen.append(index)
        assert sorted(seen) == list(range(len(texts)))
        assert rows.table.source_efficiency == pytest.approx((batch.encoder_segment_ids > 0).mean())


def _members(table, row):
    return table.examples[table.row_starts[row] : table.row_starts[row + 1]].tolist()


def test_another_epoch_and_another_seed_cut_out_other_spans(folder):
    with PackedRows(folder, DATA, PAD, START) as rows:
        table_row = rows.table_row(4, 0)
        later = [next(k for k in range(rows.num_rows) if rows.table_row(k, epoch) == table_row) for epoch in (0, 1, 2)]
        drawn = [rows.stream_batch([epoch * rows.num_rows + k]).encoder_input_tokens for epoch, k in enumerate(later)]
        again = rows.stream_batch([later[0]]).encoder_input_tokens
    np.testing.assert_array_equal(drawn[0], again)
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])


def test_a_folder_says_how_it_is_corrupted_and_cannot_be_changed_unseen(folder, texts, tmp_path):
    with ExampleShards(folder) as shards:
        assert shards.corruption == CORRUPTION
    plain = write_examples(tmp_path / "plain", [Example(text, NOTHING) for text in texts])
    with ExampleShards(folder) as one, ExampleShards(plain) as other:
        assert one.fingerprint != other.fingerprint
    other = write_examples(tmp_path / "other", [Example(text, NOTHING) for text in texts], corruption=CORRUPTION)
    manifest = json.loads((other / "manifest.json").read_text(encoding="utf-8"))
    manifest["corruption"]["rate"] = 0.3
    (other / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ArtifactError, match="it was changed"):
        ExampleShards(other)


def test_texts_and_rows_that_are_too_short_are_refused(folder, tmp_path):
    short = write_examples(tmp_path / "short", [Example(np.array([300]), NOTHING)], 1, corruption=CORRUPTION)
    with ExampleShards(short) as shards, pytest.raises(ArtifactError, match="fewer than 2 tokens"):
        load_packing(shards, DATA)
    with ExampleShards(folder) as shards, pytest.raises(UsageError, match="max_target_tokens=2 "):
        load_packing(shards, DataConfig(max_source_tokens=64, max_target_tokens=2))
