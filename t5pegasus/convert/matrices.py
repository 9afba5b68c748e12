"""Models kept as one [in, out] matrix per layer and kernel, as Mesh TensorFlow, bert4keras and T5X do.

Heads are major in the columns of query, key and value and in the rows of out; relative bias tables are
[heads, buckets]. All sizes follow from the shapes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.axes import ParamSpec
from t5pegasus.config import ModelConfig
from t5pegasus.convert.foreign import damaged
from t5pegasus.errors import ArtifactError
from t5pegasus.model.t5 import declare_parameters

Names = Mapping[str, str]
"""Our parameter's dotted name → theirs; those of layers hold `{layer}`, which is to be formatted with the number."""
Shapes = Mapping[str, tuple[int, ...]]


def infer_sizes(shapes: Shapes, names: Names, path: Path) -> dict[str, Any]:
    """The fields of a `ModelConfig` that names and shapes of all tensors decide.

    Sizes, `tie_word_embeddings` (no head is there), and `feed_forward_proj`: gated-gelu where there is a gate, relu
    where there is none; which activation a gate has, no shape tells.

    Raises:
        ArtifactError: if a tensor that decides one is missing, or of another rank.
    """

    def sizes_of(name: str) -> tuple[int, int]:
        shape = shapes.get(theirs := names[name].format(layer=0))
        if shape is None:
            raise ArtifactError(f"{path}: tensor {theirs} is missing, and {name} needs it; a T5 model was wanted")
        if len(shape) != 2 or not all(shape):
            raise damaged(path, f"tensor {theirs} has shape {shape}, a matrix was wanted")
        return shape[0], shape[1]

    vocab_size, d_model = sizes_of("token_embedding")
    num_heads, num_buckets = sizes_of("encoder.relative_bias")
    _, inner = sizes_of("encoder.layers.self_attention.query")
    if inner % num_heads:
        raise damaged(path, f"{inner} columns of the queries cannot be those of {num_heads} heads")
    return {
        "vocab_size": vocab_size,
        "d_model": d_model,
        "d_kv": inner // num_heads,
        "d_ff": sizes_of("encoder.layers.mlp.wo")[0],
        "num_heads": num_heads,
        "num_encoder_layers": _count_layers(shapes, names["encoder.layers.self_attention.query"]),
        "num_decoder_layers": _count_layers(shapes, names["decoder.layers.self_attention.query"]) or 1,
        "relative_attention_num_buckets": num_buckets,
        "feed_forward_proj": ("gated-gelu" if names["encoder.layers.mlp.wi_0"].format(layer=0) in shapes else "relu"),
        "tie_word_embeddings": names["lm_head"] not in shapes,
    }


def gather_parameters(
    model: ModelConfig, shapes: Shapes, names: Names, read: Callable[[str], np.ndarray], path: Path
) -> dict[str, np.ndarray]:
    """All parameters of a model, float32, from theirs.

    Raises:
        ArtifactError: naming a tensor that is missing, surplus, of another shape than the others ask for, or not of
            floating point.
    """
    surplus = set(shapes)
    parameters = {}
    for name, spec in declare_parameters(model).items():
        layered = ".layers." in name
        array = np.empty(spec.shape, np.float32)
        for layer in range(spec.shape[0] if layered else 1):
            theirs = names[name].format(layer=layer)
            if theirs not in shapes:
                raise ArtifactError(
                    f"{path}: tensor {theirs} is missing, and {name} needs it; a T5 model with "
                    f"{model.num_encoder_layers}+{model.num_decoder_layers} layers was wanted"
                )
            wanted = _stored_shape(name, spec)
            if shapes[theirs] != wanted:
                raise ArtifactError(
                    f"{path}: tensor {theirs} has shape {shapes[theirs]}, {wanted} was wanted beside the others"
                )
            tensor = read(theirs)
            # bfloat16 is no subtype of np.floating, but it goes to float32 without loss as float16 does.
            if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
                raise ArtifactError(f"{path}: tensor {theirs} is of {tensor.dtype}, a floating-point type was wanted")
            target = array[layer] if layered else array
            target[...] = tensor.T if name.endswith("relative_bias") else tensor.reshape(target.shape)
            surplus.discard(theirs)
        parameters[name] = array
    if surplus:
        raise ArtifactError(
            f"{path}: tensor {min(surplus)} has no place in a T5 model ({len(surplus)} such); "
            "another architecture cannot be converted, it would compute something else"
        )
    return parameters


def _count_layers(shapes: Shapes, template: str) -> int:
    """How many layers there are in a row from the first."""
    layer = 0
    while template.format(layer=layer) in shapes:
        layer += 1
    return layer


def _stored_shape(name: str, spec: ParamSpec) -> tuple[int, ...]:
    """The shape of one layer's tensor, or of the only one."""
    shape = spec.shape[1:] if ".layers." in name else spec.shape
    if name.endswith("relative_bias"):
        return shape[::-1]
    if len(shape) != 3:
        return shape
    return (shape[0] * shape[1], shape[2]) if name.endswith(".out") else (shape[0], shape[1] * shape[2])
