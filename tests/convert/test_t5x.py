import contextlib
import dataclasses
import re
from pathlib import Path

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import tensorstore
from hf_models import MODEL, draw_parameters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.convert.sources import is_foreign, open_source
from t5pegasus.convert.t5x import read_t5x
from t5pegasus.errors import ArtifactError

MODEL = dataclasses.replace(
    MODEL, relative_attention_max_distance=128, layer_norm_epsilon=1e-6, dropout_rate=0.1, decoder_start_token_id=0,
    eos_token_id=1,
)  # fmt: skip
MODELS = {name: dataclasses.replace(MODEL, **NUMERICS[name]) for name in ("hf-mt5", "t5-1.0")}
MODULES = {
    "encoder": ("pre_attention_layer_norm attention", "pre_mlp_layer_norm mlp"),
    "decoder": (
        "pre_self_attention_layer_norm self_attention",
        "pre_cross_attention_layer_norm encoder_decoder_attention",
        "pre_mlp_layer_norm mlp",
    ),
}
KERNELS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def arrays_of(model: ModelConfig) -> dict[str, np.ndarray]:
    """T5X's arrays by names joined with `/`, made of Hugging Face's tensors."""
    arrays = {}
    for name, tensor in parameters_to_hf(draw_parameters(model), model).items():
        stack, _, rest = name.partition(".")
        if match := re.fullmatch(r"block\.(\d)\.layer\.(\d)\.(\w+)(?:\.(\w+))?\.weight", rest):
            layer, sublayer, module, kernel = match.groups()
            norm, ours = MODULES[stack][int(sublayer)].split()
            if kernel == "relative_attention_bias":
                theirs = f"{stack}/relpos_bias/rel_embedding"
            elif module == "layer_norm":
                theirs = f"{stack}/layers_{layer}/{norm}/scale"
            else:
                theirs = f"{stack}/layers_{layer}/{ours}/{KERNELS.get(kernel, kernel)}/kernel"
        else:
            theirs = {
                "shared.weight": "token_embedder/embedding",
                "lm_head.weight": "decoder/logits_dense/kernel",
            }.get(name, f"{stack}/{stack}_norm/scale")
        arrays[theirs] = tensor if name == "shared.weight" else tensor.T
    return arrays


def to_tree(arrays: dict) -> dict:
    tree: dict = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    return tree


def write_t5x(path: Path, arrays: dict, wrap=lambda target: {"version": 3, "optimizer": {"target": target}}) -> Path:
    path.write_bytes(flax.serialization.msgpack_serialize(wrap(to_tree(arrays))))
    return path


def scan(arrays: dict[str, np.ndarray], axis: int, bias: str | None = None) -> dict[str, np.ndarray]:
    """The same with layers stacked, and if asked for with a relative bias in each of them."""
    scanned: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        if bias and name.endswith("rel_embedding"):
            stack = name.partition("/")[0]
            num_layers = sum(f"{stack}/layers_{layer}/mlp/wo/kernel" in arrays for layer in range(9))
            scanned[f"{stack}/layers/{bias}/rel_embedding"] = [array] * num_layers
        else:
            scanned.setdefault(re.sub(r"layers_\d", "layers", name), []).append(array)
    return {name: np.stack(layers, axis) if "/layers/" in name else layers[0] for name, layers in scanned.items()}


def assert_is(path: Path, model: ModelConfig):
    foreign = read_t5x(path)
    assert foreign.model == model
    assert foreign.vocabulary_path is None
    for name, array in draw_parameters(model).items():
        np.testing.assert_array_equal(foreign.parameters[name], array)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_what_was_written(tmp_path: Path, name: str):
    arrays = arrays_of(MODELS[name])
    state = {"step": np.int32(5), "param_states": to_tree({"decoder/x/v": np.ones(3)})}
    for index, wrap in enumerate(
        (
            lambda target: {"version": 3, "optimizer": {"target": target, "state": state}},
            lambda target: {"target": target, "state": state},
            lambda target: {"optimizer": {"target": {"params": target}}},
        )
    ):
        path = write_t5x(tmp_path / f"checkpoint_{index}", arrays, wrap)
        assert is_foreign(path)
        assert_is(path, MODELS[name])
    foreign, where = open_source(path)
    assert where == path
    stated = " ".join(foreign.assumed)
    assert "start have id 0 and the end has 1" in stated
    assert ("tanh-GELU" in stated, "ReLU" in stated, "scaled" in stated) == (
        (True, False, False) if name == "hf-mt5" else (False, True, True)
    )


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [None, "relpos_bias", "relative_posemb"])
def test_layers_of_a_scan_are_taken_apart(tmp_path: Path, axis: int, bias: str | None):
    assert_is(write_t5x(tmp_path / "scanned", scan(arrays_of(MODEL), axis, bias)), MODEL)


def test_a_relative_bias_per_layer_is_refused(tmp_path: Path):
    arrays = scan(arrays_of(MODEL), 1, "relative_posemb")
    arrays["decoder/layers/relative_posemb/rel_embedding"][:, 1] += 1
    with pytest.raises(ArtifactError, match=r"decoder/layers_1/relative_posemb.*another table.*scalable_t5"):
        read_t5x(write_t5x(tmp_path / "scanned", arrays))


def write_folder(folder: Path, arrays: dict[str, np.ndarray], driver: str = "gfile") -> Path:
    """A folder as T5X writes it: large arrays as zarr beside the file, which refers to them by relative paths."""
    folder.mkdir()
    leaves = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            leaves[name] = array
            continue
        path = "target." + name.replace("/", ".")
        chunks = [max(1, size // 2) for size in array.shape]
        metadata = {"shape": list(array.shape), "chunks": chunks, "compressor": {"id": "gzip", "level": 1}}
        store = tensorstore.open(
            {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/{path}"}, "metadata": metadata},
            create=True,
            dtype=tensorstore.dtype(array.dtype),
            shape=array.shape,
        ).result()
        store.write(array).result()
        leaves[name] = {"driver": "zarr", "kvstore": {"driver": driver, "path": path}, "metadata": metadata}
    write_t5x(folder / "checkpoint", leaves)
    return folder


def test_arrays_beside_the_file_are_read(tmp_path: Path):
    arrays = arrays_of(MODEL)
    folder = write_folder(tmp_path / "checkpoint_1000", arrays)
    assert is_foreign(folder)
    assert_is(folder, MODEL)
    assert_is(folder / "checkpoint", MODEL)
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    foreign = read_t5x(write_folder(tmp_path / "narrow", narrow, driver="gcs"))
    assert foreign.stored_dtype == "bfloat16"
    np.testing.assert_allclose(foreign.parameters["lm_head"], draw_parameters(MODEL)["lm_head"], rtol=2**-8)

    alone = tmp_path / "checkpoint_alone"
    alone.write_bytes((folder / "checkpoint").read_bytes())
    with pytest.raises(
        ArtifactError, match=r"does not exist, and checkpoint_alone keeps an array there; copy the whole"
    ):
        read_t5x(alone)
    chunk = folder / "target.decoder.logits_dense.kernel" / "0.0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-9])
    with pytest.raises(ArtifactError, match=r"target\.decoder\.logits_dense\.kernel is damaged"):
        read_t5x(folder)
    chunk.unlink()
    with pytest.raises(ArtifactError, match=r"target\.decoder\.logits_dense\.kernel is damaged"):
        read_t5x(folder)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"driver": "zarr", "kvstore": {"path": "../outside"}}, "beside the file was wanted"),
        ({"driver": "zarr", "kvstore": {"path": "/etc"}}, "does not exist"),
        ({"driver": "zarr", "kvstore": {"path": ".."}}, "beside the file was wanted"),
        ({"driver": "zarr", "kvstore": {}}, "beside the file was wanted"),
        ({"driver": "n5", "kvstore": {"path": "here"}}, "n5 array 'here'"),
        ({"driver": "zarr", "kvstore": {"path": "here"}}, "here is damaged"),
        ({"driver": "zarr", "kvstore": {"path": "huge"}}, r"huge is damaged \(shape"),
        ({"driver": "json", "kvstore": 3}, "driver holds a str"),
    ],
)
def test_references_lead_nowhere_else(tmp_path: Path, spec: dict, message: str):
    (tmp_path / "outside").mkdir()
    folder = tmp_path / "checkpoint_1"
    for name in ("here", "huge"):
        (folder / name).mkdir(parents=True)
    (folder / "huge" / ".zarray").write_text(
        '{"zarr_format": 2, "shape": [1000000, 1000000], "chunks": [1000, 1000], "dtype": "<f4", "compressor": null, '
        '"fill_value": 0, "order": "C", "filters": null}',
        encoding="utf-8",
    )
    write_t5x(folder / "checkpoint", arrays_of(MODEL) | {"token_embedder/embedding": spec})
    with pytest.raises(ArtifactError, match=message):
        read_t5x(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("token_embedder/embedding"), "token_embedder/embedding is missing"),
        (lambda a: a.pop("decoder/layers_1/mlp/wo/kernel"), "decoder/layers_1/mlp/wo/kernel is missing"),
        (lambda a: a.pop("encoder/layers_0/mlp/wi_1/kernel"), "wi_1/kernel is missing"),
        (lambda a: a.pop("encoder/relpos_bias/rel_embedding"), "relpos_bias/rel_embedding is missing"),
        (lambda a: [a.pop(name) for name in list(a) if "decoder/layers" in name], "decoder/layers_0/.* is missing"),
        (
            lambda a: a.update({"encoder/layers_5/mlp/wo/kernel": np.ones((2, 2))}),
            "layers_5/mlp/wo/kernel has no place",
        ),
        (lambda a: a.update({"encoder/encoder_norm/scale": np.ones(3, np.float32)}), r"shape \(3,\), \(12,\)"),
        (lambda a: a.update({"encoder/encoder_norm/scale": np.ones(12, np.int8)}), "int8"),
        (lambda a: a.update({"encoder/layers/mlp/wo/kernel": np.ones((2, 2, 2))}), "stacked layers were wanted"),
        (lambda a: a.update({"token_embedder/embedding": 3}), "holds a int, an array"),
    ],
)
def test_arrays_of_another_model_are_refused_by_name(tmp_path: Path, change, message: str):
    arrays = arrays_of(MODEL)
    change(arrays)
    with pytest.raises(ArtifactError, match=message):
        read_t5x(write_t5x(tmp_path / "checkpoint_1", arrays))


def test_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "checkpoint_1"
    path.write_bytes(msgpack.packb({"model": {}}))
    with pytest.raises(ArtifactError, match=r"no parameters under optimizer/target or target.*but model"):
        read_t5x(path)
    content = write_t5x(path, arrays_of(MODEL)).read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            read_t5x(path)
    # TensorFlow's folders have a text file of that name.
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-5"\n', encoding="utf-8")
    assert not is_foreign(tmp_path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(places=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_files_are_read_or_refused(tmp_path: Path, places):
    path = tmp_path / "checkpoint_1"
    small = {name: np.zeros(array.shape, np.int8) for name, array in arrays_of(MODEL).items()}
    content = bytearray(write_t5x(path, small).read_bytes())
    for where, byte in places:
        content[int(where * len(content))] = byte
    path.write_bytes(content)
    with contextlib.suppress(ArtifactError):
        read_t5x(path)
