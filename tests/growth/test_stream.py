"""Laws of growth out of core: few blocks in memory, and the same bytes whoever writes them, however often killed."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import growth.stream
from growth.execution import execute_growth
from growth.grow import grow_state
from growth.journal import Journal, begin_growth, checkpoint_folder
from growth.stream import KnownArray, gather_statistics, write_leaves
from growth.t5 import plan_growth
from t5pegasus.arrays import load_arrays, open_arrays
from t5pegasus.checkpoint import load_checkpoint_info, save_arrays, verify_checkpoint
from t5pegasus.errors import ArtifactError
from t5pegasus.manifest import MANIFEST
from t5pegasus.train.state import arrays_to_state, state_to_arrays

CHUNK, BLOCK = 4096, 1024
SIZES = {"d_model": 40, "d_ff": 96, "num_heads": 3, "num_decoder_layers": 3, "vocab_size": 140}
NAME = "parameters.x"


class Repeated:
    """Every row of the source twice; remembers what it is asked for, and how much of that is in memory."""

    reads_source = True

    def __init__(self, source: np.ndarray):
        self.shape = (2 * source.shape[0], *source.shape[1:])
        self.dtype = source.dtype
        self.asked: list[tuple[slice, ...]] = []
        self.bytes = self.most_bytes = 0
        self._lock = threading.Lock()

    def source_slices(self, target):
        return (slice(target[0].start // 2, (target[0].stop + 1) // 2), *target[1:])

    def compute(self, block, target):
        grown = block[np.arange(target[0].start, target[0].stop) // 2 - target[0].start // 2]
        with self._lock:
            self.asked.append(target)
            for array in (block, grown):
                self.bytes += array.nbytes
                weakref.finalize(array, self._forget, array.nbytes)
            self.most_bytes = max(self.most_bytes, self.bytes)
        return grown

    def _forget(self, num_bytes):
        self.bytes -= num_bytes


class Tree:
    """A stored array, its leaf, and folders to grow it into."""

    def __init__(self, path: Path):
        self.path = path
        self.array = np.random.default_rng(0).standard_normal((300, 50)).astype(np.float32)
        save_arrays(path, {NAME: self.array})
        self.stored = open_arrays(path)

    def write(self, unfinished: Path, leaf: Repeated | None = None, **options):
        begin_growth(unfinished, {"plan_hash": "a" * 64})
        leaves = {NAME: leaf or Repeated(self.array), "step": KnownArray(np.asarray(7, np.int32))}
        with Journal(unfinished) as journal:
            return write_leaves(
                checkpoint_folder(unfinished), self.stored, leaves, journal, chunk_bytes=CHUNK, **options
            )


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Tree:
    monkeypatch.setattr(growth.stream, "BLOCK_BYTES", BLOCK)
    return Tree(tmp_path / "source")


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_only_a_few_blocks_are_in_memory(tree, tmp_path):
    leaf = Repeated(tree.array)
    report = tree.write(tmp_path / "grown", leaf, num_threads=3)
    np.testing.assert_array_equal(load_arrays(checkpoint_folder(tmp_path / "grown"))[NAME], tree.array.repeat(2, 0))
    assert leaf.most_bytes <= 3 * 2 * 2 * BLOCK  # per thread a block and its source, and those of the block before
    assert report.bytes_written >= 2 * tree.array.nbytes
    assert report.bytes_read <= 1.3 * tree.array.nbytes


def test_interrupted_it_goes_on_and_writes_the_same_bytes(tree, tmp_path):
    whole = tree.write(tmp_path / "whole")
    done = []

    def interrupt(num_bytes):
        done.append(num_bytes)
        if sum(done) > whole.bytes_written / 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tree.write(tmp_path / "broken", num_threads=1, advance=interrupt)
    leaf = Repeated(tree.array)
    report = tree.write(tmp_path / "broken", leaf)
    assert report.bytes_found == sum(done)
    assert report.bytes_found + report.bytes_written == whole.bytes_written
    assert sum(np.zeros(leaf.shape)[target].size for target in leaf.asked) < 0.7 * 2 * tree.array.size
    assert all_bytes(checkpoint_folder(tmp_path / "broken")) == all_bytes(checkpoint_folder(tmp_path / "whole"))
    again = tree.write(tmp_path / "broken")
    assert (again.bytes_written, again.bytes_found) == (0, whole.bytes_written)


def test_what_was_damaged_while_unfinished_is_written_again(tree, tmp_path, caplog):
    tree.write(tmp_path / "grown")
    folder = checkpoint_folder(tmp_path / "grown")
    wanted = all_bytes(folder)
    changed, absent, short = sorted((folder / "arrays" / NAME / "c").glob("*/*"))[:3]
    changed.write_bytes(bytes([changed.read_bytes()[0] ^ 1]) + changed.read_bytes()[1:])
    absent.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    leaf = Repeated(tree.array)
    report = tree.write(tmp_path / "grown", leaf)
    assert all_bytes(folder) == wanted
    assert report.bytes_written == 3 * len(wanted[str(changed.relative_to(folder))])
    for path in (changed, absent, short):
        assert f"{path} was damaged" in caplog.text


def test_a_line_that_was_cut_short_does_not_count_and_hides_no_other(tree, tmp_path):
    tree.write(tmp_path / "grown")
    journal = tmp_path / "grown" / "journal-0.jsonl"
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]) + lines[-1][:20], encoding="utf-8")
    assert tree.write(tmp_path / "grown").bytes_written == json.loads(lines[-1])["bytes"]
    assert tree.write(tmp_path / "grown").bytes_written == 0


def test_an_unfinished_growth_of_something_else_is_refused(tree, tmp_path):
    tree.write(tmp_path / "grown")
    before = all_bytes(tmp_path / "grown")
    with pytest.raises(ArtifactError, match=rf"plan_hash is {'a' * 64}, this one's is {'b' * 64}; .*delete the folder"):
        begin_growth(tmp_path / "grown", {"plan_hash": "b" * 64})
    assert all_bytes(tmp_path / "grown") == before
    (tmp_path / "grown" / "growth.json").unlink()  # nothing says what was begun: it begins anew
    begin_growth(tmp_path / "grown", {"plan_hash": "b" * 64})
    assert list(checkpoint_folder(tmp_path / "grown").iterdir()) == []


@pytest.mark.parametrize("process_count", [2, 3])
def test_several_processes_write_what_one_does_each_its_share(tree, tmp_path, process_count):
    whole = tree.write(tmp_path / "whole")
    begin_growth(tmp_path / "shared", {"plan_hash": "a" * 64})
    written = []
    for process_index in range(process_count):
        leaves = {NAME: Repeated(tree.array), "step": KnownArray(np.asarray(7, np.int32))}
        with Journal(tmp_path / "shared", process_index) as journal:
            report = write_leaves(
                checkpoint_folder(tmp_path / "shared"), tree.stored, leaves, journal,
                process_index=process_index, process_count=process_count, chunk_bytes=CHUNK,
            )  # fmt: skip
        written.append(report.bytes_written)
    assert sum(written) == whole.bytes_written
    assert max(written) <= whole.bytes_written / process_count + CHUNK
    assert all_bytes(checkpoint_folder(tmp_path / "shared")) == all_bytes(checkpoint_folder(tmp_path / "whole"))
    # One process finds what several have written.
    assert tree.write(tmp_path / "shared").bytes_written == 0


def test_an_error_ends_it_and_what_was_finished_is_found(tree, tmp_path, monkeypatch):
    write_chunk, calls = growth.stream.write_chunk, []

    def fill_disk(path, chunk):
        calls.append(path)
        if len(calls) > 4:
            raise OSError(28, os.strerror(28))
        return write_chunk(path, chunk)

    monkeypatch.setattr(growth.stream, "write_chunk", fill_disk)
    with pytest.raises(OSError, match=os.strerror(28)):
        tree.write(tmp_path / "grown", num_threads=2)
    assert len(calls) <= 4 + 2
    monkeypatch.undo()
    assert tree.write(tmp_path / "grown").bytes_found == 4 * (CHUNK // 200 * 200)


def test_a_leaf_of_another_shape_than_it_says_is_refused(tree, tmp_path):
    class Wrong(Repeated):
        def compute(self, block, target):
            return super().compute(block, target)[:1]

    with pytest.raises(TypeError, match=r"parameters\.x: block .* was wanted"):
        tree.write(tmp_path / "grown", Wrong(tree.array))


def test_statistics_do_not_depend_on_the_number_of_threads(tree):
    class Sum:
        def __init__(self):
            self.values = []

        def add(self, block, target):
            self.values.append((block.sum(), target))

        def finish(self):
            return self.values

    one, three = (gather_statistics(tree.stored, {NAME: Sum()}, num_threads) for num_threads in (1, 3))
    assert one == three
    assert len(one[NAME]) > 10


# Of real checkpoints.


def prepare(checkpoint_path: Path):
    info = load_checkpoint_info(checkpoint_path)
    grown = plan_growth(info.config.model, dataclasses.replace(info.config.model, **SIZES), step=info.step)
    info = dataclasses.replace(info, config=dataclasses.replace(info.config, model=grown.target))
    return (
        grown,
        info,
        {"plan_hash": grown.hash, "source_fingerprint": verify_checkpoint(checkpoint_path)["fingerprint"]},
    )


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(growth.stream, "BLOCK_BYTES", 4 * BLOCK)
    monkeypatch.setattr(growth.execution, "CHUNK_BYTES", 4 * CHUNK)


def test_out_of_core_and_in_memory_give_the_same_bits(checkpoint_path, tmp_path, small_chunks):
    planned, info, identity = prepare(checkpoint_path)
    report = execute_growth(checkpoint_path, planned, tmp_path / "grown", info, identity)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]
    verify_checkpoint(tmp_path / "grown")
    assert load_checkpoint_info(tmp_path / "grown") == info
    grown = load_arrays(tmp_path / "grown")
    wanted = state_to_arrays(grow_state(arrays_to_state(load_arrays(checkpoint_path)), planned))
    assert grown.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (grown[name].dtype, grown[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(grown[name], array, err_msg=name)
    assert report.bytes_written >= sum(array.nbytes for array in wanted.values())


def test_a_check_that_fails_leaves_no_checkpoint_and_one_that_is_stopped_loses_nothing(
    checkpoint_path, tmp_path, small_chunks
):
    planned, info, identity = prepare(checkpoint_path)
    output = tmp_path / "grown"
    seen = []

    def stop(folder):
        seen.append(load_arrays(folder).keys())
        assert load_checkpoint_info(folder) == info
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute_growth(checkpoint_path, planned, output, info, identity, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["grown.unfinished"]
    report = execute_growth(
        checkpoint_path, planned, output, info, identity,
        lambda folder: (folder / "receipt.json").write_text("{}", encoding="utf-8"),
    )  # fmt: skip
    assert report.bytes_written == 0
    assert "receipt.json" in verify_checkpoint(output)["files"]
    assert seen == [load_arrays(output).keys()]

    def refuse(folder):
        raise ArtifactError("not the same function")

    with pytest.raises(ArtifactError, match="not the same function"):
        execute_growth(checkpoint_path, planned, tmp_path / "other", info, identity, refuse)
    assert [path.name for path in tmp_path.iterdir()] == ["grown"]


GROW = """
import sys, time
from pathlib import Path
import growth.execution, growth.stream
from tests.growth.test_stream import BLOCK, CHUNK, prepare
growth.stream.BLOCK_BYTES, growth.execution.CHUNK_BYTES = 4 * BLOCK, 4 * CHUNK
checkpoint, output, delay = sys.argv[1:]
write_chunk = growth.stream.write_chunk
def write_slowly(path, chunk):
    time.sleep(float(delay))
    return write_chunk(path, chunk)
growth.stream.write_chunk = write_slowly
planned, info, identity = prepare(Path(checkpoint))
print("begin", flush=True)
print(growth.execution.execute_growth(Path(checkpoint), planned, Path(output), info, identity))
"""


def start(checkpoint_path: Path, output: Path, delay: float) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "JAX_NUM_CPU_DEVICES": "1"}
    line = [sys.executable, "-c", GROW, str(checkpoint_path), str(output), str(delay)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_at_random_moments(checkpoint_path: Path, folder: Path, moments: list[float]) -> int:
    """Kill a growth at these times after its beginning, one call after another, then let it end.

    Returns:
        How many of the calls were killed before they had ended.
    """
    output, killed = folder / "grown", 0
    for moment in moments:
        process = start(checkpoint_path, output, 0.02)
        assert process.stdout is not None
        assert process.stdout.readline() == "begin\n"
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        if output.exists():
            break
    if not output.exists():
        process = start(checkpoint_path, output, 0)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return killed


TWENTY = [[random.Random(place).uniform(0, 1) for _ in range(5)] for place in range(4)]


@pytest.mark.parametrize("rounds", [[[0.4]], pytest.param(TWENTY, marks=pytest.mark.slow)], ids=["once", "20 times"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(checkpoint_path, tmp_path, small_chunks, rounds):
    planned, info, identity = prepare(checkpoint_path)
    execute_growth(checkpoint_path, planned, tmp_path / "whole", info, identity)
    wanted = all_bytes(tmp_path / "whole")
    for place, moments in enumerate(rounds):
        folder = tmp_path / str(place)
        folder.mkdir()
        assert kill_at_random_moments(checkpoint_path, folder, moments) >= 1
        assert [path.name for path in folder.iterdir()] == ["grown"]
        assert all_bytes(folder / "grown") == wanted
        assert MANIFEST in wanted
