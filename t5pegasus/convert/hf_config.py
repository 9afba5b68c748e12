"""Hugging Face's config.json of T5 and MT5 ↔ ModelConfig.

What is meant is what transformers 5 computes for a folder, which also depends on whether the weights hold an output
head of their own: it reports every MT5 and T5 as tied, and unties those whose file has another `lm_head.weight`.
"""

from pathlib import Path
from typing import Any

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.errors import UsageError

SAME_NAMES = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_decoder_layers", "relative_attention_num_buckets",
    "relative_attention_max_distance", "dropout_rate", "layer_norm_epsilon", "pad_token_id",
    "decoder_start_token_id", "eos_token_id",
)  # fmt: skip
"""Fields that ModelConfig and Hugging Face's config call alike; `num_encoder_layers` is their `num_layers`."""
DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""What transformers takes for a field that config.json leaves out."""
NUMBERS = ("dropout_rate", "layer_norm_epsilon")
OPTIONAL = {
    "feed_forward_proj": (str, "a name"),
    "dense_act_fn": (str, "a name"),
    "is_gated_act": (bool, "true or false"),
    "tie_word_embeddings": (bool, "true or false"),
    "scale_decoder_outputs": (bool, "true or false"),
}
"""What fields hold that may be absent; a "false" in quotes would otherwise count as true."""
ACTIVATIONS = {
    (True, "gelu_new"): "gated-gelu",
    (True, "gelu_pytorch_tanh"): "gated-gelu",
    (True, "gelu_python_tanh"): "gated-gelu",
    (True, "gelu"): "gated-gelu-erf",
    (True, "gelu_python"): "gated-gelu-erf",
    (False, "relu"): "relu",
}
"""(is_gated_act, dense_act_fn), as transformers resolves them → our `feed_forward_proj`."""
FEED_FORWARDS = {
    "gated-gelu": ("gated-gelu", "gelu_new"),
    # "gated-gelu" itself is taken by the tanh form, and this is the name of the exact one that splits at one hyphen.
    "gated-gelu-erf": ("gated-gelu_python", "gelu_python"),
    "relu": ("relu", "relu"),
}
"""Our `feed_forward_proj` → Hugging Face's, and the dense_act_fn it resolves to."""


def model_from_hf_config(
    values: dict[str, Any], path: Path, *, own_head: bool, numerics: str | None = None
) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json.

    Args:
        values: the content of config.json.
        path: of that file, for messages.
        own_head: whether the weights hold an `lm_head.weight` that differs from `shared.weight`.
        numerics: a name of `NUMERICS` that stands for what the file says of them.

    Raises:
        UsageError: naming the field, if ours would compute something else, a size is missing, or a field is of
            another type.
    """
    if values.get("model_type") not in ("mt5", "t5"):
        raise UsageError(
            f"{path}: model_type is {values.get('model_type')!r}, mt5 or t5 was wanted; other architectures cannot be "
            "converted"
        )
    given = DEFAULTS | {key: value for key, value in values.items() if value is not None}
    given.setdefault("num_decoder_layers", given.get("num_layers"))
    given.setdefault("decoder_start_token_id", given["pad_token_id"])
    wanted = dict.fromkeys((*SAME_NAMES, "num_layers"), (int, "a whole number"))
    wanted |= dict.fromkeys(NUMBERS, (int | float, "a number"))
    wanted |= {field: kind for field, kind in OPTIONAL.items() if field in given}
    for field, (kind, words) in wanted.items():
        value = given.get(field)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{path}: {field} is {value!r}, {words} was wanted; correct or complete the file")
    sizes = {"num_encoder_layers": given["num_layers"]} | {name: given[name] for name in SAME_NAMES}
    if numerics is not None:
        return ModelConfig(**sizes, **NUMERICS[numerics])
    return ModelConfig(
        **sizes,
        feed_forward_proj=_read_feed_forward(given, path),
        tie_word_embeddings=_read_tied(given, path, own_head),
        scale_decoder_outputs=_read_scaled(given, path, own_head),
    )


def model_to_hf_config(model: ModelConfig) -> dict[str, Any]:
    """Hugging Face's config.json for a model whose logits it can express (see `hf.list_losses`).

    An own head goes into MT5, which never scales, a tied one into T5, where scaling can be said.
    """
    architecture, model_type = (
        ("T5ForConditionalGeneration", "t5") if model.tie_word_embeddings else ("MT5ForConditionalGeneration", "mt5")
    )
    feed_forward_proj, dense_act_fn = FEED_FORWARDS[model.feed_forward_proj]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **{name: getattr(model, name) for name in SAME_NAMES},
        "num_layers": model.num_encoder_layers,
        "feed_forward_proj": feed_forward_proj,
        "dense_act_fn": dense_act_fn,
        "is_gated_act": model.feed_forward_proj != "relu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tie_word_embeddings,
        **({"scale_decoder_outputs": model.scale_decoder_outputs} if model.tie_word_embeddings else {}),
        "use_cache": True,
    }


def _read_feed_forward(given: dict[str, Any], path: Path) -> Any:
    """As transformers does: split at the hyphen, `gated-gelu` is the tanh form, and later fields override."""
    field = given.get("feed_forward_proj", "gated-gelu" if given["model_type"] == "mt5" else "relu")
    parts = str(field).split("-")
    act = given.get("dense_act_fn", "gelu_new" if field == "gated-gelu" else parts[-1])
    gated = given.get("is_gated_act", parts[0] == "gated")
    if (gated, act) not in ACTIVATIONS:
        name, got = ("dense_act_fn", act) if "dense_act_fn" in given else ("feed_forward_proj", field)
        raise UsageError(
            f"{path}: {name} is {got!r} with is_gated_act {gated!r}; gated gelu_new or gelu, or relu without a gate, "
            "was wanted: models with another activation cannot be converted"
        )
    return ACTIVATIONS[gated, act]


def _read_tied(given: dict[str, Any], path: Path, own_head: bool) -> bool:
    if not own_head and given.get("tie_word_embeddings") is False and "scale_decoder_outputs" not in given:
        raise UsageError(
            f"{path}: tie_word_embeddings is False, but the weights have no lm_head.weight that differs from "
            "shared.weight; give the file with the head, or set it to true if the embedding is the head"
        )
    return not own_head


def _read_scaled(given: dict[str, Any], path: Path, own_head: bool) -> bool:
    stated = given.get("scale_decoder_outputs")
    if given["model_type"] == "t5":
        # Only the config decides, also for a head of its own: a config that says nothing means the first T5.
        return bool(stated) if stated is not None else given.get("tie_word_embeddings") is not False
    if stated:
        raise UsageError(
            f"{path}: scale_decoder_outputs is True, but transformers never scales the logits of an mt5; "
            "set model_type to t5 if they were scaled in training, else scale_decoder_outputs to false"
        )
    version = str(given.get("transformers_version", ""))
    if not own_head and stated is None and version.partition(".")[0] not in ("5", "6"):
        raise UsageError(
            f"{path}: a tied mt5 of transformers {version or '(no version)'}: version 4 scaled its logits by "
            "d_model^-0.5, version 5 does not; set model_type to t5 if they were scaled in training, "
            "scale_decoder_outputs to false if not"
        )
    return False
