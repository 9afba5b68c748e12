"""bert4keras folders (`config.json`, `vocab.txt`, a TensorFlow checkpoint): the released T5-PEGASUS models.

What is meant is what bert4keras (Su 2021, v0.10.0 to v0.11.5, models `t5.1.0`, `t5.1.1`, `mt5.1.1`) computes with the
folder: logits scaled by d_model^-0.5, the decoder's relative bias in cross-attention too, GELU in its exact form.
"""

import re
from pathlib import Path
from typing import Any

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.foreign import Foreign
from t5pegasus.convert.matrices import Names, gather_parameters, infer_sizes
from t5pegasus.convert.tensor_bundle import TensorBundle
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.json_files import read_json
from t5pegasus.text.tokenizer import adopt_vocabulary

HDF5_SUFFIXES = (".weights", ".h5", ".hdf5")
ACTIVATIONS = {
    ("gelu", "linear"): "gated-gelu-erf",
    ("gelu_erf", "linear"): "gated-gelu-erf",
    ("gelu_tanh", "linear"): "gated-gelu",
    ("relu",): "relu",
}
"""`hidden_act` → our `feed_forward_proj`; bert4keras' plain gelu is the exact one."""
OF_TRAINING = re.compile(
    r"_slot_|(^|/)Adam|/Adafactor|/LAMB|(^|/)(global_step|beta[12]_power)$|^training/|^save_counter/"
)
"""Variables beside the model: optimizers' states and counters."""


def is_bert4keras_folder(path: Path) -> bool:
    """Whether a folder has bert4keras' config and the weights, in the TensorFlow or the Keras format."""
    config = path / "config.json"
    if not config.is_file() or not {"hidden_size", "hidden_act"} <= read_json(config).keys():
        return False
    return any(file.suffix in (".index", *HDF5_SUFFIXES) for file in path.iterdir())


def read_bert4keras(folder: Path) -> Foreign:
    """The model in a bert4keras folder; special ids are those of its vocabulary.

    `cross_position_bias` and `logit_scale` in config.json mean what bert4keras' arguments of these names do, and are
    on if they are not there.

    Raises:
        UsageError: if config.json asks for something that ours would not compute.
        ArtifactError: if files or tensors are missing or damaged, or contradict config.json.
    """
    config_path, vocabulary_path = folder / "config.json", folder / "vocab.txt"
    config = read_json(config_path)
    bundle = TensorBundle(_find_checkpoint(folder))
    shapes = {name: shape for name, shape in bundle.shapes.items() if not OF_TRAINING.search(name)}
    names = _names(later="encoder/final_layer_norm/scale" in shapes)
    sizes = infer_sizes(shapes, names, folder)
    feed_forward_proj = _read_activation(config, config_path)
    if (feed_forward_proj == "relu") != (sizes["feed_forward_proj"] == "relu"):
        raise UsageError(
            f"{config_path}: hidden_act is {config['hidden_act']!r}, but the checkpoint's feed-forward layers "
            f"{'have' if feed_forward_proj == 'relu' else 'lack'} a gate (wi_0, wi_1); correct hidden_act"
        )
    _check_sizes(config, sizes, config_path)
    if not vocabulary_path.is_file():
        raise ArtifactError(f"{vocabulary_path} does not exist, and the special ids stand in it; copy it to the model")
    tokenizer = adopt_vocabulary(vocabulary_path)
    if tokenizer.pad_id != 0:
        raise ArtifactError(f"{vocabulary_path}: [PAD] has id {tokenizer.pad_id}, bert4keras hides id 0; 0 was wanted")
    model = ModelConfig(
        **sizes
        | NUMERICS["bert4keras"]
        | {
            "feed_forward_proj": feed_forward_proj,
            "tie_word_embeddings": sizes["tie_word_embeddings"],
            "cross_attention_bias": bool(config.get("cross_position_bias", True)),
            "scale_decoder_outputs": bool(config.get("logit_scale", True)),
            "dropout_rate": _read_probability(config, "hidden_dropout_prob", config_path),
            "pad_token_id": tokenizer.pad_id,
            "decoder_start_token_id": tokenizer.start_id,
            "eos_token_id": tokenizer.end_id,
        }
    )
    assumed = []
    if "cross_position_bias" not in config:
        assumed.append(
            "cross-attention adds the decoder's relative bias, as bert4keras does unless config.json has "
            '"cross_position_bias": false'
        )
    if attention_dropout := _read_probability(config, "attention_probs_dropout_prob", config_path):
        assumed.append(
            f"attention_probs_dropout_prob {attention_dropout} is left out: dropout of attention "
            "weights alone, which only training would use, is not among our numerics"
        )
    parameters = gather_parameters(model, shapes, names, bundle.read, folder)
    stored_dtype = ", ".join(sorted(set(map(bundle.dtype_name, shapes))))
    return Foreign(model, parameters, vocabulary_path, tuple(assumed), stored_dtype)


def _find_checkpoint(folder: Path) -> Path:
    """The prefix of the only TensorFlow checkpoint in a folder."""
    indexes = sorted(folder.glob("*.index"))
    if len(indexes) == 1:
        return indexes[0].with_suffix("")
    if indexes:
        raise UsageError(
            f"{folder} has {len(indexes)} TensorFlow checkpoints ({', '.join(file.stem for file in indexes[:4])}); "
            "leave the one that is meant there"
        )
    keras = [file.name for file in sorted(folder.iterdir()) if file.suffix in HDF5_SUFFIXES]
    if keras:
        raise UsageError(
            f"{folder / keras[0]} holds Keras weights in HDF5, in an order that only bert4keras knows; load them there "
            "(build_transformer_model, load_weights) and call save_weights_as_checkpoint('model.ckpt')"
        )
    raise ArtifactError(f"{folder} has no *.index file; a TensorFlow checkpoint (*.index and *.data-…) was wanted")


def _names(*, later: bool) -> Names:
    """The variables' names; since 30 November 2021 those of norms are Google's for model types other than mt5.1.1."""
    norm, final = ("layer_norm", "final_layer_norm") if later else ("rms_norm", "rms_norm")
    names = {"token_embedding": "shared/embedding", "lm_head": "decoder/logits/kernel"}
    for stack, modules in {
        "encoder": {"self_attention": "SelfAttention", "mlp": "DenseReluDense"},
        "decoder": {"self_attention": "SelfAttention", "cross_attention": "EncDecAttention", "mlp": "DenseReluDense"},
    }.items():
        names[f"{stack}.relative_bias"] = f"{stack}/block_000/layer_000/SelfAttention/relative_attention_bias"
        names[f"{stack}.final_norm"] = f"{stack}/{final}/scale"
        for index, (ours, theirs) in enumerate(modules.items()):
            sublayer = f"{stack}/block_{{layer:03}}/layer_{index:03}"
            short = "attention" if ours == "self_attention" else ours
            names[f"{stack}.layers.pre_{short}_norm"] = f"{sublayer}/{norm}/scale"
            kernels = (
                {kernel: f"{kernel}/kernel" for kernel in ("wi", "wi_0", "wi_1", "wo")}
                if ours == "mlp"
                else {"query": "q", "key": "k", "value": "v", "out": "o"}
            )
            for kernel, variable in kernels.items():
                names[f"{stack}.layers.{ours}.{kernel}"] = f"{sublayer}/{theirs}/{variable}"
    return names


def _read_activation(config: dict[str, Any], path: Path) -> str:
    stated = config["hidden_act"]
    key = tuple(stated) if isinstance(stated, list) and all(isinstance(item, str) for item in stated) else (stated,)
    if not all(isinstance(item, str) for item in key) or key not in ACTIVATIONS:
        raise UsageError(
            f'{path}: hidden_act is {stated!r}; ["gelu", "linear"] (or gelu_erf, gelu_tanh) or "relu" was wanted: '
            "models with another activation cannot be converted"
        )
    return ACTIVATIONS[key]


def _read_probability(config: dict[str, Any], field: str, path: Path) -> float:
    value = config.get(field) or 0.0
    if not isinstance(value, int | float):
        raise UsageError(f"{path}: {field} is {value!r}, a number was wanted; correct it")
    return float(value)


def _check_sizes(config: dict[str, Any], sizes: dict[str, Any], path: Path) -> None:
    """Compare what config.json states with what the arrays are."""
    head_size = sizes["d_model"] // sizes["num_heads"]
    for field, got, default in (
        ("vocab_size", sizes["vocab_size"], None),
        ("hidden_size", sizes["d_model"], None),
        ("embedding_size", sizes["d_model"], sizes["d_model"]),
        ("intermediate_size", sizes["d_ff"], None),
        ("num_attention_heads", sizes["num_heads"], None),
        ("attention_head_size", sizes["d_kv"], head_size),
        ("attention_key_size", sizes["d_kv"], sizes["d_kv"]),
        ("num_hidden_layers", sizes["num_encoder_layers"], None),
        ("num_hidden_layers", sizes["num_decoder_layers"], None),
    ):
        if (config.get(field) or default) != got:
            raise ArtifactError(
                f"{path}: {field} is {config.get(field)!r}, the checkpoint has {got}; "
                "config and checkpoint are of different models: take both from one place"
            )
