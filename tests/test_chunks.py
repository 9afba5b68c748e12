"""Laws of arrays on disk: chunks are small, any block of any layout reads the same, and Orbax reads what we write."""

import math
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st

import t5pegasus.checkpoint.snapshot
from t5pegasus.arrays import load_arrays, open_arrays
from t5pegasus.checkpoint import save_arrays
from t5pegasus.chunks import (
    ChunkBuffer,
    StoredArray,
    choose_chunk_shape,
    cut_rows,
    describe_array,
    describe_arrays,
    list_chunks,
    write_chunk,
)
from t5pegasus.errors import ArtifactError

LIMIT = 6000
SHAPES = {"parameters.stacked": (3, 42, 50), "parameters.table": (101, 30), "parameters.gain": (70,), "step": ()}
shapes = st.lists(st.integers(1, 12), max_size=4).map(tuple)


def draw_arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def write_own(folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, dict]:
    """The arrays as growth writes them."""
    (folder / "arrays").mkdir(parents=True)
    entries = {}
    for name, content in describe_arrays(list(arrays)).items():
        (folder / "arrays" / name).write_bytes(content)
    for name, array in arrays.items():
        chunk_shape = choose_chunk_shape(array.shape, array.itemsize, LIMIT)
        (folder / "arrays" / name).mkdir()
        (folder / "arrays" / name / "zarr.json").write_bytes(describe_array(array.shape, array.dtype, chunk_shape))
        for file, part in list_chunks(array.shape, chunk_shape):
            chunk = ChunkBuffer(LIMIT).view(chunk_shape, array.dtype)
            chunk[tuple(slice(each.stop - each.start) for each in part)] = array[part]
            path = folder / "arrays" / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            entries[f"arrays/{name}/{file}"] = write_chunk(path, chunk)
    return entries


def save_whole_and_compressed(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The arrays as versions before chunks wrote them."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as writer:
        writer.save(folder / "arrays", args=ocp.args.PyTreeSave(arrays))


def save_with_orbax(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """The arrays as versions before our own writer wrote them: plain values, with an index behind each chunk."""
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, use_compression=False)
    save_args = {
        name: ocp.SaveArgs(chunk_byte_size=LIMIT, shard_axes=(0,) if array.ndim > 2 else ())
        for name, array in arrays.items()
    }
    with ocp.Checkpointer(handler) as writer:
        writer.save(folder / "arrays", args=ocp.args.PyTreeSave(arrays, save_args=save_args))


def save_from_mesh(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    mesh = jax.make_mesh((2, 2), ("a", "b"))
    spec = {3: jax.P(None, None, "b"), 2: jax.P(None, "b"), 1: jax.P("a"), 0: jax.P()}
    save_arrays(
        folder,
        {
            name: jax.device_put(array, jax.sharding.NamedSharding(mesh, spec[array.ndim]))
            for name, array in arrays.items()
        },
    )


WRITERS = {
    "growth": write_own, "own": save_arrays, "mesh": save_from_mesh, "orbax": save_with_orbax,
    "compressed": save_whole_and_compressed,
}  # fmt: skip


@given(shapes, st.sampled_from([1, 2, 4, 8]), st.integers(8, 2000))
def test_chunks_are_consecutive_rows_of_bounded_size_that_cover_the_array(shape, itemsize, limit):
    chunk_shape = choose_chunk_shape(shape, itemsize, limit)
    assert math.prod(chunk_shape) * itemsize <= limit
    cut = next((place for place, size in enumerate(chunk_shape) if size > 1), len(shape))
    assert chunk_shape[cut + 1 :] == shape[cut + 1 :]
    array = np.zeros(shape, np.int32)
    for _, part in list_chunks(shape, chunk_shape):
        array[part] += 1
    assert (array == 1).all()


@given(shapes, st.data(), st.integers(8, 500))
def test_no_chunk_lies_in_two_shards(shape, data, limit):
    splits = [data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) for size in shape]
    shard = tuple(size // split for size, split in zip(shape, splits))
    chunk_shape = choose_chunk_shape(shape, 4, limit, shard)
    assert math.prod(chunk_shape) * 4 <= max(limit, 4)
    for _, part in list_chunks(shape, chunk_shape):
        assert all(each.start // size == (each.stop - 1) // size for each, size in zip(part, shard))


@given(shapes, st.integers(8, 500))
def test_a_part_is_cut_into_blocks_of_bounded_size_that_cover_it(shape, limit):
    part = tuple(slice(size // 3, size) for size in shape)
    array = np.zeros(shape, np.int32)
    for block in cut_rows(part, 4, limit):
        array[block] += 1
        assert array[block].nbytes <= limit
    assert (array[part] == 1).all()
    assert array.sum() == array[part].size


@pytest.mark.parametrize("writer", WRITERS)
def test_any_block_of_any_layout_is_read_and_orbax_reads_all(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(t5pegasus.checkpoint.snapshot, "CHUNK_BYTES", LIMIT)
    arrays = draw_arrays()
    WRITERS[writer](tmp_path, arrays)
    stored = open_arrays(tmp_path)
    assert stored.keys() == arrays.keys()
    random = np.random.default_rng(1)
    for name, array in arrays.items():
        assert (stored[name].shape, stored[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(stored[name].read(), array)
        for _ in range(30):
            part = tuple(slice(*sorted(random.choice(size + 1, 2, replace=False))) for size in array.shape)
            np.testing.assert_array_equal(stored[name].read(part), array[part])
        stored[name].release()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as reader:
        read = reader.restore(tmp_path / "arrays", args=ocp.args.PyTreeRestore())
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
    mesh = jax.make_mesh((2,), ("x",))
    shardings = {
        name: jax.sharding.NamedSharding(mesh, jax.P(*[None] * (array.ndim - 1), *["x"] * (array.ndim > 0)))
        for name, array in arrays.items()
    }
    placed = load_arrays(tmp_path, shardings=shardings)
    for name, array in load_arrays(tmp_path).items():
        np.testing.assert_array_equal(array, arrays[name])
        np.testing.assert_array_equal(placed[name], arrays[name])
        assert placed[name].sharding == shardings[name]


@pytest.mark.parametrize("writer", ["growth", "own", "mesh", "orbax"])
def test_saved_chunks_are_of_bounded_size_and_stacked_layers_lie_apart(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(t5pegasus.checkpoint.snapshot, "CHUNK_BYTES", LIMIT)
    WRITERS[writer](tmp_path, draw_arrays())
    files = [file for file in tmp_path.glob("arrays/*/c/**/*") if file.is_file()]
    assert len(files) > 3 + 3
    index_bytes = 20
    assert max(file.stat().st_size for file in files) <= LIMIT + index_bytes
    stacked = ts.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "arrays" / "parameters.stacked")}}
    ).result()
    assert stacked.chunk_layout.read_chunk.shape[0] == 1


def test_a_large_compressed_chunk_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr("t5pegasus.chunks.CHUNK_BYTES", LIMIT)
    arrays = draw_arrays()
    save_whole_and_compressed(tmp_path, arrays)
    stored = StoredArray(tmp_path / "arrays" / "parameters.stacked")
    part = (slice(1, 2), slice(3, 9), slice(0, 50))
    first = stored.read(part)
    for file in tmp_path.glob("arrays/parameters.stacked/c/**/*"):
        if file.is_file():
            file.unlink()
    np.testing.assert_array_equal(stored.read(part), first)
    np.testing.assert_array_equal(first, arrays["parameters.stacked"][part])


@pytest.mark.parametrize("writer", ["own", "orbax"])
def test_a_block_is_read_from_its_part_of_the_file_alone(writer, tmp_path):
    array = np.arange(1000, dtype=np.int32).reshape(100, 10)
    WRITERS[writer](tmp_path, {"rows": array})
    (file,) = (tmp_path / "arrays" / "rows" / "c").glob("*/*")
    with file.open("r+b") as opened:
        opened.truncate(50 * 40)
    stored = StoredArray(tmp_path / "arrays" / "rows")
    np.testing.assert_array_equal(stored.read((slice(20, 50), slice(0, 10))), array[20:50])
    with pytest.raises(ArtifactError, match=r"c/0/0 is cut short"):
        stored.read((slice(20, 51), slice(0, 10)))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.uint32, np.int64, np.bool_])
def test_other_dtypes_are_written_and_read_too(dtype, tmp_path):
    array = (np.arange(4000).reshape(50, 80) % 7).astype(dtype)
    write_own(tmp_path, {"x": array})
    np.testing.assert_array_equal(load_arrays(tmp_path)["x"], array)
    np.testing.assert_array_equal(open_arrays(tmp_path)["x"].read(), array)


@pytest.mark.parametrize("num_bytes", [1, 4096, 5000, 8192])
@pytest.mark.parametrize("aligned", [True, False])
def test_a_chunk_is_written_as_it_is_wherever_it_lies(num_bytes, aligned, tmp_path):
    content = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    memory = ChunkBuffer(num_bytes + 1).view((num_bytes + 1,), np.dtype(np.uint8))
    chunk = memory[:num_bytes] if aligned else memory[1:]
    chunk[:] = content
    entry = write_chunk(tmp_path / "0", chunk)
    assert (tmp_path / "0").read_bytes() == content.tobytes()
    assert entry["bytes"] == num_bytes
