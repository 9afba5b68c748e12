"""From another program's files to a checkpoint, by the command."""

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hf_models import WORDS, draw_parameters, load_parameters
from test_bert4keras import MODEL as BERT4KERAS_MODEL
from test_bert4keras import variables_of, write_folder
from test_t5x import MODEL as T5X_MODEL
from test_t5x import arrays_of, write_t5x

from launch import cli
from t5pegasus.checkpoint import load_checkpoint_info
from t5pegasus.convert.sources import is_foreign, open_source
from t5pegasus.errors import UsageError
from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

NUM_PADDING_ROWS = 7


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> SentencepieceTokenizer:
    """A small model with T5's special ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["天地玄黄宇宙洪荒", "日月盈昃辰宿列张", "寒来暑往秋收冬藏"] * 3), model_writer=model,
        vocab_size=32, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return SentencepieceTokenizer(model.getvalue())


def test_a_t5x_file_becomes_a_checkpoint_with_the_tokenizer_given(tmp_path: Path, tokenizer, capfd):
    model = dataclasses.replace(T5X_MODEL, vocab_size=tokenizer.vocab_size + NUM_PADDING_ROWS)
    source = write_t5x(tmp_path / "checkpoint_1000", arrays_of(model))
    command = ["convert", str(source), str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "--tokenizer-path" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    tokenizer.save(tmp_path / "tokenizer")
    assert cli.main([*command, "--tokenizer-path", str(tmp_path / "tokenizer")]) == 0
    printed = capfd.readouterr().out
    assert "T5X checkpoint" in printed
    assert printed.count("assumed: ") == 3
    assert f"the last {NUM_PADDING_ROWS} rows" in printed
    info = load_checkpoint_info(tmp_path / "out")
    assert info.config.model == dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    written, drawn = load_parameters(tmp_path / "out"), draw_parameters(model)
    assert written.keys() == drawn.keys()
    drawn["token_embedding"] = drawn["token_embedding"][:-NUM_PADDING_ROWS]
    drawn["lm_head"] = drawn["lm_head"][:, :-NUM_PADDING_ROWS]
    for name, array in drawn.items():
        np.testing.assert_array_equal(written[name], array)


def test_ids_of_a_format_are_not_said_to_be_correctable(tmp_path: Path, capfd):
    source = write_t5x(tmp_path / "checkpoint_1000", arrays_of(T5X_MODEL))
    WordpieceTokenizer(WORDS).save(tmp_path / "tokenizer")
    assert (
        cli.main(["convert", str(source), str(tmp_path / "out"), "--tokenizer-path", str(tmp_path / "tokenizer")]) == 2
    )
    assert capfd.readouterr().err.rstrip().endswith("is 2; give the tokenizer it was trained with")


def test_a_bert4keras_folder_becomes_a_checkpoint_with_its_own_vocabulary(tmp_path: Path, capfd):
    source = write_folder(tmp_path / "model", variables_of(BERT4KERAS_MODEL))
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert "numerics bert4keras" in capfd.readouterr().out
    assert load_checkpoint_info(tmp_path / "out").config.model == BERT4KERAS_MODEL
    written = load_parameters(tmp_path / "out")
    for name, array in draw_parameters(BERT4KERAS_MODEL).items():
        np.testing.assert_array_equal(written[name], array)
    assert cli.main(["convert", str(source), str(tmp_path / "again"), "--numerics", "hf-mt5"]) == 2
    assert "--numerics is for Hugging Face folders" in capfd.readouterr().err


def test_a_part_of_a_model_is_refused_by_the_folder_that_is_meant(tmp_path: Path):
    folder = write_folder(tmp_path / "model", variables_of(BERT4KERAS_MODEL))
    for name in ("bert_model.ckpt.index", "bert_model.ckpt.data-00000-of-00001"):
        with pytest.raises(UsageError, match=rf"{name} is one file of a model; give its folder .*model"):
            is_foreign(folder / name)
    for path in (folder / "vocab.txt", tmp_path, tmp_path / "nothing"):
        assert not is_foreign(path)
        with pytest.raises(UsageError, match="is no model that can be converted"):
            open_source(path)
