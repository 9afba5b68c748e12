"""T5X checkpoints of T5 models: a msgpack file, or a folder of one and TensorStore arrays (Roberts et al. 2022).

Parameter names are those of T5X's own models, `examples/t5` and `examples/scalable_t5` (layers stacked by a scan).
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.config import ModelConfig
from t5pegasus.convert.flax_msgpack import flatten_arrays, read_tree
from t5pegasus.convert.foreign import Foreign, damaged
from t5pegasus.convert.matrices import gather_parameters, infer_sizes
from t5pegasus.errors import ArtifactError

FILE_NAME = "checkpoint"
"""The msgpack file in a T5X folder."""
MAX_INFLATION = 1100
"""gzip, which packs the arrays' chunks, makes no file larger than this many times."""
EMBEDDING = "token_embedder/embedding"
SUBLAYERS = {
    "encoder": {"attention": ("pre_attention_layer_norm", "attention"), "mlp": ("pre_mlp_layer_norm", "mlp")},
    "decoder": {
        "attention": ("pre_self_attention_layer_norm", "self_attention"),
        "cross_attention": ("pre_cross_attention_layer_norm", "encoder_decoder_attention"),
        "mlp": ("pre_mlp_layer_norm", "mlp"),
    },
}
"""Our sublayers → T5X's norm and module."""
BIASES = ("relpos_bias/rel_embedding", "relative_posemb/rel_embedding")
"""Relative biases within a layer, under the names of two of T5X's models."""


def is_t5x(path: Path) -> bool:
    """Whether a file starts, or a folder holds one that starts, like a msgpack dict."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        first = stream.read(1)
    return first in (b"\xde", b"\xdf") or b"\x80" <= first <= b"\x8f"


def read_t5x(path: Path) -> Foreign:
    """The parameters of a train state; its optimizer's state is left out.

    Args:
        path: the msgpack file, or the `checkpoint_STEP` folder that holds it.

    Raises:
        ArtifactError: if files or arrays are missing or damaged, or are those of another model.
    """
    file = path / FILE_NAME if path.is_dir() else path
    tree = read_tree(file)
    state = tree.get("optimizer", tree)
    target = state.get("target") if isinstance(state, dict) else None
    if not isinstance(target, dict):
        raise ArtifactError(
            f"{file} has no parameters under optimizer/target or target, where T5X writes them, but "
            f"{', '.join(sorted(tree)[:8])}; give a T5X checkpoint"
        )
    target = target["params"] if target.keys() == {"params"} else target
    arrays = flatten_arrays(_read_references(target, file), file)
    arrays = _join_biases(_unstack_layers(arrays, file), file)
    shapes = {name: array.shape for name, array in arrays.items()}
    names = _names()
    sizes = infer_sizes(shapes, names, file)
    tied, gated = sizes["tie_word_embeddings"], sizes["feed_forward_proj"] != "relu"
    model = ModelConfig(**sizes, scale_decoder_outputs=tied, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1)
    assumed = (
        "pad and decoder start have id 0 and the end has 1, as in T5's vocabularies",
        f"feed-forward layers take {'tanh-GELU, as in T5.1.1 and mT5' if gated else 'ReLU, as in the first T5'}",
        f"relative_attention_max_distance is {model.relative_attention_max_distance}, layer_norm_epsilon "
        f"{model.layer_norm_epsilon:g} and dropout_rate {model.dropout_rate:g}, as in T5X's models",
    )
    if tied:
        assumed += ("logits are scaled by d_model^-0.5, as T5X does where the embedding is the head",)
    stored_dtype = ", ".join(sorted({array.dtype.name for array in arrays.values()}))
    # Taken out one by one, so that a large model does not lie in memory twice.
    parameters = gather_parameters(model, shapes, names, arrays.pop, file)
    return Foreign(model, parameters, None, assumed, stored_dtype)


def _names() -> dict[str, str]:
    names = {"token_embedding": EMBEDDING, "lm_head": "decoder/logits_dense/kernel"}
    for stack, sublayers in SUBLAYERS.items():
        names[f"{stack}.relative_bias"] = f"{stack}/relpos_bias/rel_embedding"
        names[f"{stack}.final_norm"] = f"{stack}/{stack}_norm/scale"
        for ours, (norm, module) in sublayers.items():
            layer = f"{stack}/layers_{{layer}}"
            names[f"{stack}.layers.pre_{ours}_norm"] = f"{layer}/{norm}/scale"
            kernels = ("wi", "wi_0", "wi_1", "wo") if ours == "mlp" else ("query", "key", "value", "out")
            prefix = f"{stack}.layers.{'self_attention' if ours == 'attention' else ours}"
            names.update({f"{prefix}.{kernel}": f"{layer}/{module}/{kernel}/kernel" for kernel in kernels})
    return names


def _read_references(node: Any, file: Path) -> Any:
    """Replace each TensorStore spec in the tree by the array it names beside the file."""
    if not isinstance(node, dict):
        return node
    if isinstance(node.get("driver"), str) and isinstance(node.get("kvstore"), dict):
        return _read_tensorstore(node, file)
    return {key: _read_references(child, file) for key, child in node.items()}


def _read_tensorstore(spec: dict[str, Any], file: Path) -> np.ndarray:
    """One array; of its spec only the folder's name is taken, whatever store and options it was written with."""
    import tensorstore

    name = str(spec["kvstore"].get("path", spec.get("path", ""))).strip("/")
    if spec["driver"] != "zarr" or not name or "/" in name or "\\" in name or name in (".", ".."):
        raise ArtifactError(
            f"{file} names the {spec['driver']} array {name!r}; a zarr array in a folder beside the file was wanted"
        )
    folder = file.parent / name
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder} does not exist, and {file.name} keeps an array there; copy the whole checkpoint_STEP folder, "
            "with the folders beside this file"
        )
    try:
        store = tensorstore.open(
            {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": f"{folder}/"},
                "fill_missing_data_reads": False,
            },
            open=True,
            read=True,
        ).result()
        stored_bytes = sum(chunk.stat().st_size for chunk in folder.iterdir())
        if math.prod(store.shape) * store.dtype.numpy_dtype.itemsize > MAX_INFLATION * stored_bytes:
            raise damaged(folder, f"shape {store.shape} cannot be that of {stored_bytes} bytes")
        return store.read().result()
    except (ValueError, NotImplementedError, RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        raise damaged(folder, str(error).split("\n")[0]) from None


def _unstack_layers(arrays: dict[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """Name the layers of a scan one by one: `decoder/layers/…` becomes `decoder/layers_0/…` and so on."""
    unstacked = {}
    for name, array in arrays.items():
        stack, _, rest = name.partition("/layers/")
        if not rest:
            unstacked[name] = array
            continue
        axis = _scan_axis(arrays, stack, file)
        if array.ndim <= axis or array.ndim > 3:
            raise ArtifactError(f"{file}: {name} has shape {array.shape}, which has no axis {axis} of layers")
        for layer, slice_ in enumerate(np.moveaxis(array, axis, 0)):
            unstacked[f"{stack}/layers_{layer}/{rest}"] = slice_
    return unstacked


def _scan_axis(arrays: dict[str, np.ndarray], stack: str, file: Path) -> int:
    """The axis of a stack's layers, which is the one of its norms that is not d_model; T5X's default is 1."""
    norm = f"{stack}/layers/pre_mlp_layer_norm/scale"
    shape = arrays[norm].shape if norm in arrays else ()
    d_model = arrays[EMBEDDING].shape[-1] if EMBEDDING in arrays and arrays[EMBEDDING].ndim else None
    if len(shape) != 2 or d_model not in shape:
        raise ArtifactError(
            f"{file}: {norm} has shape {shape or 'none'}; stacked layers were wanted, [d_model, layers] or "
            f"[layers, d_model] with d_model {d_model}"
        )
    return 1 if shape[0] == d_model else 0


def _join_biases(arrays: dict[str, np.ndarray], file: Path) -> dict[str, np.ndarray]:
    """One relative bias per stack of those of its layers, if these agree."""
    joined = {}
    for name, array in arrays.items():
        prefix, within = next(
            ((name.removesuffix(f"/{bias}"), bias) for bias in BIASES if name.endswith(bias)), ("", "")
        )
        stack, _, layer = prefix.partition("/layers_")
        if not layer:
            joined[name] = array
            continue
        first = arrays.get(f"{stack}/layers_0/{within}", array)
        if not np.array_equal(array, first):
            raise ArtifactError(
                f"{file}: {name} is another table than that of layer 0; models with a relative bias per layer "
                "(scalable_t5) cannot be converted, ours have one per stack"
            )
        joined[f"{stack}/relpos_bias/rel_embedding"] = first
    return joined
