"""Which tokens stand for spans that are cut out, in each kind of vocabulary."""

import pytest

from t5pegasus.errors import UsageError
from t5pegasus.text.read import Document
from t5pegasus.text.tokenizer.sentinels import find_sentinels
from t5pegasus.text.tokenizer.training import train_sentencepiece
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def test_unused_entries_of_a_list_in_the_order_of_their_numbers():
    tokenizer = WordpieceTokenizer([*SPECIALS, "[unused10]", "[unused2]", "[unused1]", "unused3"])
    assert find_sentinels(tokenizer, 3) == (6, 5, 4)
    with pytest.raises(UsageError, match=r"has 3 of the 4 tokens \[unused1\]"):
        find_sentinels(tokenizer, 4)


def test_sentinels_of_a_trained_sentencepiece_model_are_at_its_end_as_in_t5():
    documents = [Document(str(at), "今天天气很好，我们去公园看花。" * 3 + chr(0x4E00 + at)) for at in range(40)]
    plain, tokenizer = train_sentencepiece(documents, 314), train_sentencepiece(documents, 324, num_sentinels=10)
    assert tokenizer.vocab_size == 324
    assert find_sentinels(tokenizer, 10) == tuple(range(323, 313, -1))
    text = "我们去看花。"
    assert tokenizer.encode(text) == plain.encode(text)
    with pytest.raises(UsageError, match="--num-sentinels 100"):
        find_sentinels(plain, 1)
