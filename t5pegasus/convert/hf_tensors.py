"""Parameters under Hugging Face's names: the name map, and kernels between [in…, out…] and [out, in]."""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

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
KERNELS = {name: name for name in ("wi", "wi_0", "wi_1", "wo")} | {"query": "q", "key": "k", "value": "v", "out": "o"}
EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
COPIES_OF_EMBEDDING = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
"""Names under which some writers store `shared.weight` again, or store it alone."""
NEVER_READ = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
"""The files of the first T5 models hold this table, which no code has ever added to anything."""


class HfTensor(NamedTuple):
    """One of Hugging Face's tensors, and where it lies in our parameters."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    index: Any
    """Into our array: the layer, or all of it."""
    axes: tuple[str, ...]
    """Those that are left by the index."""

    def of(self, array: np.ndarray) -> np.ndarray:
        """This tensor, taken from our parameter; float32."""
        part = np.asarray(array[self.index], np.float32)
        turned = part if _num_input_axes(self.axes) == 0 else part.reshape(self.shape[::-1]).T
        return np.ascontiguousarray(turned)


def list_hf_tensors(config: ModelConfig) -> Iterator[HfTensor]:
    """All tensors of a model; those of one parameter stand together."""
    for name, spec in declare_parameters(config).items():
        for hf_name, index, axes in _places(name, spec):
            yield HfTensor(hf_name, _matrix_shape(spec.shape[len(spec.axes) - len(axes) :], axes), name, index, axes)


def parameters_to_hf(parameters: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters (by dotted name, layers stacked) → Hugging Face's tensors by their names, float32."""
    return {tensor.name: tensor.of(parameters[tensor.parameter]) for tensor in list_hf_tensors(config)}


def has_own_head(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether there is an `lm_head.weight` other than the embedding: this is what transformers 5 goes by."""
    embedding = next((tensors[name] for name in (EMBEDDING, *COPIES_OF_EMBEDDING) if name in tensors), None)
    return HEAD in tensors and (embedding is None or not np.array_equal(tensors[HEAD], embedding))


def parameters_from_hf(tensors: MutableMapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Hugging Face's tensors → our parameters, float32; the inverse of `parameters_to_hf`.

    What has been read is taken out of `tensors`, so that a large model does not lie in memory twice.

    Raises:
        ArtifactError: naming a tensor that is missing, unknown, of another shape than the config's, or not of
            floating point.
    """
    _drop_copies(tensors, tied=config.tie_word_embeddings)
    _check_tensors(tensors, config)
    parameters = {name: np.empty(spec.shape, np.float32) for name, spec in declare_parameters(config).items()}
    for hf_name, _, name, index, axes in list_hf_tensors(config):
        target, tensor = parameters[name][index], tensors.pop(hf_name)
        target[...] = tensor if _num_input_axes(axes) == 0 else tensor.T.reshape(target.shape)
    return parameters


def _check_tensors(tensors: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Refuse what does not fit before anything is allocated: a config's sizes can be larger than any memory."""
    surplus = set(tensors)
    for hf_name, shape, name, _, _ in list_hf_tensors(config):
        tensor = tensors.get(hf_name)
        if tensor is None:
            raise ArtifactError(
                f"tensor {hf_name} is missing, and {name} needs it; a model with {config.num_encoder_layers}+"
                f"{config.num_decoder_layers} layers, {config.feed_forward_proj} and "
                f"{'a tied' if config.tie_word_embeddings else 'an untied'} head was wanted"
            )
        if tensor.shape != shape:
            raise ArtifactError(f"tensor {hf_name} has shape {tensor.shape}, config.json asks for {shape}")
        # bfloat16 is no subtype of np.floating, but it goes to float32 without loss as the others do.
        if not (np.issubdtype(tensor.dtype, np.floating) or tensor.dtype.name == "bfloat16"):
            raise ArtifactError(f"tensor {hf_name} has type {tensor.dtype}, a floating-point one was wanted")
        surplus.discard(hf_name)
    if surplus:
        raise ArtifactError(
            f"tensor {min(surplus)} has no place in this {config.numerics} model ({len(surplus)} such); "
            "another architecture cannot be converted, it would compute something else"
        )


def _drop_copies(tensors: MutableMapping[str, np.ndarray], *, tied: bool) -> None:
    """Leave the embedding under its own name alone; copies that differ stay, and are then refused."""
    for copy in (*COPIES_OF_EMBEDDING, *((HEAD,) if tied else ())):
        if copy in tensors and EMBEDDING not in tensors:
            tensors[EMBEDDING] = tensors.pop(copy)
        elif copy in tensors and np.array_equal(tensors[copy], tensors[EMBEDDING]):
            del tensors[copy]
    for name in NEVER_READ:
        tensors.pop(name, None)


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


def _matrix_shape(shape: tuple[int, ...], axes: tuple[str, ...]) -> tuple[int, ...]:
    inputs = _num_input_axes(axes)
    return shape if inputs == 0 else (int(np.prod(shape[inputs:])), int(np.prod(shape[:inputs])))
