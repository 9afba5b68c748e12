import sys
import unicodedata
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from t5pegasus.text.clean import clean_documents, clean_text, reject_reason
from t5pegasus.text.read import Document

TRICKY = st.text(st.one_of(st.sampled_from(" \t\n\r\v\u3000\u200b\u2028\ufffd\u0301e\xa0。A中"), st.characters()))


@given(TRICKY)
def test_cleaning_twice_changes_nothing_more(text):
    once = clean_text(text)
    assert clean_text(once) == once
    assert once == once.strip()
    assert unicodedata.is_normalized("NFC", once)


def test_no_invisible_character_survives_and_every_visible_one_does():
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        category = unicodedata.category(character)
        cleaned = clean_text(f"中{character}文")
        if category in ("Cc", "Cf", "Cs", "Co") or character in "\ufffc\ufffd":
            assert cleaned in ("中文", "中\n文", "中 文"), hex(code)
        elif category in ("Zs", "Zl", "Zp"):
            assert cleaned in ("中 文", "中\n文"), hex(code)
        elif category != "Cn":
            assert cleaned == unicodedata.normalize("NFC", f"中{character}文"), hex(code)


def test_what_was_written_stays_as_it_was_written():
    text = "“ＡＢＣ”，１２３％：全角！　　第二段——……\r\n\r\n\t第三段 a  b\x07\u200b。\ufeff"
    assert clean_text(text) == "“ＡＢＣ”，１２３％：全角！ 第二段——……\n第三段 a b。"


def test_each_rejection_has_a_reason_and_is_counted():
    chinese = "这是一篇用来测试的文章，它的长度足够，而且几乎都是汉字。" * 2
    assert reject_reason(chinese) is None
    assert reject_reason("太短。") == "too short"
    assert reject_reason("def main(): return 0\n" * 9 + "中文") == "not Chinese enough"
    dropped = Counter()
    documents = [
        Document("1", f" {chinese}\r\n", " 题\u200b目 ", "源"),
        Document("2", "短"),
        Document("3", chinese, " "),
    ]
    assert list(clean_documents(documents, dropped)) == [
        Document("1", chinese, "题目", "源"),
        Document("3", chinese),
    ]
    assert dropped == {"too short": 1}
