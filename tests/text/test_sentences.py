import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5pegasus.text.sentences import chunk_sentences, split_sentences

TEXTS = st.text(st.sampled_from("甲乙丙，。。！ \n"), max_size=400)
PROJECT = (
    "本项目训练一个中文摘要模型。\n模型采用编码器与解码器结构，先在通用语料上做伪摘要预训练，再在标题数据上微调。"
    "伪摘要任务从文档里挑出约四分之一的句子作为目标。\n其余句子作为原文，模型要根据原文生成被挑出的句子。"
    "分词器先用词典切词，再对未登录词做子词切分。\n训练使用固定学习率。评测采用字级指标。"
)


def test_short_sentences_are_joined_and_long_ones_stay_whole():
    sentences = split_sentences(PROJECT)
    assert [len(sentence) for sentence in sentences] == [14, 39, 24, 25, 22, 19]
    assert sentences[-1] == "训练使用固定学习率。评测采用字级指标。"
    assert list(chunk_sentences(sentences)) == [sentences]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", [""]),
        ("  短句。\n", ["短句。"]),
        ("一" * 20 + "。" + "二" * 20 + "！" + "三" * 9, ["一" * 20 + "。", "二" * 20 + "！" + "三" * 9]),
        ("一" * 33, ["一" * 33]),
        ("一" * 30 + "\n" + "二" * 5 + "\n" + "三" * 5, ["一" * 30, "二" * 5 + "\n" + "三" * 5]),
        ("一" * 15 + "。" + "二" * 15 + "。三", ["一" * 15 + "。" + "二" * 15 + "。", "三"]),
        ("一" * 32 + "\n   \n" + "二" * 32, ["一" * 32, "", "二" * 32]),
    ],
)
def test_separators_limits_and_white_space(text, sentences):
    assert split_sentences(text) == sentences


@given(TEXTS)
def test_nothing_but_white_space_is_lost_and_separators_stay_at_the_end(text):
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    for sentence in sentences:
        assert len(sentence) <= 32 or "。" not in sentence[:-1].rstrip("。")


@given(st.lists(st.integers(0, 400).map("字".__mul__)))
def test_chunks_are_consecutive_have_three_sentences_and_grow_over_the_limit_only_for_that(sentences):
    chunks = list(chunk_sentences(sentences))
    joined = [sentence for chunk in chunks for sentence in chunk]
    assert joined == sentences[: len(joined)]
    assert len(sentences) - len(joined) < 3
    for chunk in chunks:
        assert len(chunk) >= 3
        assert len("".join(chunk)) <= 768 or len(chunk) == 3
