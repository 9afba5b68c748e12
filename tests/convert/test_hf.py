"""Laws of exchange with Hugging Face: there and back is the identity; what would compute something else is refused."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hf_models import (
    LOSSLESS,
    MODEL,
    MODELS,
    WORDS,
    copy_with,
    draw_inputs,
    draw_parameters,
    import_hf,
    load_parameters,
    our_logits,
)
from numpy_t5 import forward
from safetensors.numpy import load_file

from t5pegasus.checkpoint import has_optimizer_state, load_arrays, load_checkpoint_info
from t5pegasus.config import NUMERICS
from t5pegasus.convert.hf import export_hf, fold_scale, is_hf_folder, read_hf
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.errors import ArtifactError, T5PegasusError, UsageError
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

FILES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenization_t5_pegasus.py",
    "tokenizer_config.json", "vocab.txt",
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_independent_forward_gives_our_logits(checkpoints, name: str):
    parameters = load_parameters(checkpoints[name])
    tensors = parameters_to_hf(parameters, MODELS[name])
    source, mask, decoder_input = draw_inputs(MODEL.vocab_size)
    ours = our_logits(MODELS[name], parameters, source, mask, decoder_input)
    for row in range(2):
        theirs = forward(tensors, MODELS[name], source[row], mask[row], decoder_input[row])
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LOSSLESS)
def test_import_after_export_is_the_identity(checkpoints, exported, tmp_path: Path, name: str):
    import_hf(exported[name], tmp_path / "again")
    assert load_checkpoint_info(tmp_path / "again") == load_checkpoint_info(checkpoints[name])
    before, after = load_arrays(checkpoints[name]), load_arrays(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(array, after[key])
    assert not has_optimizer_state(tmp_path / "again")


@pytest.mark.parametrize("name", MODELS)
def test_export_after_import_gives_the_same_bytes(exported, tmp_path: Path, name: str):
    import_hf(exported[name], tmp_path / "imported")
    again = export_hf(tmp_path / "imported", tmp_path / "again")
    for file in FILES - {"README.md"}:  # the card tells of the checkpoint before, too
        assert (again / file).read_bytes() == (exported[name] / file).read_bytes(), file


def test_folding_the_scale_into_the_head_keeps_the_logits(exported, checkpoints, tmp_path: Path):
    """Of bert4keras' three numerics only the bias of cross-attention is lost."""
    config = MODELS["bert4keras"]
    folded = fold_scale(config)
    assert folded.numerics == "custom"
    parameters = load_parameters(checkpoints["bert4keras"])
    tensors = load_file(exported["bert4keras"] / "model.safetensors")
    source, mask, decoder_input = (array[0] for array in draw_inputs(MODEL.vocab_size))
    exact = parameters_to_hf(parameters, config)
    logits = forward(tensors, folded, source, mask, decoder_input)
    without_bias = {**vars(config), "cross_attention_bias": False}
    wanted = forward(exact, type(config)(**without_bias), source, mask, decoder_input)
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-6)
    assert np.abs(logits - forward(exact, config, source, mask, decoder_input)).max() > 0.01


def test_refined_buckets_and_masked_tokens_are_refused_and_a_lossy_export_does_without_them(tmp_path: Path):
    grown = replace(MODEL, relative_attention_boundaries=(15, 20), num_masked_tokens=2)
    parameters = draw_parameters(grown)
    checkpoint = save_imported(Imported(grown, parameters, WordpieceTokenizer(WORDS)), tmp_path / "grown")
    lost = r"relative_attention_boundaries=\(15, 20\) is lost, .* from 14 on .*num_masked_tokens=2 is lost.*--lossy"
    with pytest.raises(UsageError, match=lost):
        export_hf(checkpoint, tmp_path / "out")
    folder = export_hf(checkpoint, tmp_path / "out", lossy=True)
    assert re.search(lost.removesuffix(".*--lossy"), (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    foreign = read_hf(folder)
    assert foreign.model == MODEL
    for name, array in foreign.parameters.items():
        np.testing.assert_array_equal(array, parameters[name][: len(array)])


def test_a_lossy_export_is_refused_and_says_what_it_lost(checkpoints, exported, tmp_path: Path):
    with pytest.raises(UsageError, match=r"model\.cross_attention_bias is lost.*--lossy"):
        export_hf(checkpoints["bert4keras"], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    card = (exported["bert4keras"] / "README.md").read_text(encoding="utf-8")
    assert "model.cross_attention_bias is lost" in card
    for name in LOSSLESS:
        assert "is lost" not in (exported[name] / "README.md").read_text(encoding="utf-8")


def test_export_is_complete_and_reproducible(checkpoints, exported, tmp_path: Path):
    folder = exported["hf-mt5"]
    again = export_hf(checkpoints["hf-mt5"], tmp_path / "again")
    assert is_hf_folder(folder)
    assert {file.name for file in folder.iterdir()} == FILES | {"SHA256SUMS"}
    sums = dict(
        reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").split("\n")[:-1]
    )
    assert sums.keys() == FILES
    for name, digest in sums.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert (again / "SHA256SUMS").read_bytes() == (folder / "SHA256SUMS").read_bytes()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "9,464" in card
    assert sums["model.safetensors"] in card
    assert "pad 0, decoder start 2, end 3, unknown 1" in card
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"pad_token_id": 0, "decoder_start_token_id": 2, "eos_token_id": 3, "max_new_tokens": 128}
    assert not [name for name in load_file(folder / "model.safetensors") if "embed_tokens" in name]


def test_the_head_stands_in_the_file_unless_it_is_the_embedding(exported):
    for name, model in MODELS.items():
        tensors = load_file(exported[name] / "model.safetensors")
        assert ("lm_head.weight" in tensors) == (not model.tie_word_embeddings), name
        config = json.loads((exported[name] / "config.json").read_text(encoding="utf-8"))
        assert config["tie_word_embeddings"] is model.tie_word_embeddings


def test_bfloat16_and_repeated_embeddings_are_read(exported, tmp_path: Path):
    def change(config, tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        for copy in ("encoder.embed_tokens.weight", "lm_head.weight"):
            tensors[copy] = tensors["shared.weight"]
        # Files of the first T5 models hold this table, which is never read.
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones((8, 5))

    narrow = read_hf(copy_with(exported["t5-1.0"], tmp_path / "narrow", change))
    wide = load_file(exported["t5-1.0"] / "model.safetensors")["shared.weight"]
    assert narrow.model == MODELS["t5-1.0"]
    np.testing.assert_allclose(narrow.parameters["token_embedding"], wide, rtol=2**-8)


def test_an_embedding_stored_under_another_name_alone_is_read(exported, tmp_path: Path):
    def change(config, tensors):
        tensors["decoder.embed_tokens.weight"] = tensors.pop("shared.weight")

    for name in ("hf-mt5", "t5-1.0"):
        folder = copy_with(exported[name], tmp_path / name, change)
        for key, array in read_hf(exported[name]).parameters.items():
            np.testing.assert_array_equal(read_hf(folder).parameters[key], array)


@pytest.mark.parametrize("name", ["hf-mt5", "t5-1.0"])
def test_padding_rows_of_the_vocabulary_are_left_out(checkpoints, exported, tmp_path: Path, name: str):
    def change(config, tensors):
        config["vocab_size"] += 5
        for table in {"shared.weight", "lm_head.weight"} & tensors.keys():
            tensors[table] = np.concatenate([tensors[table], np.full((5, MODEL.d_model), 7, np.float32)])

    imported = import_hf(copy_with(exported[name], tmp_path / "padded", change), tmp_path / "out")
    assert imported.num_padding_rows == 5
    assert load_checkpoint_info(tmp_path / "out") == load_checkpoint_info(checkpoints[name])
    for key, array in load_parameters(checkpoints[name]).items():
        np.testing.assert_array_equal(load_parameters(tmp_path / "out")[key], array)


def test_a_port_of_t5_pegasus_needs_its_numerics_named(exported, tmp_path: Path):
    """Their config says mT5 with its ids; the weights are bert4keras'."""
    port = copy_with(
        exported["hf-mt5"],
        tmp_path / "port",
        lambda config, _: config.update(decoder_start_token_id=0, eos_token_id=1, tie_word_embeddings=False),
    )
    with pytest.raises(UsageError, match=r"decoder_start_token_id is 0.*\[CLS\] 2.*--numerics bert4keras"):
        read_hf(port)
    imported = import_hf(port, tmp_path / "out", numerics="bert4keras")
    assert imported.model == MODELS["bert4keras"]
    for key, array in read_hf(exported["hf-mt5"]).parameters.items():
        np.testing.assert_array_equal(imported.parameters[key], array)


def test_numerics_that_the_tensors_contradict_are_refused(exported):
    with pytest.raises(ArtifactError, match=r"DenseReluDense\.wi\.weight is missing"):
        read_hf(exported["hf-mt5"], "t5-1.0")
    with pytest.raises(ArtifactError, match=r"wi_0\.weight is missing"):
        read_hf(exported["t5-1.0"], "bert4keras")
    assert NUMERICS.keys() <= MODELS.keys()


def test_cut_files_and_taken_outputs_are_refused(exported, checkpoints, tmp_path: Path):
    folder = copy_with(exported["hf-mt5"], tmp_path / "cut", lambda *_: None)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        import_hf(folder, tmp_path / "out")
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "vocab.txt").unlink()
    with pytest.raises(UsageError, match="--tokenizer-path"):
        import_hf(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="exists already"):
        import_hf(exported["hf-mt5"], tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        export_hf(checkpoints["hf-mt5"], tmp_path)
    with pytest.raises(T5PegasusError):
        export_hf(tmp_path, tmp_path / "out")


def test_logits_of_transformers_are_ours(shared_data: Path):
    """A real T5.1.1 model, computed by transformers' Flax code, through the same name map."""
    foreign = read_hf(shared_data / "checkpoints" / "hf_flax_t5_tiny")
    reference = np.load(shared_data / "refs" / "t5_tiny_hf_ref.npz")
    inputs = (reference[name] for name in ("input_ids", "attention_mask", "decoder_input_ids"))
    logits = our_logits(foreign.model, foreign.parameters, *inputs)
    np.testing.assert_allclose(logits[..., :512], reference["logits_first512"], rtol=0, atol=1e-5)
    largest = logits.max(-1)
    normalizer = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    np.testing.assert_allclose(normalizer, reference["logits_lse"], rtol=0, atol=1e-5)
