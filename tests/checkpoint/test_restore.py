"""Laws of restoring: any mesh, any number of processes, any part; each process reads what its devices hold, once."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import t5pegasus.arrays
import t5pegasus.checkpoint.load
from t5pegasus.arrays import load_arrays
from t5pegasus.checkpoint import (
    find_together,
    load_matching,
    load_together,
    save_checkpoint,
    verify_checkpoint,
)
from t5pegasus.errors import ArtifactError, UsageError
from tests.checkpoint.conftest import draw_arrays, info_of, make_shardings, place, save_step, write_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


def require_equal(arrays, wanted):
    assert arrays.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.asarray(arrays[name]), array, err_msg=name)


@pytest.mark.parametrize(
    "chain",
    [
        [(8, 1, 1), (4, 1, 1), (1, 1, 1), (8, 1, 1)],
        [(1, 4, 2), (1, 2, 2), (1, 1, 1), (2, 2, 2)],
        [(1, 8, 1), (1, 1, 8), (8, 1, 1), (2, 4, 1)],
    ],
)
def test_a_state_goes_from_mesh_to_mesh_bit_for_bit(chain, tmp_path):
    tokenizer_path, wanted = write_tokenizer(tmp_path), draw_arrays(1)
    state = place(wanted, chain[0])
    for place_in_chain, sizes in enumerate(chain[1:]):
        path = tmp_path / str(place_in_chain)
        save_checkpoint(path, state, info_of(1), tokenizer_path)
        verify_checkpoint(path)
        shardings = make_shardings(sizes)
        state = load_together(path, shardings)
        require_equal(state, wanted)
        assert {name: array.sharding for name, array in state.items()} == shardings


def test_prefixes_are_whole_parts_of_names(tmp_path):
    names = ("ema.mlp.wi", "ema.mlp.wi_0", "ema.mlp.wi.deeper", "ema_of_ema.mlp.wi")
    arrays = {name: np.full((2, 3), index, np.float32) for index, name in enumerate(names)}
    save_checkpoint(tmp_path / "1", arrays, info_of(1), write_tokenizer(tmp_path))

    def load(*prefixes):
        return sorted(load_arrays(tmp_path / "1", prefixes))

    assert load("ema.mlp.wi") == ["ema.mlp.wi", "ema.mlp.wi.deeper"]
    assert load("ema") == load("ema.") == sorted(names[:3])
    assert load("") == sorted(names)
    assert load("ema.mlp.w") == []


def test_a_restored_state_can_be_donated(tmp_path):
    path = save_step(tmp_path, 1)
    state = load_together(path, make_shardings((1, 2, 2)))
    update = jax.jit(lambda arrays: jax.tree.map(lambda x: x + 1, arrays), donate_argnums=0)
    after = update(dict(state))
    assert all(array.is_deleted() for array in state.values())
    require_equal(after, {name: array + 1 for name, array in draw_arrays(1).items()})


def test_each_chunk_is_read_once_and_only_where_it_is_needed(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    save_checkpoint(tmp_path / "1", place(draw_arrays(1), (1, 4, 2)), info_of(1), tmp_path / "tokenizer")
    read, fill = [], t5pegasus.arrays._fill

    def fill_and_count(path, content, look):
        read.append(str(path.relative_to(tmp_path / "1" / "arrays")))
        return fill(path, content, look)

    monkeypatch.setattr(t5pegasus.arrays, "_fill", fill_and_count)
    chunks = [str(each.relative_to(tmp_path / "1" / "arrays")) for each in (tmp_path / "1").glob("arrays/*/c/**/*")]
    chunks = [each for each in chunks if (tmp_path / "1" / "arrays" / each).is_file()]
    load_together(tmp_path / "1", make_shardings((2, 2, 2)))
    assert sorted(read) == sorted([*chunks, "step/c"])
    read.clear()
    table = load_arrays(tmp_path / "1", shardings={"parameters.table": half_of(jax.devices()[:1])})["parameters.table"]
    assert len(read) == len([each for each in chunks if each.startswith("parameters.table")])
    np.testing.assert_array_equal(table, draw_arrays(1)["parameters.table"])


def half_of(devices):
    return jax.sharding.NamedSharding(jax.make_mesh((1,), ("x",), devices=devices), jax.P("x"))


def test_part_of_a_checkpoint_is_read_by_pattern(tmp_path):
    path, wanted = save_step(tmp_path, 1), draw_arrays(1)
    shutil.rmtree(path / "arrays" / "first_moment.gain" / "c")  # which nobody asks for
    require_equal(load_matching(path, ["parameters.*"]), {n: a for n, a in wanted.items() if n.startswith("param")})
    require_equal(load_matching(path, ["*.table", "step"]), {n: wanted[n] for n in ("parameters.table", "step")})
    placed = load_matching(path, ["*.table"], make_shardings((1, 2, 4)))
    require_equal(placed, {"parameters.table": wanted["parameters.table"]})
    with pytest.raises(UsageError, match=r"no array matches 'encoder\.\*'"):
        load_matching(path, ["encoder.*"])


def test_an_array_that_is_not_there_is_named(tmp_path):
    path = save_step(tmp_path, 1)
    shardings = make_shardings((1, 1, 1))
    with pytest.raises(ArtifactError, match=r"has no array ema\.x \(1 missing\)"):
        load_together(path, {**shardings, "ema.x": shardings["step"]})


ONE_OF_SEVERAL = """
import sys
import jax
from pathlib import Path
run_path, port, count, index, step = Path(sys.argv[1]), *map(int, sys.argv[2:])
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
import numpy as np
from t5pegasus.checkpoint import CheckpointWriter, DamagedError, Retention, find_last_good, find_together, finish_saves
from t5pegasus.checkpoint import load_together, verify_structure
from t5pegasus.checkpoint.snapshot import take_snapshot
from tests.checkpoint.conftest import draw_arrays, info_of
from jax.sharding import NamedSharding
mesh = jax.make_mesh((jax.device_count() // 2, 2), ("fsdp", "tensor"))
specs = {3: (None, None, "fsdp"), 2: ("fsdp",), 1: ("tensor",), 0: ()}
wanted = draw_arrays(1)
wanted["parameters.layers"] = np.ones((3, 8, 12), np.float32) * np.arange(12, dtype=np.float32)
shardings = {name: NamedSharding(mesh, jax.P(*specs[array.ndim])) for name, array in wanted.items()}
finish_saves(run_path)
state = {n: jax.make_array_from_callback(a.shape, shardings[n], a.__getitem__) for n, a in wanted.items()}
damaged = []
hidden = [run_path / "checkpoints" / "9"] * (index == 2)  # as where a disk's listing lags behind
def find(others):
    return find_last_good(run_path, verify_structure, [*hidden, *damaged, *others])
last = find_together(run_path, find)
while last is not None:
    try:
        state = load_together(last, shardings)
        break
    except DamagedError as error:
        print(error)
        damaged.append(last)
        last = find_together(run_path, find)
for name, array in state.items():
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, wanted[name][shard.index])
with CheckpointWriter(run_path) as writer:
    writer.save(state, info_of(step), Retention(last=9))
    assert take_snapshot(state, index).chunks  # each process has its share
"""


def continue_with(run_path, count, devices, step):
    """What each of so many processes says of the checkpoint it continues from."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(REPOSITORY)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = [
        [sys.executable, "-c", ONE_OF_SEVERAL, *map(str, (run_path, port, count, index, step))]
        for index in range(count)
    ]
    running = [subprocess.Popen(each, cwd=REPOSITORY, env=environment, **pipes) for each in commands]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * count, said
    verify_checkpoint(run_path / "checkpoints" / str(step))
    return [out for out, _ in said]


def test_two_processes_then_one_then_three_bit_for_bit(tmp_path):
    write_tokenizer(tmp_path)
    assert not any("damaged" in each for each in continue_with(tmp_path, 2, 2, step=1))
    assert not any("damaged" in each for each in continue_with(tmp_path, 1, 4, step=2))
    first, second = (load_arrays(tmp_path / "checkpoints" / step) for step in "12")
    damaged = tmp_path / "checkpoints" / "2" / "arrays" / "parameters.table" / "c" / "1" / "0"
    damaged.write_bytes(damaged.read_bytes()[::-1])  # which the first process has no need to read
    shutil.copytree(tmp_path / "checkpoints" / "1", tmp_path / "checkpoints" / "9")
    said = continue_with(tmp_path, 3, 2, step=3)
    assert "process 1 found a damaged file" in said[0]
    assert all("parameters.table/c/1/0 is damaged" in each for each in said[1:])
    require_equal(second, first)
    require_equal(load_arrays(tmp_path / "checkpoints" / "3"), first)


def test_processes_that_do_not_see_the_same_folder_are_told_so(tmp_path, monkeypatch):
    path = save_step(tmp_path, 4)
    monkeypatch.setattr(t5pegasus.checkpoint.load, "find_process", lambda: (0, 2))
    gather = t5pegasus.checkpoint.load.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda step: np.array([step, -1]))
    with pytest.raises(ArtifactError, match="process 0 finds the checkpoint of step 4 there, process 1 finds none"):
        find_together(tmp_path, lambda others: path)
    monkeypatch.setattr(gather, "process_allgather", lambda step: np.array([step, step]))
    assert find_together(tmp_path, lambda others: path) == path


def test_arrays_that_come_one_after_the_other_share_no_memory(tmp_path, monkeypatch):
    """As where a state is larger than what is read ahead."""
    monkeypatch.setattr(t5pegasus.arrays, "_BYTES_AHEAD", 0)
    wanted = {f"parameters.{n:03}": np.full(16 * (1 + n % 40), n, np.float32) for n in range(160)}
    save_checkpoint(tmp_path / "1", wanted, info_of(1), write_tokenizer(tmp_path))
    everywhere = jax.sharding.NamedSharding(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), jax.P())
    require_equal(load_arrays(tmp_path / "1", shardings=dict.fromkeys(wanted, everywhere)), wanted)


def test_each_device_has_memory_of_its_own_that_an_update_may_write_to(tmp_path):
    wanted = {"parameters.table": np.arange(64 * 96, dtype=np.float32).reshape(64, 96), "step": np.int32(3)}
    save_checkpoint(tmp_path / "1", wanted, info_of(1), write_tokenizer(tmp_path))
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), devices=jax.devices()[:4])
    shardings = {
        "parameters.table": jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp")),
        "step": jax.sharding.NamedSharding(mesh, jax.P()),
    }
    loaded = load_arrays(tmp_path / "1", shardings=shardings)
    require_equal(loaded, wanted)
    shards = [shard.data for array in loaded.values() for shard in array.addressable_shards]
    places = [shard.unsafe_buffer_pointer() for shard in shards]
    assert len(set(places)) == len(shards) == 8
    table = loaded["parameters.table"]
    before = {shard.device: shard.data.unsafe_buffer_pointer() for shard in table.addressable_shards}
    after = jax.jit(lambda array: array + 1, donate_argnums=0)(table)
    assert {shard.device: shard.data.unsafe_buffer_pointer() for shard in after.addressable_shards} == before
    np.testing.assert_array_equal(after, wanted["parameters.table"] + 1)
