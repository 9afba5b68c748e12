"""Hugging Face folders of untied gated-GELU T5 models (T5.1.1, mT5) ↔ checkpoints, without torch.

What a folder says must be what our model computes; whatever differs is refused by name, nothing is guessed.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from t5pegasus.checkpoint import CheckpointInfo, find_checkpoint, load_arrays, load_checkpoint_info, save_checkpoint
from t5pegasus.config import ModelConfig, RunConfig, read_json, write_json
from t5pegasus.convert.hf_tensors import parameters_from_hf, parameters_to_hf
from t5pegasus.convert.tensor_files import WEIGHTS, read_tensors
from t5pegasus.data.shards import hash_file
from t5pegasus.errors import UsageError
from t5pegasus.text.tokenizer import Tokenizer, adopt_vocabulary, load_tokenizer

CHECKSUMS = "SHA256SUMS"
VOCABULARY_FILES = ("spiece.model", "vocab.txt")
MAX_PADDING_ROWS = 128
"""T5's vocabularies are rounded up to a multiple of 128; those rows belong to no token."""

SAME_NAMES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_decoder_layers", "relative_attention_num_buckets",
    "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "pad_token_id",
    "decoder_start_token_id", "eos_token_id",
)  # fmt: skip
"""Fields that ModelConfig and Hugging Face's config call alike; `num_encoder_layers` is their `num_layers`."""
T5_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""What transformers takes for a field that config.json leaves out."""


class Imported(NamedTuple):
    """What `import_hf` wrote, and what it left behind."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    num_padding_rows: int
    """Rows of the vocabulary without a token, dropped from embedding and head."""


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is a Hugging Face model; runs have a config.json too, but none with a model_type."""
    return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def import_hf(source_path: Path, output_path: Path, tokenizer_path: Path | None = None) -> Imported:
    """Write a checkpoint (parameters only, step 0) of a Hugging Face model.

    Args:
        source_path: folder with config.json and model.safetensors.
        output_path: checkpoint folder to create.
        tokenizer_path: tokenizer folder; None adopts the source's spiece.model or vocab.txt.

    Raises:
        UsageError: if the output is in use, or the config is of a model that ours would not compute.
        ArtifactError: if files or tensors are missing, damaged or of another shape, or the tokenizer is another one.
    """
    _require_free(output_path)
    config_path = source_path / "config.json"
    model = model_from_hf_config(read_json(config_path), config_path)
    tokenizer = _open_tokenizer(source_path, tokenizer_path)
    num_padding_rows = _check_tokenizer(model, tokenizer, config_path)
    parameters = parameters_from_hf(read_tensors(source_path), model)
    if num_padding_rows:
        model = ModelConfig(**model.to_json() | {"vocab_size": tokenizer.vocab_size})
        parameters["token_embedding"] = parameters["token_embedding"][: tokenizer.vocab_size]
        parameters["lm_head"] = np.ascontiguousarray(parameters["lm_head"][:, : tokenizer.vocab_size])
    info = CheckpointInfo(
        config=RunConfig(model=model),
        step=0,
        rows=0,
        compute_dtype="float32",
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer")
        arrays = {f"parameters.{name}": value for name, value in parameters.items()}
        save_checkpoint(output_path, arrays, info, Path(folder) / "tokenizer")
    return Imported(output_path, model, tokenizer, num_padding_rows)


def export_hf(checkpoint_path: Path, output_path: Path) -> Path:
    """Write a Hugging Face MT5 folder of a checkpoint: config, weights, vocabulary, checksums; returns it.

    `shared.weight` and a separate `lm_head.weight` stand in the file once each: that is what makes transformers 5,
    which assumes a tied head, keep the head apart.

    Raises:
        UsageError: if the output is in use.
        ArtifactError: if there is no checkpoint, or it is damaged.
    """
    _require_free(output_path)
    checkpoint_path = find_checkpoint(checkpoint_path)
    info = load_checkpoint_info(checkpoint_path)
    model = info.config.model
    arrays = load_arrays(checkpoint_path, ("parameters.",))
    parameters = {name.removeprefix("parameters."): array for name, array in arrays.items()}
    unfinished = output_path.with_name(output_path.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    # transformers refuses a file that does not say which framework's layout it has.
    save_file(parameters_to_hf(parameters, model), unfinished / WEIGHTS, metadata={"format": "pt"})
    write_json(unfinished / "config.json", model_to_hf_config(model))
    ids = {name: getattr(model, name) for name in ("pad_token_id", "decoder_start_token_id", "eos_token_id")}
    write_json(unfinished / "generation_config.json", ids | {"max_new_tokens": info.config.data.max_target_tokens})
    for name in VOCABULARY_FILES:
        if (checkpoint_path / "tokenizer" / name).is_file():
            shutil.copyfile(checkpoint_path / "tokenizer" / name, unfinished / name)
    sums = "".join(f"{hash_file(file)}  {file.name}\n" for file in sorted(unfinished.iterdir()))
    (unfinished / CHECKSUMS).write_text(sums, encoding="utf-8")
    unfinished.rename(output_path)
    return output_path


def model_to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config.json for a model."""
    return {
        "architectures": ["MT5ForConditionalGeneration"],
        "model_type": "mt5",
        **{name: getattr(model, name) for name in SAME_NAMES},
        "num_layers": model.num_encoder_layers,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def model_from_hf_config(values: dict[str, Any], path: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json.

    Raises:
        UsageError: naming the field, if the model is none of ours, or a size is missing.
    """
    untied = "an output head of its own, without a scale"
    tied = values.get("tie_word_embeddings", values.get("model_type") != "mt5")
    scaled = values.get("scale_decoder_outputs", tied)
    way_out = "only untied T5.1.1 and mT5 models can be converted"
    if scaled is not False and tied:
        way_out += "; transformers 5 writes true for every MT5: if lm_head.weight is its own, set it to false there"
    for field, got, holds, wanted in (
        ("model_type", values.get("model_type"), values.get("model_type") in ("mt5", "t5"), "mt5 or t5"),
        (
            "feed_forward_proj",
            values.get("feed_forward_proj"),
            values.get("feed_forward_proj") == "gated-gelu",
            "gated-gelu",
        ),
        ("dense_act_fn", values.get("dense_act_fn"), values.get("dense_act_fn", "gelu_new") == "gelu_new", "gelu_new"),
        ("tie_word_embeddings" if tied else "scale_decoder_outputs", scaled, scaled is False, f"false ({untied})"),
    ):
        if not holds:
            raise UsageError(f"{path}: {field} is {got!r}, {wanted} was wanted; {way_out}")
    given = T5_DEFAULTS | {key: value for key, value in values.items() if value is not None}
    given.setdefault("num_decoder_layers", given.get("num_layers"))
    given.setdefault("decoder_start_token_id", given["pad_token_id"])
    for field in (*SAME_NAMES, "num_layers"):
        if not isinstance(given.get(field), int | float):
            raise UsageError(f"{path}: {field} is {given.get(field)!r}, a number was wanted; complete the file")
    return ModelConfig(num_encoder_layers=given["num_layers"], **{name: given[name] for name in SAME_NAMES})


def _require_free(output_path: Path) -> None:
    if output_path.exists():
        raise UsageError(f"{output_path} exists already; delete it, or choose another output")


def _open_tokenizer(source_path: Path, tokenizer_path: Path | None) -> Tokenizer:
    if tokenizer_path is not None:
        return load_tokenizer(tokenizer_path)
    for name in VOCABULARY_FILES:
        if (source_path / name).is_file():
            return adopt_vocabulary(source_path / name)
    raise UsageError(
        f"{source_path} has neither {' nor '.join(VOCABULARY_FILES)}; give its tokenizer with --tokenizer-path FOLDER "
        "(t5pegasus tokenizer train --from-vocabulary makes one of a vocabulary)"
    )


def _check_tokenizer(model: ModelConfig, tokenizer: Tokenizer, config_path: Path) -> int:
    """Compare ids and sizes; returns how many rows at the end of the vocabulary have no token."""
    ids = (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id)
    for field, wanted in zip(("pad_token_id", "decoder_start_token_id", "eos_token_id"), ids):
        if getattr(model, field) != wanted:
            raise UsageError(
                f"{config_path}: {field} is {getattr(model, field)}, the {tokenizer.kind} tokenizer's is {wanted}; "
                "give the tokenizer it was trained with, or correct config.json if that is the mistaken one"
            )
    rows = model.vocab_size - tokenizer.vocab_size
    if not 0 <= rows <= MAX_PADDING_ROWS:
        raise UsageError(
            f"{config_path}: vocab_size is {model.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens; "
            f"as many, or at most {MAX_PADDING_ROWS} rows more, were wanted: give the tokenizer it was trained with"
        )
    return rows
