"""Every reader of text and vocabularies is given what nobody wrote: it reads, counts or refuses, and never breaks."""

import gzip
import io
import json
from collections import Counter

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import RANDOM, mutate, mutate_json_bytes, read_or_refuse

from t5pegasus.corpus.pairs import read_pairs
from t5pegasus.text.read import Document, read_documents, read_lines_or_json
from t5pegasus.text.tokenizer import adopt_vocabulary, load_tokenizer
from t5pegasus.text.tokenizer.training import train_sentencepiece, train_wordpiece

LINES = "".join(
    json.dumps({"id": f"d{i}", "text": f"第{i}篇\n😀，一。", "title": None, "summary": '"题"'}, ensure_ascii=False)
    + "\n"
    for i in range(5)
).encode()
PLAIN = "第一篇。\r\n还是。\n\n\ufeff第二篇\u2028。\n".encode()


def parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    pq.write_table(pa.table({"text": ["甲。", None, "乙" * 50], "id": ["1", "2", None]}), stream)
    return stream.getvalue()


FILES = {
    "a.jsonl": LINES,
    "a.jsonl.gz": gzip.compress(LINES, mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.txt": PLAIN,
    "a.parquet": parquet(),
}
PAIRS = {"p.jsonl": LINES, "p.tsv": "题\t文\n没有\n".encode(), "p.tsv.gz": gzip.compress("题\t文\n".encode(), mtime=0)}
DOCUMENTS = [Document(str(i), f"第{i}篇文章说明模型训练与数据处理，network{i}。" * 4) for i in range(9)]
WORDPIECE = train_wordpiece(DOCUMENTS, 4012)
SENTENCEPIECE = train_sentencepiece(DOCUMENTS, 295)
BYTES = st.binary(max_size=300)
few = settings(max_examples=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def write_again(path):
    for document in read_documents([path], Counter()):
        assert all(part is None or isinstance(part, str) for part in (document.text, document.title, document.source))
        f"{document.id}{document.text}{document.title}{document.source}".encode()


@pytest.mark.parametrize("name", FILES)
@few
@given(content=BYTES, random=RANDOM)
def test_documents(folder, name, content, random):
    path = folder / name
    for written in (content, mutate(FILES[name], random)):
        path.write_bytes(written)
        read_or_refuse(write_again, path)


@pytest.mark.parametrize("name", PAIRS)
@few
@given(content=BYTES, random=RANDOM)
def test_pairs(folder, name, content, random):
    path = folder / name
    for written in (content, mutate(PAIRS[name], random)):
        path.write_bytes(written)
        read_or_refuse(lambda path: list(read_pairs([path], Counter())), path)


@few
@given(content=BYTES, random=RANDOM)
def test_lines_for_a_verb(content, random):
    for written in (content, mutate(LINES, random), mutate(PLAIN, random)):
        for key in ("text", "ids"):
            read_or_refuse(lambda stream, key: list(read_lines_or_json(stream, key)), io.BytesIO(written), key)


@few
@given(content=BYTES, random=RANDOM)
def test_a_vocabulary_list(folder, content, random):
    path = folder / "vocab.txt"
    tokens = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n\xe4\xb8\x80\n##a\nab\n"
    for written in (content, mutate(tokens, random)):
        path.write_bytes(written)
        if read_or_refuse(adopt_vocabulary, path):
            tokenizer = adopt_vocabulary(path)
            ids = tokenizer.encode("一 abc，\U0001f600")
            tokenizer.decode(ids)


@few
@given(content=BYTES, random=RANDOM)
def test_a_sentencepiece_model(folder, content, random):
    path = folder / "a.model"
    for written in (content, mutate(SENTENCEPIECE._model, random)):
        path.write_bytes(written)
        read_or_refuse(adopt_vocabulary, path)


@pytest.mark.parametrize("tokenizer", [WORDPIECE, SENTENCEPIECE], ids=["wordpiece", "sentencepiece"])
@few
@given(random=RANDOM)
def test_a_tokenizer_folder_is_read_as_it_was_written_or_refused(folder, tokenizer, random):
    path = folder / tokenizer.kind
    if not path.exists():
        tokenizer.save(path)
    file = random.choice(sorted(path.iterdir()))
    good = file.read_bytes()
    change = mutate_json_bytes if file.suffix == ".json" else mutate
    try:
        file.write_bytes(change(good, random))
        if read_or_refuse(load_tokenizer, path):
            assert load_tokenizer(path).fingerprint == tokenizer.fingerprint
    finally:
        file.write_bytes(good)
