"""New tokens through growth: tokenizer, rows and probabilities, masked, open, and in a Hugging Face folder."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from growth.choices import Choices
from growth.evidence import draw_batches
from growth.grow import grow_checkpoint
from launch import cli
from launch.recipes.grow_hugging_face import grow_hugging_face
from t5pegasus.checkpoint import load_arrays, load_checkpoint_info
from t5pegasus.config import NUMERICS, DataConfig, ModelConfig
from t5pegasus.convert.hf import export_hf, is_hf_folder, read_hf
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.text.tokenizer import load_tokenizer
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往今气预报"]
MODEL = ModelConfig(
    vocab_size=len(WORDS), d_model=12, d_kv=3, d_ff=20, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0, pad_token_id=0,
    decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip
TOKENS = ["天地", "今天"]
PIECES = [[WORDS.index(character) for character in token] for token in TOKENS]


@pytest.fixture(scope="module", params=["hf-mt5", pytest.param("t5-1.0", marks=pytest.mark.slow)])
def checkpoint(request, tmp_path_factory) -> Path:
    model = dataclasses.replace(MODEL, **NUMERICS[request.param])
    random = np.random.default_rng(5)
    parameters = {
        name: (random.uniform(0.5, 1.5, spec.shape) if spec.gain else spec.init_std * random.normal(size=spec.shape))
        for name, spec in declare_parameters(model).items()
    }
    parameters = {name: array.astype(np.float32) for name, array in parameters.items()}
    folder = tmp_path_factory.mktemp(request.param) / "source"
    return save_imported(Imported(model, parameters, WordpieceTokenizer(WORDS)), folder)


def compute_logits(folder: Path) -> np.ndarray:
    model = load_checkpoint_info(folder).config.model
    (batch,) = draw_batches(MODEL, DataConfig(max_source_tokens=9, max_target_tokens=5), seed=1)
    parameters = {name.removeprefix("parameters."): array for name, array in load_arrays(folder).items()}
    named = {name: jnp.asarray(parameters[name]) for name in declare_parameters(model)}
    return np.asarray(bind(model, named)(batch), np.float64)


def test_tokens_are_added_masked_and_opened(checkpoint, tmp_path):
    source = load_checkpoint_info(checkpoint)
    target = dataclasses.replace(source.config.model, d_ff=31)
    masked = grow_checkpoint(checkpoint, target, tmp_path / "masked", tokens=TOKENS, masked=True, receipt="logits")
    grown = load_checkpoint_info(masked.path)
    assert (grown.config.model.vocab_size, grown.config.model.num_masked_tokens) == (MODEL.vocab_size + 2, 2)
    tokenizer = load_tokenizer(masked.path / "tokenizer")
    assert tokenizer.fingerprint == grown.tokenizer_fingerprint != source.tokenizer_fingerprint
    assert tokenizer.encode("今天") == [MODEL.vocab_size + 1]
    before, after = compute_logits(checkpoint), compute_logits(masked.path)
    np.testing.assert_allclose(after[..., :-2], before, atol=1e-5)
    assert after[..., -2:].max() < -1e30
    rows = load_arrays(masked.path)["parameters.token_embedding"]
    for row, pieces in zip(rows[-2:], PIECES):
        np.testing.assert_allclose(row, rows[pieces].mean(0), rtol=1e-6, atol=1e-7)
    opened = grow_checkpoint(
        masked.path, dataclasses.replace(grown.config.model, num_masked_tokens=0), tmp_path / "open", receipt="logits"
    )
    assert opened.receipt.promise == "L"
    logits = compute_logits(opened.path)
    np.testing.assert_array_equal(logits[..., :-2], after[..., :-2])
    assert logits[..., -2:].min() > -1e3
    direct = grow_checkpoint(checkpoint, target, tmp_path / "direct", tokens=TOKENS, receipt="logits")
    np.testing.assert_array_equal(compute_logits(direct.path), logits)


def test_another_set_of_tokens_is_another_growth(checkpoint, tmp_path):
    target = load_checkpoint_info(checkpoint).config.model
    grow_checkpoint(checkpoint, target, tmp_path / "grown", tokens=TOKENS, receipt="arrays")
    again = grow_checkpoint(checkpoint, target, tmp_path / "grown", tokens=TOKENS, receipt="arrays")
    assert again.already_there
    with pytest.raises(ArtifactError, match="grown by another plan"):
        grow_checkpoint(checkpoint, target, tmp_path / "grown", tokens=["天气"], receipt="arrays")


def test_flags_about_tokens_say_what_they_go_with(checkpoint, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("天地\n天\n", encoding="utf-8")
    for flags, message in (
        (["--masked"], "--masked goes with --add-tokens"),
        (["--open-tokens"], "the checkpoint's model has no masked tokens"),
        (["--add-tokens", str(words)], "is in the vocabulary already"),
        (["--add-tokens", str(tmp_path / "none.txt")], "there is no such file"),
    ):
        assert cli.main(["grow", str(checkpoint), str(tmp_path / "grown"), *flags]) == 2
        assert message in capsys.readouterr().err
    words.write_text("天地\n", encoding="utf-8")
    assert cli.main(["grow", str(checkpoint), "--add-tokens", str(words), "--explain"]) == 0
    assert f"{MODEL.vocab_size} → {MODEL.vocab_size + 1}" in capsys.readouterr().out


def test_a_hugging_face_folder_grows_into_a_larger_one(checkpoint, tmp_path):
    folder = export_hf(checkpoint, tmp_path / "hf")
    model = read_hf(folder).model
    target = dataclasses.replace(model, d_model=18, num_heads=3, num_decoder_layers=2)
    done, grown = grow_hugging_face(
        folder, tmp_path / "grown", lambda _: (target, Choices()), tokens=["天地"], receipt="logits"
    )
    assert is_hf_folder(grown)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grown", "hf"]
    foreign = read_hf(grown)
    assert foreign.model == dataclasses.replace(target, vocab_size=model.vocab_size + 1)
    assert done.receipt.promise == "L"
    back = save_imported(
        Imported(foreign.model, foreign.parameters, load_tokenizer_of(grown, model.vocab_size + 1)), tmp_path / "back"
    )
    np.testing.assert_allclose(compute_logits(back)[..., :-1], compute_logits(checkpoint), atol=1e-5)


def load_tokenizer_of(folder: Path, size: int) -> WordpieceTokenizer:
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == size
    return WordpieceTokenizer(lines)


def test_what_a_folder_for_transformers_cannot_hold_is_refused_before_anything_grows(checkpoint, tmp_path, capsys):
    folder = export_hf(checkpoint, tmp_path / "hf")
    target = dataclasses.replace(read_hf(folder).model, relative_attention_boundaries=(30,))
    with pytest.raises(UsageError, match="cannot be grown to a folder for transformers"):
        grow_hugging_face(folder, tmp_path / "grown", lambda _: (target, Choices()))
    words = tmp_path / "words.txt"
    words.write_text("天地\n", encoding="utf-8")
    assert cli.main(["grow", str(folder), str(tmp_path / "grown"), "--add-tokens", str(words), "--masked"]) == 2
    assert "which knows no masked tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("grown*"))
