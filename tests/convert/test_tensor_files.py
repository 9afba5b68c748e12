import contextlib
import json
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from t5pegasus.convert.flax_msgpack import flatten_arrays, read_tree
from t5pegasus.convert.tensor_files import read_tensors
from t5pegasus.errors import ArtifactError, UsageError

in_one_folder = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
GENERATOR = np.random.default_rng(2)
TENSORS = {
    name: GENERATOR.normal(size=shape).astype(np.float32)
    for name, shape in {"shared.weight": (6, 4), "block.0.q.weight": (4, 3), "norm.weight": (4,)}.items()
}
FLAX_TREE = {
    "shared": {"embedding": TENSORS["shared.weight"]},
    "block": {"0": {"q": {"kernel": TENSORS["block.0.q.weight"].T}}},
    "norm": {"weight": TENSORS["norm.weight"]},
}
"""The same under Flax's names, kernels as [in, out]."""


def assert_same(read: dict[str, np.ndarray], written: dict[str, np.ndarray] = TENSORS):
    assert read.keys() == written.keys()
    for name, array in written.items():
        np.testing.assert_array_equal(read[name], array)


def write_flax(path: Path, tree) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize(tree))


def write_shards(folder: Path, **changes) -> None:
    first = {"shared.weight": TENSORS["shared.weight"]}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    second = {name: array for name, array in TENSORS.items() if name not in first}
    save_file(second, folder / "model-00002-of-00002.safetensors")
    shard_of = {name: f"model-0000{1 + (name not in first)}-of-00002.safetensors" for name in TENSORS}
    index = {"metadata": {"total_size": 1}, "weight_map": shard_of | changes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def test_every_format_gives_the_same_tensors(tmp_path: Path):
    for name in ("whole", "shards", "flax", "flax_shards"):
        (tmp_path / name).mkdir()
    save_file(TENSORS, tmp_path / "whole" / "model.safetensors")
    write_shards(tmp_path / "shards")
    write_flax(tmp_path / "flax" / "flax_model.msgpack", FLAX_TREE)
    shard = "flax_model-00001-of-00001.msgpack"
    write_flax(tmp_path / "flax_shards" / shard, FLAX_TREE)
    index = {"weight_map": dict.fromkeys(("shared/embedding", "block/0/q/kernel", "norm/weight"), shard)}
    (tmp_path / "flax_shards" / "flax_model.msgpack.index.json").write_text(json.dumps(index), encoding="utf-8")
    for folder in sorted(tmp_path.iterdir()):
        assert_same(read_tensors(folder))


def test_safetensors_come_first_then_torch_then_flax(tmp_path: Path):
    write_flax(tmp_path / "flax_model.msgpack", FLAX_TREE)
    assert_same(read_tensors(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"no zip")
    with pytest.raises(ArtifactError, match=r"pytorch_model\.bin"):
        read_tensors(tmp_path)
    write_shards(tmp_path)
    assert_same(read_tensors(tmp_path))
    save_file({"one": np.ones(2)}, tmp_path / "model.safetensors")
    assert read_tensors(tmp_path).keys() == {"one"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": "model-00003-of-00002.safetensors"}, r"model-00003-of-00002\.safetensors does not exist"),
        ({"lost": "model-00002-of-00002.safetensors"}, "names tensor lost, .* does not hold it"),
        ({"norm.weight": "model-00001-of-00002.safetensors"}, "names tensor norm.weight, .*00001.* does not hold"),
        ({"shared.weight": "../model.safetensors"}, "a file beside it was wanted"),
        ({"shared.weight": "/etc/passwd"}, "a file beside it was wanted"),
        ({"shared.weight": ""}, "a file beside it was wanted|does not exist"),
        ({"shared.weight": 3}, "no weight_map"),
    ],
)
def test_an_index_and_its_shards_must_agree(tmp_path: Path, changes: dict, message: str):
    write_shards(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=message):
        read_tensors(tmp_path)


def test_a_shard_holds_nothing_that_the_index_does_not_name(tmp_path: Path):
    write_shards(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    del index["weight_map"]["norm.weight"]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"does not name tensor norm\.weight"):
        read_tensors(tmp_path)
    for broken in ("[" * 100_000, '{"weight_map": ' + "9" * 5000 + "}", "{", "\xff"):
        (tmp_path / "model.safetensors.index.json").write_text(broken, encoding="latin-1")
        with pytest.raises((UsageError, ArtifactError), match=r"index\.json"):
            read_tensors(tmp_path)


def test_a_folder_without_weights_says_what_is_read(tmp_path: Path):
    with pytest.raises(ArtifactError, match=r"model\.safetensors, pytorch_model\.bin, flax_model\.msgpack.*save_pret"):
        read_tensors(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"tf_model\.h5 is not read here"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x09\x00\x00\x00\x00\x00\x00\x00" + b'{"a":1}  ')
    with pytest.raises(ArtifactError, match="damaged"):
        read_tensors(tmp_path)


def test_flax_trees_are_read_as_flax_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = {
        "dtypes": {
            name: np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
            for name in ("bfloat16", "float16", "float32", "float64", "int8", "int32", "int64", "uint8", "bool")
        },
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "plain": {"version": 3, "name": "adafactor", "none": None},
        "chunked": np.arange(50, dtype=np.float32).reshape(5, 10),
        "chunked_flat": np.arange(17, dtype=np.int16),
    }
    # As for arrays above 1 GiB.
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 32)
    write_flax(tmp_path / "tree", tree)
    assert b"__msgpack_chunked_array__" in (tmp_path / "tree").read_bytes()
    read = read_tree(tmp_path / "tree")
    assert read["plain"] == tree["plain"]
    assert read["scalar"] == np.float32(2.5)
    del read["plain"], tree["plain"]
    arrays, wanted = flatten_arrays(read, tmp_path), flatten_arrays(tree | {"scalar": np.array(2.5)}, tmp_path)
    for name, array in wanted.items():
        assert arrays[name].shape == array.shape
        assert arrays[name].dtype == array.dtype or name == "scalar"
        np.testing.assert_array_equal(arrays[name], array)


def extension(shape, dtype, content: bytes, code: int = 1) -> msgpack.ExtType:
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "a dict of arrays was wanted"),
        ({"a": extension([2], "float32", bytes(7))}, "has 7 bytes"),
        ({"a": extension([-1], "float32", b"")}, "something else than sizes"),
        ({"a": extension([2.0], "float32", bytes(8))}, "something else than sizes"),
        ({"a": extension([True], "float32", bytes(4))}, "something else than sizes"),
        ({"a": extension("ab", "float32", bytes(4))}, "has no shape"),
        ({"a": extension([0] * 40, "float32", b"")}, "has no shape"),
        ({"a": extension([1], "object", bytes(8))}, "'object', which is no number type"),
        ({"a": extension([1], "V8", bytes(8))}, "'V8'"),
        ({"a": extension([1], 3, bytes(8))}, "'3'"),
        ({"a": extension([1], "float32", "text")}, "is not"),
        ({"a": extension([1], "complex64", bytes(8))}, "complex64"),
        ({"a": msgpack.ExtType(2, b"")}, "extension type 2"),
        ({"a": msgpack.ExtType(1, b"\xc1")}, "damaged"),
        ({"a": {"__msgpack_chunked_array__": True}}, "no flat pieces"),
        ({"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": {"1": 1}}}, "no flat pieces"),
        (
            {
                "a": {
                    "__msgpack_chunked_array__": True,
                    "shape": {"0": 2**61},
                    "chunks": {"0": extension([1], "int8", b"1")},
                }
            },
            "do not fill",
        ),
        ({"a": {b"b": 1}}, "no names"),
    ],
)
def test_hostile_trees_are_refused(tmp_path: Path, value, message: str):
    (tmp_path / "tree").write_bytes(msgpack.packb(value))
    with pytest.raises(ArtifactError, match=message):
        read_tree(tmp_path / "tree")


def test_depth_and_leaves_are_bounded(tmp_path: Path):
    for content in (
        b"\x81\xa1a" * 900 + b"\x80",
        b"\x81\xa1a" * 100_000,
        b"\xdf\xff\xff\xff\xff",
        b"\xdd\xff\xff\xff\xff",
    ):
        (tmp_path / "tree").write_bytes(content)
        with pytest.raises(ArtifactError):
            read_tree(tmp_path / "tree")
    with pytest.raises(ArtifactError, match="a/b holds a int"):
        flatten_arrays({"a": {"b": 3}}, tmp_path)


@in_one_folder
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_trees_are_read_or_refused(tmp_path: Path, places):
    """Msgpack has no checksum, so that changed numbers are read; nothing else than the error for users is raised."""
    content = bytearray(flax.serialization.msgpack_serialize(FLAX_TREE | {"n": 3}))
    for where, byte in places:
        content[int(where * len(content))] = byte
    (tmp_path / "tree").write_bytes(content)
    with contextlib.suppress(ArtifactError):
        flatten_arrays(read_tree(tmp_path / "tree"), tmp_path)


@in_one_folder
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes):
    for name in ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack"):
        (tmp_path / name).write_bytes(data)
        with contextlib.suppress(ArtifactError):
            assert read_tensors(tmp_path) == {}
        (tmp_path / name).unlink()
