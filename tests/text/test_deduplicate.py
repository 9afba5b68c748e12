import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from t5pegasus.text.deduplicate import digest_text, digest_texts, find_first_occurrences


@given(st.lists(st.sampled_from(["甲", "乙", "丙", "", "a"])))
def test_the_first_of_equal_texts_is_kept_whatever_the_order(texts):
    expected = [text not in texts[:index] for index, text in enumerate(texts)]
    assert find_first_occurrences(digest_texts(texts)).tolist() == expected


def test_digests_differ_if_and_only_if_the_words_do():
    assert digest_text("今天 晴\n") == digest_text(" 今天晴")
    assert digest_text("JAX") == digest_text("jax")
    assert digest_text("今天晴。") != digest_text("今天晴")
    assert len(digest_text("")) == 16


def test_both_halves_of_a_digest_count():
    digests = np.array([[1, 2], [1, 3], [4, 2], [1, 2]], np.uint64)
    assert find_first_occurrences(digests).tolist() == [True, True, True, False]


def test_parts_digested_by_different_processes_join_into_one_decision():
    texts = [f"第{index % 70}篇" for index in range(100)]
    parts = np.concatenate([digest_texts(texts[:33]), digest_texts(texts[33:])])
    assert np.array_equal(find_first_occurrences(parts), np.arange(100) < 70)
