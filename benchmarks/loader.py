"""Speed of packed rows from disk to NumPy batches, beside Grain's own packing of the same examples.

    python benchmarks/loader.py                                  # random examples, made for the purpose
    python benchmarks/loader.py --examples-path examples         # those of a build

Ours: `load_batches` of `PackedRows`, rows in random order through the packing table. The peer: Grain's pipeline of an
ArrayRecord source → shuffle → parse → `FirstFitPackIterDataset`, with the same lengths, batch size, number of packing
bins (128 here, 128 open rows there) and two reading threads, which gives the same kind of row: tokens, segment ids and
positions of source and target, but no shifted decoder inputs, no checks of ids, and no random access to rows.

Both sides take turns, `--repeats` times, in one process; counted are source and target tokens without padding. The
last part times the packing table, which Grain has none of: it packs anew whenever it is read.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain.experimental import FirstFitPackIterDataset

from t5pegasus.config import DataConfig
from t5pegasus.data.loader import PackedRows, load_batches
from t5pegasus.data.packing import pack_examples, row_lengths
from t5pegasus.data.records import pack_record, token_dtype, unpack_record
from t5pegasus.data.shard_files import MANIFEST, save_array, shard_name, write_manifest, write_shard
from t5pegasus.data.shards import ExampleShards
from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.json_files import read_json

LENGTHS = ((512, 128), (256, 64))
VOCAB_SIZE, PAD, START, END = 50_000, 0, 101, 102
NUM_EXAMPLES = 60_000
BATCH_SIZE = 64
NUM_THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples-path", type=Path, help="folder of a build; left out, random examples are made")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each side in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--step-tokens-per-second", type=float, default=1000.0, help="of the CPU step to feed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="grain")
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, load {os.getloadavg()[0]:.1f}; grain {grain.__version__}, numpy {np.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        path = args.examples_path or write_random(Path(folder) / "examples", None)
        for source, target in LENGTHS:
            compare(path, DataConfig(source, target), args)
        if args.examples_path is None:
            corruption = SpanCorruption(0.15, 3.0, tuple(range(1, 60)), (START,), END)
            spans = write_random(Path(folder) / "spans", corruption)
            speeds = [measure(*ours(spans, DataConfig(512, 128)), args.seconds) for _ in range(args.repeats)]
            print(f"512/128, span corruption  ours {statistics.median(speeds):,.0f} tokens/s")
        time_packing(path)


def compare(path: Path, data: DataConfig, args: argparse.Namespace) -> None:
    """Print both speeds at one pair of lengths."""
    with ExampleShards(path) as shards:
        is_plain = shards.corruption is None
    sides = {"ours": ours} | ({"grain": peer} if is_plain else {})
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, side in sides.items():
            speeds[name].append(measure(*side(path, data), args.seconds))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    line = ", ".join(f"{name} {value:,.0f}" for name, value in medians.items())
    ratio = f", ratio {medians['ours'] / medians['grain']:.2f}" if is_plain else ""
    name = f"{data.max_source_tokens}/{data.max_target_tokens}"
    print(f"{name:8} non-padding tokens/s: {line}{ratio}")
    print(f"{'':8} {medians['ours'] / args.step_tokens_per_second:,.0f} × a step of {args.step_tokens_per_second:,.0f} "
          f"tokens/s (bar 20), {medians['ours'] / 2e6:.2f} × 2 M tokens/s (bar 1)")  # fmt: skip


Side = tuple[contextlib.AbstractContextManager[Iterator], Callable[..., int]]


def measure(opened: contextlib.AbstractContextManager[Iterator], count: Callable[..., int], seconds: float) -> float:
    """Non-padding tokens per second, behind the first batches."""
    with opened as batches:
        for _ in range(4):
            next(batches)
        began, tokens = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            tokens += count(next(batches))
    return tokens / spent


def ours(path: Path, data: DataConfig) -> Side:
    """The stream of packed rows from row 0 on."""

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator]:
        ids = {name: read_json(path / MANIFEST)[name] for name in ("pad_id", "start_id")}
        with (
            PackedRows(path, data, **ids) as rows,
            contextlib.closing(load_batches(rows, BATCH_SIZE, 0, num_threads=NUM_THREADS)) as batches,
        ):
            yield batches

    def count(batch) -> int:
        return int(np.count_nonzero(batch.encoder_segment_ids) + np.count_nonzero(batch.decoder_segment_ids))

    return opened(), count


def peer(path: Path, data: DataConfig) -> Side:
    """Grain's pipeline, with its packer."""
    manifest = read_json(path / MANIFEST)
    dtype = token_dtype(manifest["vocab_size"])
    lengths = {"source": data.max_source_tokens, "target": data.max_target_tokens}

    def parse(record: bytes) -> dict[str, np.ndarray]:
        example = unpack_record(record, dtype)
        return {name: getattr(example, name)[: lengths[name]] for name in lengths}

    @contextlib.contextmanager
    def opened() -> Iterator[Iterator]:
        source: Any = grain.sources.ArrayRecordDataSource([str(path / shard["file"]) for shard in manifest["shards"]])
        examples = grain.MapDataset.source(source).shuffle(seed=0).map(parse).repeat()
        stream = examples.to_iter_dataset(grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=500))
        packed = FirstFitPackIterDataset(stream, length_struct=lengths, num_packing_bins=128)
        yield iter(packed.batch(BATCH_SIZE))

    def count(batch) -> int:
        return int(sum(np.count_nonzero(batch[f"{name}_segment_ids"]) for name in lengths))

    return opened(), count


def time_packing(path: Path) -> None:
    """Print how fast a table is made, and how full its rows are."""
    with ExampleShards(path) as shards:
        for source, target in LENGTHS:
            lengths = row_lengths(shards, DataConfig(source, target))
            began = time.perf_counter()
            num_rows = sum(1 for _ in pack_examples(lengths, source, target))
            seconds = time.perf_counter() - began
            full = lengths.sum(axis=0) / (num_rows * np.array([source, target]))
            print(f"packing table {source}/{target}: {len(lengths) / seconds:,.0f} examples/s, "
                  f"rows full by {100 * full[0]:.1f} % (source) and {100 * full[1]:.1f} % (target)")  # fmt: skip


def write_random(folder: Path, corruption: SpanCorruption | None) -> Path:
    """Examples with lengths spread as those of real documents are: many of them long, some short."""
    folder.mkdir()
    random, dtype = np.random.default_rng(0), token_dtype(VOCAB_SIZE)
    sizes = np.minimum(random.lognormal(5.2, 0.8, (NUM_EXAMPLES, 1)) * (1.0, 0.28), (480, 120)).astype(int) + 4
    if corruption is not None:
        sizes[:, 1] = 0
    tokens = random.integers(200, VOCAB_SIZE, int(sizes.sum())).astype(dtype)
    ends = np.cumsum(sizes.ravel()).reshape(sizes.shape)
    parts = np.array_split(np.arange(NUM_EXAMPLES), 4)
    shards = [
        write_shard(
            folder / shard_name(at, 4),
            (
                pack_record(tokens[s - n : s], tokens[t - m : t], dtype)
                for (n, m), (s, t) in zip(sizes[part], ends[part])
            ),
        )
        for at, part in enumerate(parts)
    ]
    save_array(folder / "lengths.npy", sizes.astype(np.int32))
    write_manifest(
        folder, shards=shards, config={}, documents={}, num_unknown_tokens=0, vocab_size=VOCAB_SIZE,
        tokenizer_fingerprint="random", pad_id=PAD, start_id=START, end_id=END, corruption=corruption,
    )  # fmt: skip
    return folder


if __name__ == "__main__":
    main()
