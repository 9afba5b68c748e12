import contextlib
import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from t5pegasus.convert.torch_file import read_torch
from t5pegasus.errors import ArtifactError

in_one_folder = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
STORAGES = {
    "float64": "DoubleStorage", "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "int64": "LongStorage", "int32": "IntStorage", "int16": "ShortStorage", "int8": "CharStorage",
    "uint8": "ByteStorage", "bool": "BoolStorage",
}  # fmt: skip


class Storage:
    """A flat array under a key; pickled as a persistent id, as torch does."""

    def __init__(self, key: str, array: np.ndarray):
        self.key, self.array = key, array


class Tensor:
    """A strided view of a storage; pickled as a call of torch's function."""

    def __init__(self, storage, shape: tuple, strides: tuple, offset: int = 0, *, parameter: bool = False):
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset
        self.parameter = parameter

    def __reduce__(self):
        utils = sys.modules["torch._utils"]
        if self.parameter:
            plain = Tensor(self.storage, self.shape, self.strides, self.offset)
            return utils._rebuild_parameter, (plain, True, OrderedDict())
        arguments = (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())
        return utils._rebuild_tensor_v2, arguments


def whole(key: str, array: np.ndarray, **options) -> Tensor:
    strides = tuple(step // array.itemsize for step in array.strides)
    return Tensor(Storage(key, array.reshape(-1)), array.shape, strides, **options)


@pytest.fixture
def torch_names(monkeypatch: pytest.MonkeyPatch):
    """Modules with torch's names, so that pickle writes them; nothing of them is ever called."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *_: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return torch


def write_torch(path: Path, state, protocol: int = 2, **changes: bytes) -> Path:
    """The archive that torch.save makes of an object; `changes` replace members or add some."""
    storages: dict[str, np.ndarray] = {}
    torch = sys.modules["torch"]

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if not isinstance(obj, Storage):
                return None
            storages[obj.key] = obj.array
            return ("storage", getattr(torch, STORAGES[obj.array.dtype.name]), obj.key, "cpu", len(obj.array))

    content = io.BytesIO()
    Pickler(content, protocol).dump(state)
    members = {"model/data.pkl": content.getvalue(), "model/byteorder": b"little", "model/version": b"3\n"}
    members |= {f"model/data/{key}": array.tobytes() for key, array in storages.items()}
    return write_archive(path, members | {f"model/{name}": data for name, data in changes.items()})


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_type_and_layout_is_read(tmp_path: Path, torch_names, protocol: int):
    generator = np.random.default_rng(0)
    matrix = generator.normal(size=(3, 4)).astype(np.float32)
    flat = Storage("shared", generator.normal(size=20).astype(np.float32))
    state = OrderedDict(
        {
            "matrix": whole("0", matrix),
            "transposed": Tensor(Storage("0", matrix.reshape(-1)), (4, 3), (1, 4)),
            "rows": Tensor(flat, (2, 5), (5, 1), 10),
            "every_other": Tensor(flat, (3,), (2,), 1),
            "scalar": Tensor(flat, (), (), 7),
            "nothing": Tensor(flat, (0, 5), (5, 1), 0),
            "parameter": whole("p", matrix[0], parameter=True),
        }
    )
    typed = {
        name: generator.integers(0, 2, (2, 3)).astype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        for name in STORAGES
    }
    state.update({name: whole(f"t{name}", array) for name, array in typed.items()})
    state._metadata = OrderedDict({"": {"version": 1}})  # pyright: ignore[reportAttributeAccessIssue]
    read = read_torch(write_torch(tmp_path / "pytorch_model.bin", state, protocol))
    wanted = {
        "matrix": matrix,
        "transposed": matrix.T,
        "rows": flat.array[10:].reshape(2, 5),
        "every_other": flat.array[1:6:2],
        "scalar": flat.array[7].reshape(()),
        "nothing": np.zeros((0, 5), np.float32),
        "parameter": matrix[0],
        **typed,
    }
    assert read.keys() == wanted.keys()
    for name, array in wanted.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        np.testing.assert_array_equal(read[name], array)


class Reduced:
    """Pickled as any call."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def test_code_is_named_and_not_run(tmp_path: Path, torch_names):
    victim = tmp_path / "victim"
    victim.mkdir()
    for function, arguments, name in (
        (__import__("os").rmdir, (str(victim),), "rmdir"),
        (eval, ("1 + 1",), "builtins.eval|__builtin__.eval"),
        (getattr, ("a", "upper"), "getattr"),
        (__import__("functools").partial, (print,), "functools.partial"),
    ):
        for state in ({"weight": Reduced(function, *arguments)}, Reduced(function, *arguments)):
            with pytest.raises(ArtifactError, match=rf"asks for .*({name}).*nothing of it was run.*safetensors"):
                read_torch(write_torch(tmp_path / "pytorch_model.bin", state))
    assert victim.is_dir()


def test_allowed_names_cannot_be_bent(tmp_path: Path, torch_names):
    """Opcodes by hand: what is allowed to be named is called on nothing else, and has no attributes to set."""
    rebuild, storage = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"
    for body in (
        rebuild + b"}\x8c\x0c__defaults__K\x01sb0N",  # BUILD on a function
        storage + b")R",  # a call of a class
        b"ccollections\nOrderedDict\n(K\x01tR",  # a dict of something
        rebuild + b")R",
        rebuild + b"(NK\x00))\x89}tR",
        rebuild + b"}R",
        b"(X\x07\x00\x00\x00storage"
        + b"ctorch._utils\n_rebuild_tensor_v2\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ",
        b"\x8c\x02os\x8c\x06system",
        b"}(K\x01tK\x02s",  # a dict with a tuple as key
        b"}((K\x01tK\x02u",
        b"N]a",
        b"h\x05",
        b"r\xff\xff\xff\xff",
        b"N\x94j\x00\x00\x00\x10",
        b"0",
        b"t",
        b"(",
        b"\x82\x01",  # an extension registry's code
        b"i os\nsystem\n",
        b"X\xff\xff\xff\xff",
        b"\x8a\xffabc",
        b"",
    ):
        path = write_archive(tmp_path / "bent.bin", {"m/data.pkl": b"\x80\x02" + body + b"."})
        with pytest.raises(ArtifactError, match=r"bent\.bin"):
            read_torch(path)


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(Storage("0", np.zeros(6, np.float32)), (2, 3), (4, 1)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (6,), (1,), 1),
        Tensor(Storage("0", np.zeros(6, np.float32)), (6,), (1,), -1),
        Tensor(Storage("0", np.zeros(6, np.float32)), (2,), (-1,), 3),
        Tensor(Storage("0", np.zeros(6, np.float32)), (10**9, 10**9), (0, 0)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (2**60,), (2**60,)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (2, 3), (1,)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (True, 3), (1, 1)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (1.0,), (1,)),
        Tensor(Storage("0", np.zeros(6, np.float32)), (1,) * 33, (1,) * 33),
        Tensor(("storage",), (1,), (1,)),
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, torch_names, tensor: Tensor):
    with pytest.raises(ArtifactError, match="damaged"):
        read_torch(write_torch(tmp_path / "pytorch_model.bin", {"weight": tensor}))


def test_what_is_no_state_dict_is_said(tmp_path: Path, torch_names):
    path, array = tmp_path / "pytorch_model.bin", np.zeros((2, 2), np.float32)
    for state, message in (
        ([whole("0", array)], "holds a list, a dict of tensors"),
        ({"step": 3, "weight": whole("0", array)}, r"step is a int, a tensor was wanted.*state_dict"),
        ({"state_dict": {"weight": whole("0", array)}}, "state_dict is a dict"),
        ({1: whole("0", array)}, "1 is a _Tensor"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_torch(write_torch(path, state))
    state = {"weight": whole("0", array)}
    for changes, message in (
        ({"data/0": bytes(15)}, "lies in 15 bytes"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": b"\x80\x02"}, "pickle"),
        ({"x/data.pkl": b""}, "2 members data.pkl"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_torch(write_torch(path, state, **changes))
    with zipfile.ZipFile(write_torch(path, state)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    del members["model/data/0"]
    with pytest.raises(ArtifactError, match="lacks the numbers of weight"):
        read_torch(write_archive(path, members))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/data.pkl", bytes(10**6))
    with pytest.raises(ArtifactError, match="compressed"):
        read_torch(path)
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(ArtifactError, match=r"no zip archive.*1\.6.*torch\.load\(.*weights_only=True"):
        read_torch(path)
    with pytest.raises(ArtifactError, match="does not exist"):
        read_torch(tmp_path / "other.bin")


def small_archive(path: Path) -> bytes:
    array = np.arange(4, dtype=np.float32)
    return write_torch(path, {"a": whole("0", array), "b": whole("1", array, parameter=True)}).read_bytes()


def test_cut_files_are_refused(tmp_path: Path, torch_names):
    path = tmp_path / "pytorch_model.bin"
    content = small_archive(path)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            read_torch(path)


@in_one_folder
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=3))
def test_flipped_bytes_change_no_number(tmp_path: Path, torch_names, places):
    """Names, shapes and numbers are under zip's checksums; only fields that nothing reads may change unseen."""
    path = tmp_path / "pytorch_model.bin"
    content = bytearray(small_archive(path))
    for where, flip in places:
        content[int(where * len(content))] ^= flip
    path.write_bytes(content)
    try:
        read = read_torch(path)
    except ArtifactError:
        return
    assert read.keys() == {"a", "b"}
    for array in read.values():
        np.testing.assert_array_equal(array, np.arange(4, dtype=np.float32))


@in_one_folder
@given(body=st.binary(max_size=60))
@example(body=b"(" * 60)
def test_random_pickles_are_refused(tmp_path: Path, body: bytes):
    path = write_archive(tmp_path / "pytorch_model.bin", {"m/data.pkl": body})
    with contextlib.suppress(ArtifactError):
        assert read_torch(path) == {}


@in_one_folder
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_pickles_give_tensors_or_are_refused(tmp_path: Path, torch_names, places):
    """With right checksums, so that it is the pickle that is looked at."""
    path = tmp_path / "pytorch_model.bin"
    array = np.arange(4, dtype=np.float32)
    state = OrderedDict({"a": whole("0", array), "b": whole("1", array, parameter=True)})
    with zipfile.ZipFile(write_torch(path, state)) as archive:
        content = bytearray(archive.read("model/data.pkl"))
    for where, byte in places:
        content[int(where * len(content))] = byte
    with contextlib.suppress(ArtifactError):
        for tensor in read_torch(write_torch(path, state, **{"data.pkl": bytes(content)})).values():
            assert tensor.size <= 4
            assert set(tensor.reshape(-1).tolist()) <= {0, 1, 2, 3}


@pytest.mark.peers
def test_torch_writes_what_is_read(tmp_path: Path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = torch.nn.Linear(7, 5)
    state = layer.state_dict()
    state["tied"] = state["weight"]
    state["view"] = state["weight"][1:4, ::2].T
    state["parameter"] = torch.nn.Parameter(torch.randn(3))
    for name in ("float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"):
        state[name] = (torch.randn(2, 3) > 0).to(getattr(torch, name))
    for protocol in (2, 4):
        torch.save(state, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
        read = read_torch(tmp_path / "pytorch_model.bin")
        assert read.keys() == state.keys()
        for name, tensor in state.items():
            assert read[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
            np.testing.assert_array_equal(read[name].astype(np.float64), tensor.detach().double().numpy())
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ArtifactError, match=r"1\.6"):
        read_torch(tmp_path / "old.bin")
    torch.save(layer, tmp_path / "module.bin")
    with pytest.raises(ArtifactError, match=r"asks for torch\.nn\.modules\.linear\.Linear"):
        read_torch(tmp_path / "module.bin")
