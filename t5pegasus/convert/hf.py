"""Hugging Face folders of T5 and MT5 models ↔ checkpoints, without torch.

What a folder says must be what our model computes; whatever differs is refused by name, nothing is guessed.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info, load_parameters
from t5pegasus.config import ModelConfig
from t5pegasus.convert.foreign import Foreign
from t5pegasus.convert.hf_config import model_from_hf_config, model_to_hf_config
from t5pegasus.convert.hf_tensors import HEAD, HfTensor, has_own_head, list_hf_tensors, parameters_from_hf
from t5pegasus.convert.hf_tokenizer import write_tokenizer_files
from t5pegasus.convert.imported import find_vocabulary, require_free
from t5pegasus.convert.model_card import write_model_card
from t5pegasus.convert.safetensors_file import write_safetensors
from t5pegasus.convert.tensor_files import read_tensors
from t5pegasus.data.shard_files import hash_file
from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json, write_json
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer

WEIGHTS = "model.safetensors"
CHECKSUMS = "SHA256SUMS"


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is a Hugging Face model; runs have a config.json too, but none with a model_type."""
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def read_hf(folder: Path, numerics: str | None = None) -> Foreign:
    """Read a Hugging Face folder.

    Args:
        folder: with config.json and the weights.
        numerics: a name of `NUMERICS` that overrides what config.json says, for ports whose config is not that of
            their training; None takes config.json as it is.

    Raises:
        UsageError: if the config is of a model that ours would not compute, or of a T5 PEGASUS port.
        ArtifactError: if files or tensors are missing, damaged or of another shape.
    """
    config_path = folder / "config.json"
    values = read_json(config_path)
    vocabulary_path = find_vocabulary(folder)
    if numerics is None:
        _refuse_port(values, config_path, vocabulary_path)
    tensors = read_tensors(folder)
    own_head = has_own_head(tensors) or (HEAD in tensors and values.get("tie_word_embeddings") is False)
    model = model_from_hf_config(values, config_path, own_head=own_head, numerics=numerics)
    stored_dtype = ", ".join(sorted({tensor.dtype.name for tensor in tensors.values()}))
    return Foreign(model, parameters_from_hf(tensors, model), vocabulary_path, stored_dtype=stored_dtype)


def export_hf(checkpoint_path: Path, output_path: Path, *, lossy: bool = False) -> Path:
    """Write a Hugging Face folder of a checkpoint; returns it.

    It holds config.json, generation_config.json, model.safetensors, the tokenizer's files, a model card and
    SHA256SUMS of all of them. An untied head stands in the file beside `shared.weight`: that is what makes
    transformers 5, which takes every T5 for tied, keep it apart.

    Args:
        checkpoint_path: a checkpoint, or a run, whose last good one is meant.
        output_path: the folder to create.
        lossy: write also what Hugging Face's code cannot compute in the same way; the model card says so.

    Raises:
        UsageError: if the output is in use, or the export would lose something and `lossy` is not set.
        ArtifactError: if there is no checkpoint, or it is damaged.
    """
    require_free(output_path)
    checkpoint_path = find_checkpoint(checkpoint_path)
    info = load_checkpoint_info(checkpoint_path)
    losses = list_losses(info.config.model)
    if losses and not lossy:
        raise UsageError(
            f"{checkpoint_path}: {'; '.join(losses)}; --lossy writes it all the same, then measure what it still does"
        )
    tokenizer = load_tokenizer(checkpoint_path / "tokenizer")
    model = fold_scale(info.config.model)
    unfinished = output_path.with_name(output_path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = list(list_hf_tensors(model))
    arrays = _read_tensors_in_turn(checkpoint_path, info.config.model, tensors)
    write_safetensors(unfinished / WEIGHTS, {tensor.name: tensor.shape for tensor in tensors}, arrays)
    write_json(unfinished / "config.json", model_to_hf_config(model))
    write_json(unfinished / "generation_config.json", _generation_config(model, info.config.data.max_target_tokens))
    loader = write_tokenizer_files(
        tokenizer, checkpoint_path / "tokenizer", unfinished, info.config.data.max_source_tokens
    )
    weights_sha256 = hash_file(unfinished / WEIGHTS)
    write_model_card(unfinished, info, tokenizer, tokenizer_loader=loader, losses=losses, weights_sha256=weights_sha256)
    files = sorted(str(file.relative_to(unfinished)) for file in unfinished.rglob("*") if file.is_file())
    sums = "".join(f"{hash_file(unfinished / name)}  {name}\n" for name in files)
    (unfinished / CHECKSUMS).write_text(sums, encoding="utf-8")
    unfinished.rename(output_path)
    return output_path


def list_losses(model: ModelConfig) -> tuple[str, ...]:
    """What Hugging Face's T5 and MT5 cannot compute of a model, one clause each; empty if the logits are the same."""
    losses = []
    if model.cross_attention_bias:
        losses.append(
            "model.cross_attention_bias is lost, transformers has no relative bias in cross-attention: every logit "
            "would be another one"
        )
    if boundaries := model.relative_attention_boundaries:
        losses.append(
            f"model.relative_attention_boundaries={boundaries} is lost, transformers has the bucket formula only: all "
            f"distances from {model.first_clipped_distance} on would have one bias, and texts longer than "
            f"{boundaries[0]} tokens other logits"
        )
    if model.num_masked_tokens:
        losses.append(
            f"model.num_masked_tokens={model.num_masked_tokens} is lost, transformers knows no masked tokens: it would "
            "give them probabilities, too (open them before with t5pegasus grow)"
        )
    return tuple(losses)


def fold_scale(model: ModelConfig) -> ModelConfig:
    """The model as exported: without what `list_losses` names, and with the scale of the decoder's output in its head.

    A tied head keeps the scale, T5 can say it.
    """
    folds = model.scale_decoder_outputs and not model.tie_word_embeddings
    return dataclasses.replace(
        model,
        scale_decoder_outputs=model.scale_decoder_outputs and not folds,
        cross_attention_bias=False,
        relative_attention_boundaries=(),
        num_masked_tokens=0,
    )


def _refuse_port(values: dict[str, Any], config_path: Path, vocabulary_path: Path | None) -> None:
    """Ports of T5 PEGASUS keep mT5's ids and numerics in their config, neither of which it was trained with."""
    ids = (values.get("decoder_start_token_id"), values.get("eos_token_id"))
    if vocabulary_path is None or vocabulary_path.suffix != ".txt" or ids not in ((0, 1), (None, 1)):
        return
    tokenizer = adopt_vocabulary(vocabulary_path)
    if (tokenizer.start_id, tokenizer.end_id) != (0, 1):
        raise UsageError(
            f"{config_path}: decoder_start_token_id is 0 and eos_token_id 1, which are mT5's; {vocabulary_path.name} "
            f"starts with [CLS] {tokenizer.start_id} and ends with [SEP] {tokenizer.end_id}: this looks like a port of "
            "T5 PEGASUS; give --numerics bert4keras, which it was trained with (or hf-mt5, if it has been trained on "
            "in transformers since), and the ids come from the vocabulary"
        )


def _read_tensors_in_turn(checkpoint_path: Path, model: ModelConfig, tensors: list[HfTensor]) -> Iterator[np.ndarray]:
    """The tensors in their order; one parameter of the checkpoint is in memory at a time."""
    held, array = "", np.empty(0)
    for tensor in tensors:
        if tensor.parameter != held:
            held = tensor.parameter
            array = load_parameters(checkpoint_path, (held,))[held]
            if held == "lm_head" and model.scale_decoder_outputs:
                array = array * np.float32(model.d_model**-0.5)
            if held.endswith("relative_bias"):  # without the rows of boundaries, which are the last ones
                array = array[: model.relative_attention_num_buckets]
        yield tensor.of(array)


def _generation_config(model: ModelConfig, max_new_tokens: int) -> dict[str, Any]:
    ids = {name: getattr(model, name) for name in ("pad_token_id", "decoder_start_token_id", "eos_token_id")}
    return ids | {"max_new_tokens": max_new_tokens}
