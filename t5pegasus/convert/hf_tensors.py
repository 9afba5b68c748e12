"""Parameters under Hugging Face's names: the name map, and kernels between [in…, out…] and [out, in]."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from t5pegasus.axes import ParamSpec, logical_axis
from t5pegasus.config import ModelConfig
from t5pegasus.errors import ArtifactError
from t5pegasus.model.t5 import declare_parameters

WHOLE_MODEL = {
    "token_embedding": "shared.weight",
    "lm_head": "lm_head.weight",
    "encoder.final_norm": "encoder.final_layer_norm.weight",
    "decoder.final_norm": "decoder.final_layer_norm.weight",
    "encoder.relative_bias": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
    "decoder.relative_bias": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
}
SUBLAYERS = {
    "encoder": {"attention": "layer.0", "mlp": "layer.1"},
    "decoder": {"attention": "layer.0", "cross_attention": "layer.1", "mlp": "layer.2"},
}
"""What a block consists of, in Hugging Face's order."""
MODULES = {"self_attention": "SelfAttention", "cross_attention": "EncDecAttention", "mlp": "DenseReluDense"}
KERNELS = {"query": "q", "key": "k", "value": "v", "out": "o", "wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"}
COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names under which some writers store `shared.weight` again."""


def parameters_to_hf(parameters: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters (by dotted name, layers stacked) → Hugging Face's tensors by their names, float32."""
    tensors = {}
    for name, spec in declare_parameters(config).items():
        array = np.asarray(parameters[name], np.float32)
        for hf_name, index, slice_axes in _places(name, spec):
            tensors[hf_name] = _to_matrix(array[index], slice_axes)
    return tensors


def parameters_from_hf(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face's tensors → our parameters, float32; the inverse of `parameters_to_hf`.

    Raises:
        ArtifactError: naming a tensor that is missing, unknown, of another shape than the config's, or not of
            floating point.
    """
    unknown = set(tensors)
    parameters = {}
    for name, spec in declare_parameters(config).items():
        parameters[name] = np.empty(spec.shape, np.float32)
        for hf_name, index, slice_axes in _places(name, spec):
            if hf_name not in tensors:
                raise ArtifactError(
                    f"tensor {hf_name} is missing, and {name} needs it; an untied T5.1.1 or mT5 model "
                    f"with {config.num_encoder_layers}+{config.num_decoder_layers} layers was wanted"
                )
            parameters[name][index] = _from_matrix(tensors[hf_name], slice_axes, parameters[name][index].shape, hf_name)
            unknown.discard(hf_name)
    for copy in COPIES_OF_EMBEDDING:
        if copy in unknown and np.array_equal(tensors[copy], tensors["shared.weight"]):
            unknown.discard(copy)
    if unknown:
        raise ArtifactError(
            f"tensor {min(unknown)} has no place in a T5.1.1 or mT5 model ({len(unknown)} such); "
            "another architecture cannot be converted, it would compute something else"
        )
    return parameters


def _places(name: str, spec: ParamSpec) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Where a parameter lies: for each tensor its name, the index into our array, and the axes left by it."""
    if name in WHOLE_MODEL:
        yield WHOLE_MODEL[name], ..., spec.axes
        return
    stack, _, within = name.partition(".layers.")
    for layer in range(spec.shape[0]):
        yield f"{stack}.block.{layer}.{_name_in_block(stack, within)}.weight", layer, spec.axes[1:]


def _name_in_block(stack: str, within: str) -> str:
    """`pre_mlp_norm` → `layer.1.layer_norm`; `self_attention.query` → `layer.0.SelfAttention.q`."""
    module, _, kernel = within.partition(".")
    if not kernel:
        return f"{SUBLAYERS[stack][module.removeprefix('pre_').removesuffix('_norm')]}.layer_norm"
    return f"{SUBLAYERS[stack][module.removeprefix('self_')]}.{MODULES[module]}.{KERNELS[kernel]}"


def _num_input_axes(axes: tuple[str, ...]) -> int:
    """How many leading axes a kernel reads; 0 for gains and for tables, whose rows are looked up."""
    first = logical_axis(axes[0])
    if len(axes) == 1 or first in ("vocab", "relpos_buckets"):
        return 0
    return 2 if first == "heads" else 1


def _to_matrix(array: np.ndarray, axes: tuple[str, ...]) -> np.ndarray:
    inputs = _num_input_axes(axes)
    if inputs == 0:
        return np.ascontiguousarray(array)
    return np.ascontiguousarray(array.reshape(np.prod(array.shape[:inputs]), -1).T)


def _from_matrix(tensor: np.ndarray, axes: tuple[str, ...], shape: tuple[int, ...], hf_name: str) -> np.ndarray:
    inputs = _num_input_axes(axes)
    wanted = shape if inputs == 0 else (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
    if tensor.shape != wanted:
        raise ArtifactError(f"tensor {hf_name} has shape {tensor.shape}, config.json asks for {wanted}")
    # bfloat16 is no subtype of np.floating, but it goes to float32 without loss as the others do.
    if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
        raise ArtifactError(f"tensor {hf_name} has type {tensor.dtype}, a floating-point one was wanted")
    wide = tensor.astype(np.float32)
    return wide if inputs == 0 else wide.T.reshape(shape)
