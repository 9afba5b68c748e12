"""Laws of another vocabulary: the same one changes nothing, a permuted one permutes, other ones match by text."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hf_models import MODELS, WORDS, draw_inputs, draw_parameters, our_logits

from t5pegasus.convert.imported import Imported
from t5pegasus.convert.retokenize import map_vocabulary, retokenize
from t5pegasus.sample import TRAIN_PATH
from t5pegasus.text.read import Document, read_documents
from t5pegasus.text.tokenizer import Tokenizer, adopt_vocabulary
from t5pegasus.text.tokenizer.training import train_sentencepiece
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

SMALL = [
    "[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "天", "地", "今", "天地", "model", "##s", "##ing",
    "##天", "!", "，",
]  # fmt: skip


def draw_model(tokenizer: Tokenizer, numerics: str = "hf-mt5") -> Imported:
    model = dataclasses.replace(
        MODELS[numerics], vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.pad_id,
        decoder_start_token_id=tokenizer.start_id, eos_token_id=tokenizer.end_id,
    )  # fmt: skip
    return Imported(model, draw_parameters(model), tokenizer)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    english = "The models are training on words, and reading the words of models that were training before. "
    documents = [*read_documents([TRAIN_PATH]), *(Document(str(number), english * 10) for number in range(60))]
    return train_sentencepiece(documents, 2500)


def find_piece(tokenizer: Tokenizer, *, begins_word: bool) -> str:
    """The text of an English piece."""
    texts = filter(None, map(tokenizer.token_text, range(tokenizer.vocab_size)))
    fitting = (text for text, begins in texts if begins == begins_word)
    return next(text for text in fitting if text.isascii() and text.isalpha() and text.islower())


@pytest.mark.parametrize("numerics", ["hf-mt5", "t5-1.0"])
def test_the_same_vocabulary_is_the_identity(sentencepiece: Tokenizer, numerics: str):
    for tokenizer in (WordpieceTokenizer(SMALL), sentencepiece):
        before = draw_model(tokenizer, numerics)
        after, mapped = retokenize(before, tokenizer)
        assert after.model == before.model
        assert after.parameters.keys() == before.parameters.keys()
        for name, array in before.parameters.items():
            np.testing.assert_array_equal(after.parameters[name], array)
        assert mapped.special + mapped.direct == tokenizer.vocab_size


@pytest.mark.parametrize("numerics", ["hf-mt5", "t5-1.0"])
def test_a_permuted_vocabulary_permutes_the_logits(numerics: str):
    """Probabilities of the same tokens are the same, and with them every cross-entropy."""
    before = draw_model(WordpieceTokenizer(WORDS), numerics)
    order = np.random.default_rng(4).permutation(len(WORDS))
    after, _ = retokenize(before, WordpieceTokenizer([WORDS[old] for old in order]))
    new_of_old = np.argsort(order)
    np.testing.assert_array_equal(after.parameters["token_embedding"][new_of_old], before.parameters["token_embedding"])
    assert after.model.decoder_start_token_id == new_of_old[2]
    source, mask, decoder_input = draw_inputs(len(WORDS))
    logits = our_logits(before.model, before.parameters, source, mask, decoder_input)
    permuted = our_logits(after.model, after.parameters, new_of_old[source], mask, new_of_old[decoder_input])
    np.testing.assert_allclose(permuted[..., new_of_old], logits, rtol=0, atol=1e-5)


def test_rows_are_those_of_the_same_text_or_the_mean_of_its_pieces(sentencepiece: Tokenizer):
    old = sentencepiece
    inner, word = find_piece(old, begins_word=False), find_piece(old, begins_word=True)
    tokens = [*SMALL, f"##{inner}", word]
    before = draw_model(old)
    after, mapped = retokenize(before, WordpieceTokenizer(tokens))

    def source_of(token: str) -> list[str]:
        return [old.token(index) for index in mapped.sources[tokens.index(token)]]

    for token, role in (("[PAD]", "pad_id"), ("[CLS]", "start_id"), ("[SEP]", "end_id"), ("[UNK]", "unk_id")):
        assert mapped.sources[tokens.index(token)] == (getattr(old, role),)
    assert source_of("[unused1]") == source_of("[MASK]") == [old.token(old.unk_id)]
    assert source_of("天") == source_of("##天") == ["天"]
    assert source_of(f"##{inner}") == [inner]
    assert source_of(word) == [f"▁{word}"]
    spelled = [piece for piece in map(old.token, old.encode("天地")) if piece != "▁"]
    assert source_of("天地") == spelled
    for name, table in (("token_embedding", lambda array: array), ("lm_head", np.transpose)):
        rows = table(before.parameters[name])
        for index, ids in enumerate(mapped.sources):
            wanted = rows[list(ids)].astype(np.float64).mean(axis=0).astype(np.float32)
            np.testing.assert_array_equal(table(after.parameters[name])[index], wanted)
    for name in before.parameters.keys() - {"token_embedding", "lm_head"}:
        np.testing.assert_array_equal(after.parameters[name], before.parameters[name])


def test_pieces_find_their_words_and_what_has_no_spelling_is_named(sentencepiece: Tokenizer):
    inner, word = (find_piece(sentencepiece, begins_word=begins) for begins in (False, True))
    tokens = [*SMALL, f"##{inner}", word]
    mapped = map_vocabulary(WordpieceTokenizer(tokens), sentencepiece)
    by_piece = {sentencepiece.token(index): ids for index, ids in enumerate(mapped.sources)}
    of = {token: index for index, token in enumerate(tokens)}
    assert by_piece["天"] == (of["天"],)  # not ##天, which no text ever gives
    assert by_piece["，"] == (of["，"],)
    assert by_piece[inner] == (of[f"##{inner}"],)
    assert by_piece[f"▁{word}"] == (of[word],)
    assert by_piece["<pad>"] == (of["[CLS]"],)  # decoding starts with it; as padding nobody reads it
    assert by_piece["<0x0A>"] == by_piece["▁"] == (of["[UNK]"],)
    assert "月" in mapped.unknown
    assert "天" not in mapped.unknown
    counted = mapped.special + mapped.direct + sum(mapped.means.values()) + mapped.reserved + len(mapped.unknown)
    # pad is the start, too: one role less than in a wordpiece vocabulary
    assert (mapped.special, counted) == (3, sentencepiece.vocab_size)
    assert mapped.to_json()["unknown"] == list(mapped.unknown)
    assert f"{mapped.direct:,}" in mapped.to_table()


def test_published_vocabularies_match_at_known_rates(shared_data: Path):
    """Both list Chinese words: most of the released T5 PEGASUS vocabulary stands in the sentencepiece one."""
    vocab = shared_data / "vocab"
    released = adopt_vocabulary(vocab / "t5_pegasus_vocab_50000.txt")
    pieces = adopt_vocabulary(vocab / "uer_cluecorpussmall_spm.model")
    characters = adopt_vocabulary(vocab / "bert_google_zh_vocab_21128.txt", dictionary=False)
    to_released = map_vocabulary(pieces, released)
    assert (to_released.special, to_released.direct, to_released.reserved) == (4, 34_620, 102)
    # Full-width marks become half-width ones in NFKC: their only piece is that of another text.
    assert (to_released.means[1], to_released.means[2], len(to_released.unknown)) == (59, 13_426, 739)
    from_characters = map_vocabulary(characters, released)
    assert (from_characters.direct, from_characters.means[2], len(from_characters.unknown)) == (9_810, 28_850, 71)
