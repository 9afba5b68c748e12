import contextlib
import random
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from bundle_files import block, crc32c_by_bytes, entry, field, masked, table, varint, write_bundle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5pegasus.convert.crc32c import LANES, crc32c, masked_crc32c
from t5pegasus.convert.tensor_bundle import TensorBundle
from t5pegasus.errors import ArtifactError

GENERATOR = np.random.default_rng(1)
ARRAYS = {
    "decoder/block_000/layer_000/q": GENERATOR.normal(size=(5, 7)).astype(np.float32),
    "decoder/block_000/layer_000/k": GENERATOR.normal(size=(2, 3, 4)),
    "decoder/block_000/layer_001/scale": GENERATOR.normal(size=9).astype(np.float16),
    "encoder/block_000/layer_000/q": GENERATOR.normal(size=(4, 4)).astype(ml_dtypes.bfloat16),
    "global_step": np.array(2**40, np.int64),
    "层/名": np.arange(-3, 3, dtype=np.int32).reshape(2, 3),
    "mask": np.array([True, False]),
    "bytes": np.arange(4, dtype=np.uint8),
}
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_all(prefix: Path) -> dict[str, np.ndarray]:
    bundle = TensorBundle(prefix)
    return {name: bundle.read(name) for name in bundle.shapes}


def assert_same(read: dict[str, np.ndarray], written: dict[str, np.ndarray]):
    assert read.keys() == written.keys()
    for name, array in written.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "model.ckpt"
    write_bundle(path, ARRAYS, num_shards=3)
    return path


# RFC 3720, appendix B.4.
@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_of_published_vectors(data: bytes, wanted: int):
    assert crc32c(data) == crc32c_by_bytes(data) == wanted


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16 * LANES - 1, 16 * LANES + 4, 16 * LANES + 7, 33 * LANES + 2])
def test_crc32c_of_lanes_is_that_of_bytes(length: int):
    data = random.Random(length).randbytes(length)
    assert crc32c(data) == crc32c_by_bytes(data)
    assert masked_crc32c(data) == masked(crc32c_by_bytes(data))


def test_crc32c_of_pieces_is_that_of_bytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("t5pegasus.convert.crc32c.PIECE_BYTES", 20 * LANES)
    data = random.Random(0).randbytes(65 * LANES + 3)
    assert crc32c(data) == crc32c_by_bytes(data)


@pytest.mark.parametrize("options", [{}, {"per_block": 1}, {"per_block": 100}])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_what_is_written_is_read(tmp_path: Path, num_shards: int, options: dict):
    write_bundle(tmp_path / "model.ckpt-7", ARRAYS, num_shards, **options)
    assert_same(read_all(tmp_path / "model.ckpt-7"), ARRAYS)


def test_no_bit_of_the_arrays_can_change_unseen(prefix: Path):
    data = prefix.with_name("model.ckpt.data-00001-of-00003")
    whole = data.read_bytes()
    try:
        for place in range(len("gap"), len(whole)):
            data.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            with pytest.raises(ArtifactError, match="checksum"):
                read_all(prefix)
    finally:
        data.write_bytes(whole)
    assert_same(read_all(prefix), ARRAYS)


def test_no_byte_of_the_index_can_change_what_is_read(prefix: Path):
    """A flip in the unused meta-index and in the footer's padding changes nothing, any other is seen."""
    index = prefix.with_name("model.ckpt.index")
    whole = index.read_bytes()
    meta_index = whole.index(block([]))
    unused = {*range(meta_index, meta_index + len(block([]))), *range(len(whole) - 48, len(whole) - 8)}
    try:
        for place in range(len(whole)):
            index.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
            if place in unused:
                with contextlib.suppress(ArtifactError):
                    assert_same(read_all(prefix), ARRAYS)
            else:
                with pytest.raises(ArtifactError):
                    TensorBundle(prefix)
        for length in range(0, len(whole), 5):
            index.write_bytes(whole[:length])
            with pytest.raises(ArtifactError):
                TensorBundle(prefix)
    finally:
        index.write_bytes(whole)


@in_one_folder
@given(data=st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, data: bytes):
    (tmp_path / "random.index").write_bytes(data + bytes.fromhex("57fb808b247547db"))
    with pytest.raises(ArtifactError):
        TensorBundle(tmp_path / "random")


@in_one_folder
@given(
    value=st.one_of(
        st.binary(max_size=60),
        st.lists(st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 2**70), st.binary(max_size=9)))).map(
            lambda fields: b"".join(field(*each) for each in fields)
        ),
    )
)
def test_entries_of_any_content_are_read_or_refused(tmp_path: Path, value: bytes):
    """With right checksums, so that it is the entry that is looked at."""
    (tmp_path / "odd.index").write_bytes(table([(b"", field(1, 1)), (b"a", value)]))
    (tmp_path / "odd.data-00000-of-00001").write_bytes(bytes(64))
    try:
        bundle = TensorBundle(tmp_path / "odd")
        assert bundle.read("a").size <= 64
    except ArtifactError:
        pass


def test_hostile_tables_are_refused(tmp_path: Path):
    array = np.zeros(2, np.float32)
    good = entry(array, 0, 0, array.tobytes())
    footer_magic = bytes.fromhex("57fb808b247547db")
    first = block([(b"", field(1, 1)), (b"a", good)])
    same_block_twice = block([(b"a", varint(0) + varint(len(first) - 5)), (b"b", varint(0) + varint(len(first) - 5))])
    handle = varint(len(first)) + varint(len(same_block_twice) - 5)
    too_many_restarts = first[:-9] + (2**31).to_bytes(4, "little") + b"\x00"
    cases = {
        "twice": first + same_block_twice + (handle + handle).ljust(40, b"\x00") + footer_magic,
        "order": table([(b"", field(1, 1)), (b"b", good), (b"a", good)]),
        "long": table([(b"", field(1, 1)), (b"k" * 5000, good)]),
        "restarts": too_many_restarts
        + masked(crc32c_by_bytes(too_many_restarts)).to_bytes(4, "little")
        + (varint(0) + varint(len(too_many_restarts) - 1)).ljust(20, b"\x00") * 2
        + footer_magic,
        "snappy": table([(b"", field(1, 1)), (b"a", good)], compression=1),
        "latin": table([(b"", field(1, 1)), (b"\xe9", good)]),
    }
    messages = {"snappy": "Snappy.*newer TensorFlow", "twice": "order", "order": "order", "long": "too long"}
    for name, content in cases.items():
        (tmp_path / f"{name}.index").write_bytes(content)
        with pytest.raises(ArtifactError, match=messages.get(name, "damaged")):
            TensorBundle(tmp_path / name)


def test_what_cannot_be_read_is_said(tmp_path: Path):
    array = np.zeros(3, np.float32)
    with pytest.raises(ArtifactError, match=r"nothing\.index does not exist"):
        TensorBundle(tmp_path / "nothing")
    write_bundle(tmp_path / "big", {"a": array}, header=field(1, 1) + field(2, 1))
    with pytest.raises(ArtifactError, match="big-endian"):
        TensorBundle(tmp_path / "big")
    write_bundle(tmp_path / "lost", {"a": array, "b": array}, num_shards=2)
    (tmp_path / "lost.data-00001-of-00002").unlink()
    bundle = TensorBundle(tmp_path / "lost")
    np.testing.assert_array_equal(bundle.read("a"), array)
    with pytest.raises(ArtifactError, match=r"lost\.data-00001-of-00002 does not exist, and tensor b"):
        bundle.read("b")
    data = tmp_path / "lost.data-00000-of-00002"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"damaged \(14 bytes, 15 were wanted for a\)"):
        bundle.read("a")
    content = array.tobytes()
    changed = {
        "data type 7": field(1, 7) + entry(array, 0, 3, content)[2:],
        "partitioned": entry(array, 0, 3, content) + field(7, b""),
        "13 bytes": entry(array, 0, 3, content + b"\x00"),
        "damaged": entry(array, 0, 2**40, content),
    }
    for message, value in changed.items():
        write_bundle(tmp_path / "changed", {"a": array})
        (tmp_path / "changed.index").write_bytes(table([(b"", field(1, 1)), (b"a", value)]))
        with pytest.raises(ArtifactError, match=message):
            TensorBundle(tmp_path / "changed").read("a")
