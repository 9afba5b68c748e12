import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from bundle_files import write_bundle
from hf_models import MODEL, WORDS, draw_parameters

from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.bert4keras import read_bert4keras
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.convert.sources import is_foreign, open_source
from t5pegasus.errors import ArtifactError, UsageError

MODEL = dataclasses.replace(
    MODEL, **NUMERICS["bert4keras"], num_encoder_layers=2, num_decoder_layers=2, d_kv=4,
    relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
)  # fmt: skip
CONFIG = {
    "hidden_dropout_prob": 0.05, "hidden_size": 12, "initializer_range": 0.02, "intermediate_size": 20,
    "num_attention_heads": 5, "attention_head_size": 4, "num_hidden_layers": 2, "vocab_size": len(WORDS),
    "hidden_act": ["gelu", "linear"],
}  # fmt: skip


def variables_of(model: ModelConfig, *, later: bool = False) -> dict[str, np.ndarray]:
    """The checkpoint that bert4keras would write, made of Hugging Face's tensors."""
    variables = {}
    for name, tensor in parameters_to_hf(draw_parameters(model), model).items():
        theirs = name.removesuffix(".weight").replace(".final_layer_norm", ".final_layer_norm.scale")
        theirs = re.sub(r"\.layer_norm$", ".layer_norm.scale", theirs)
        theirs = re.sub(r"(wi|wi_0|wi_1|wo)$", r"\1.kernel", theirs)
        theirs = {"shared": "shared.embedding", "lm_head": "decoder.logits.kernel"}.get(theirs, theirs)
        if not later:
            theirs = theirs.replace("final_layer_norm", "rms_norm").replace("layer_norm", "rms_norm")
        theirs = re.sub(r"(block|layer)\.(\d)", lambda match: f"{match[1]}_{int(match[2]):03}", theirs)
        # Hugging Face's matrices are [out, in], and its bias is [buckets, heads]: all of these are turned but one.
        variables[theirs.replace(".", "/")] = tensor if theirs == "shared.embedding" else tensor.T
    return variables


def write_folder(folder: Path, variables: dict[str, np.ndarray], **config) -> Path:
    folder.mkdir()
    stated = {key: value for key, value in (CONFIG | config).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    write_bundle(folder / "bert_model.ckpt", variables)
    return folder


@pytest.mark.parametrize("later", [False, True])
def test_the_model_is_what_was_written(tmp_path: Path, later: bool):
    folder = write_folder(tmp_path / "model", variables_of(MODEL, later=later))
    assert is_foreign(folder)
    foreign, where = open_source(folder)
    assert where == folder / "vocab.txt"
    assert foreign.model == MODEL
    assert foreign.vocabulary_path == folder / "vocab.txt"
    assert any("cross-attention" in sentence for sentence in foreign.assumed)
    for name, array in draw_parameters(MODEL).items():
        assert foreign.parameters[name].dtype == np.float32
        np.testing.assert_array_equal(foreign.parameters[name], array)


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        ({"cross_position_bias": False}, {"cross_attention_bias": False}),
        ({"cross_position_bias": 0, "logit_scale": 0}, {"cross_attention_bias": False, "scale_decoder_outputs": False}),
        ({"cross_position_bias": True, "hidden_dropout_prob": None}, {"dropout_rate": 0.0}),
        ({"hidden_act": ["gelu_tanh", "linear"]}, {"feed_forward_proj": "gated-gelu"}),
        ({"hidden_act": ["gelu_erf", "linear"]}, {}),
        ({"hidden_act": "relu"}, {"feed_forward_proj": "relu"}),
        ({"hidden_act": "relu"}, {"feed_forward_proj": "relu", "tie_word_embeddings": True}),
    ],
)
def test_config_decides_the_numerics(tmp_path: Path, config: dict, fields: dict):
    model = dataclasses.replace(MODEL, **fields)
    foreign = read_bert4keras(write_folder(tmp_path / "model", variables_of(model), **config))
    assert foreign.model == model
    assert any("cross-attention" in sentence for sentence in foreign.assumed) is ("cross_position_bias" not in config)
    for name, array in draw_parameters(model).items():
        np.testing.assert_array_equal(foreign.parameters[name], array)


def test_narrow_variables_are_widened(tmp_path: Path):
    variables = {name: array.astype(np.float16) for name, array in variables_of(MODEL).items()}
    variables["shared/embedding"] = variables["shared/embedding"].astype(np.float64)
    foreign = read_bert4keras(write_folder(tmp_path / "model", variables))
    assert foreign.stored_dtype == "float16, float64"
    for name, array in draw_parameters(MODEL).items():
        np.testing.assert_array_equal(foreign.parameters[name], array.astype(np.float16).astype(np.float32))


def test_states_of_optimizers_are_left_out(tmp_path: Path):
    variables = variables_of(MODEL) | {
        "shared/embedding_slot_vr": np.ones(12, np.float32),
        "global_step": np.array(7, np.int64),
        "Adam/shared/embedding/m": np.ones((2, 2), np.float32),
    }
    foreign = read_bert4keras(write_folder(tmp_path / "model", variables, attention_probs_dropout_prob=0.1))
    assert foreign.parameters.keys() == draw_parameters(MODEL).keys()
    assert any("attention_probs_dropout_prob 0.1" in sentence for sentence in foreign.assumed)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"hidden_act": "gelu"}, UsageError, r"hidden_act is 'gelu'.*\[\"gelu\", \"linear\"\]"),
        ({"hidden_act": ["silu", "linear"]}, UsageError, "silu"),
        ({"hidden_act": [["gelu"], {}]}, UsageError, "hidden_act"),
        ({"hidden_act": "relu"}, UsageError, "'relu', but the checkpoint's feed-forward layers have a gate"),
        ({"hidden_dropout_prob": "0.1"}, UsageError, "hidden_dropout_prob is '0.1'"),
        ({"hidden_dropout_prob": 1.5}, UsageError, "dropout_rate=1.5"),
        ({"hidden_size": 13}, ArtifactError, "hidden_size is 13, the checkpoint has 12"),
        ({"num_hidden_layers": 3}, ArtifactError, "num_hidden_layers is 3, the checkpoint has 2"),
        ({"num_attention_heads": 4}, ArtifactError, "num_attention_heads is 4"),
        ({"attention_head_size": None}, ArtifactError, "attention_head_size is None, the checkpoint has 4"),
        ({"attention_key_size": 8}, ArtifactError, "attention_key_size is 8"),
        ({"embedding_size": 6}, ArtifactError, "embedding_size is 6"),
        ({"vocab_size": 21128}, ArtifactError, "vocab_size is 21128"),
        ({"intermediate_size": None}, ArtifactError, "intermediate_size is None"),
    ],
)
def test_config_of_another_model_is_refused_by_field(tmp_path: Path, config: dict, error: type, message: str):
    with pytest.raises(error, match=message):
        read_bert4keras(write_folder(tmp_path / "model", variables_of(MODEL), **config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("shared/embedding"), "shared/embedding is missing"),
        (lambda v: v.pop("decoder/block_001/layer_001/EncDecAttention/k"), "EncDecAttention/k is missing"),
        (lambda v: v.pop("encoder/rms_norm/scale"), "encoder/rms_norm/scale is missing"),
        (lambda v: v.update({"encoder/block_000/extra": np.ones(2)}), "encoder/block_000/extra has no place"),
        (lambda v: v.update({"shared/embedding": np.ones(3, np.float32)}), r"shape \(3,\), a matrix"),
        (
            lambda v: v.update({"encoder/block_001/layer_000/SelfAttention/v": np.ones((12, 5), np.float32)}),
            r"shape \(12, 5\), \(12, 20\) was wanted",
        ),
        (lambda v: v.update({"encoder/rms_norm/scale": np.ones(12, np.int32)}), "int32, a floating-point"),
        (
            lambda v: v.update(
                {"encoder/block_000/layer_000/SelfAttention/relative_attention_bias": np.ones((3, 8), np.float32)}
            ),
            "20 columns .* 3 heads",
        ),
    ],
)
def test_variables_of_another_model_are_refused_by_name(tmp_path: Path, change, message: str):
    variables = variables_of(MODEL)
    change(variables)
    with pytest.raises(ArtifactError, match=message):
        read_bert4keras(write_folder(tmp_path / "model", variables))


def test_folders_that_are_not_whole_are_refused(tmp_path: Path):
    folder = write_folder(tmp_path / "model", variables_of(MODEL))
    vocabulary = (folder / "vocab.txt").read_bytes()
    (folder / "vocab.txt").unlink()
    with pytest.raises(ArtifactError, match=r"vocab\.txt does not exist"):
        read_bert4keras(folder)
    (folder / "vocab.txt").write_text("\n".join([*WORDS[1:], "[PAD]"]), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"\[PAD\] has id 23"):
        read_bert4keras(folder)
    (folder / "vocab.txt").write_bytes(vocabulary)
    write_bundle(folder / "second", {"a": np.ones(2, np.float32)})
    with pytest.raises(UsageError, match=r"2 TensorFlow checkpoints \(bert_model\.ckpt, second\)"):
        read_bert4keras(folder)


def test_keras_weights_are_refused_with_the_way_out(tmp_path: Path):
    folder = write_folder(tmp_path / "model", {"a": np.ones(2, np.float32)})
    for file in folder.glob("bert_model.*"):
        file.unlink()
    assert not is_foreign(folder)
    with pytest.raises(ArtifactError, match=r"no \*\.index file"):
        read_bert4keras(folder)
    (folder / "best_model.weights").write_bytes(b"\x89HDF\r\n\x1a\n")
    assert is_foreign(folder)
    for source in (folder, folder / "best_model.weights"):
        with pytest.raises(UsageError, match=r"best_model\.weights holds Keras weights in HDF5.*save_weights_as_chec"):
            is_foreign(source) and open_source(source)
