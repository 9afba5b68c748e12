"""What a config.json means is what transformers 5 makes of it; what ours would not compute is refused by name."""

from pathlib import Path

import numpy as np
import pytest
from hf_models import MODEL, MODELS, copy_with, import_hf

from t5pegasus.config import NUMERICS
from t5pegasus.convert.hf_config import model_from_hf_config, model_to_hf_config
from t5pegasus.errors import ArtifactError, UsageError


def read(own_head: bool, **changes):
    values = model_to_hf_config(MODEL) | changes
    kept = {key: value for key, value in values.items() if value != "absent"}
    return model_from_hf_config(kept, Path("config.json"), own_head=own_head)


@pytest.mark.parametrize(
    ("changes", "own_head", "wanted"),
    [
        # transformers 4 and 5 write these for mT5; 5 reports every one as tied
        ({"tie_word_embeddings": False}, True, {}),
        ({"tie_word_embeddings": True, "transformers_version": "5.23.0"}, True, {}),
        ({"tie_word_embeddings": True, "transformers_version": "5.23.0"}, False, {"tie_word_embeddings": True}),
        # T5.1.1 by transformers 4, then as 5 saves it
        ({"model_type": "t5", "tie_word_embeddings": False}, True, {}),
        ({"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False}, True, {}),
        # the first T5, whose oldest files state little
        (
            {
                "model_type": "t5", "tie_word_embeddings": "absent", "feed_forward_proj": "absent",
                "dense_act_fn": "absent", "is_gated_act": "absent",
            },
            False,
            NUMERICS["t5-1.0"],
        ),
        ({"model_type": "t5", "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": False,
          "tie_word_embeddings": True, "scale_decoder_outputs": True}, False, NUMERICS["t5-1.0"]),
        # a T5 with a head of its own whose config does not say so: transformers 5 keeps the head and scales
        ({"model_type": "t5", "tie_word_embeddings": True}, True, {"scale_decoder_outputs": True}),
        # exact GELU, by either spelling
        ({"feed_forward_proj": "gated-gelu_python", "dense_act_fn": "absent"}, True,
         {"feed_forward_proj": "gated-gelu-erf"}),
        ({"dense_act_fn": "gelu"}, True, {"feed_forward_proj": "gated-gelu-erf"}),
        ({"feed_forward_proj": "gated-gelu_pytorch_tanh", "dense_act_fn": "absent"}, True, {}),
        # left out by writers of small configs
        ({"num_decoder_layers": "absent"}, True, {"num_decoder_layers": MODEL.num_encoder_layers}),
        ({"dropout_rate": None}, True, {"dropout_rate": 0.1}),
        ({"decoder_start_token_id": "absent"}, True, {"decoder_start_token_id": 0}),
    ],
)  # fmt: skip
def test_configs_of_transformers_4_and_5_are_understood(changes, own_head: bool, wanted):
    assert vars(read(own_head, **changes)) == vars(MODEL) | wanted


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip(name: str):
    model = MODELS[name]
    lost = {"inner_dropout": True, "cross_attention_bias": False}
    if not model.tie_word_embeddings:
        lost["scale_decoder_outputs"] = False  # folded into the head
    values = model_to_hf_config(model)
    read_back = model_from_hf_config(values, Path("config.json"), own_head=not model.tie_word_embeddings)
    assert vars(read_back) == vars(model) | lost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bart"}, "model_type is 'bart', mt5 or t5 was wanted"),
        ({"feed_forward_proj": "gated-silu", "dense_act_fn": "absent"}, "feed_forward_proj is 'gated-silu'"),
        ({"dense_act_fn": "silu"}, "dense_act_fn is 'silu'"),
        ({"feed_forward_proj": "gelu", "is_gated_act": False, "dense_act_fn": "absent"}, "feed_forward_proj is 'gelu'"),
        ({"d_model": None}, "d_model is None, a whole number was wanted"),
        ({"d_model": 12.0}, "d_model is 12.0, a whole number was wanted"),
        ({"num_heads": True}, "num_heads is True, a whole number was wanted"),
        ({"dropout_rate": "0.1"}, "dropout_rate is '0.1', a number was wanted"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', true or false was wanted"),
        ({"dense_act_fn": ["gelu_new"]}, r"dense_act_fn is \['gelu_new'\], a name was wanted"),
        ({"scale_decoder_outputs": True}, "scale_decoder_outputs is True, but transformers never scales.*t5"),
    ],
)
def test_foreign_architectures_are_refused_by_name(changes, message: str):
    with pytest.raises(UsageError, match=rf"config\.json: {message}"):
        read(True, **changes)


def test_a_tied_mt5_is_not_guessed():
    """Version 4 of transformers scaled it, version 5 does not."""
    for version in ({}, {"transformers_version": "4.57.1"}):
        with pytest.raises(UsageError, match=r"version 4 scaled its logits.*set model_type to t5"):
            read(False, tie_word_embeddings=True, **version)
    stated = read(False, tie_word_embeddings=True, scale_decoder_outputs=False)
    assert (stated.tie_word_embeddings, stated.scale_decoder_outputs) == (True, False)
    stated = read(False, tie_word_embeddings=True, model_type="t5")
    assert (stated.tie_word_embeddings, stated.scale_decoder_outputs) == (True, True)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("decoder_start_token_id", 0, "2"),
        ("eos_token_id", 1, "3"),
        ("vocab_size", 9, str(MODEL.vocab_size)),
        ("vocab_size", 999, str(MODEL.vocab_size)),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(exported, tmp_path: Path, field: str, value: int, wanted: str):
    def change(config, tensors):
        config[field] = value
        for table in ("shared.weight", "lm_head.weight") if field == "vocab_size" else ():
            tensors[table] = np.resize(tensors[table], (value, MODEL.d_model))

    folder = copy_with(exported["hf-mt5"], tmp_path / "changed", change)
    with pytest.raises(UsageError, match=rf"config\.json: {field} is {value}.*{wanted}"):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, t: t.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"), "EncDecAttention.k.weight is missing"),
        (lambda _, t: t.update({"encoder.block.9.extra": np.ones(2)}), "encoder.block.9.extra has no place"),
        (
            lambda _, t: t.update({"encoder.embed_tokens.weight": 1 + t["shared.weight"]}),
            "embed_tokens.weight has no place",
        ),
        (lambda c, _: c.update(d_ff=21), r"has shape \(20, 12\), config.json asks for \(21, 12\)"),
        # Larger than any memory: neither the arrays nor the list of the names may be made.
        (lambda c, _: c.update(d_model=10**12), r"config\.json asks for \(.*1000000000000.*\)"),
        (lambda c, _: c.update(num_layers=10**12), r"encoder\.block\.3\.\S+ is missing"),
        (lambda _, t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int8)}), "int8"),
    ],
)
def test_foreign_tensors_are_refused_by_name(exported, tmp_path: Path, change, message: str):
    folder = copy_with(exported["hf-mt5"], tmp_path / "changed", change)
    with pytest.raises(ArtifactError, match=message):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_that_got_lost_is_missed(exported, tmp_path: Path):
    folder = copy_with(exported["hf-mt5"], tmp_path / "headless", lambda _, tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(UsageError, match=r"tie_word_embeddings is False, but the weights have no lm_head\.weight"):
        import_hf(folder, tmp_path / "out")


def test_an_untied_head_that_equals_the_embedding_stays_untied(exported, tmp_path: Path):
    def change(_, tensors):
        tensors["lm_head.weight"] = tensors["shared.weight"]

    imported = import_hf(copy_with(exported["hf-mt5"], tmp_path / "equal", change), tmp_path / "out")
    assert imported.model == MODEL
    np.testing.assert_array_equal(imported.parameters["lm_head"].T, imported.parameters["token_embedding"])
