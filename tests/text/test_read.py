import gzip
import io
import json
from collections import Counter

import pytest
import zstandard

from t5pegasus.errors import DataError, UsageError
from t5pegasus.text import lines
from t5pegasus.text.read import Document, read_documents, read_lines_or_json

RECORDS = [
    {"id": "甲", "text": "第一篇。\n第二行\u2028不断行。", "title": "题", "source": "报"},
    {"text": "第二篇。", "extra": [1]},
    {"id": 7, "text": "第三篇。", "title": None},
]
JSON_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode("utf-8")


def expected(name):
    return [
        Document("甲", RECORDS[0]["text"], "题", "报"),
        Document(f"{name}:2", "第二篇。"),
        Document("7", "第三篇。"),
    ]


def test_every_packing_of_json_lines_gives_the_same_documents(tmp_path):
    packings = {
        "a.jsonl": JSON_LINES,
        "a.jsonl.gz": gzip.compress(JSON_LINES),
        "a.jsonl.zst": zstandard.compress(JSON_LINES[:50]) + zstandard.compress(JSON_LINES[50:]),
        "bom.jsonl": b"\xef\xbb\xbf" + JSON_LINES.replace(b"\n", b"\r\n"),
    }
    for name, content in packings.items():
        (tmp_path / name).write_bytes(content)
        dropped = Counter()
        assert list(read_documents([tmp_path / name], dropped)) == expected(name)
        assert not dropped


def test_the_last_line_needs_no_end_and_chunk_borders_do_not_matter(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES.rstrip())
    for size in range(1, 40):
        monkeypatch.setattr(lines, "CHUNK_BYTES", size)
        assert list(read_documents([tmp_path / "a.jsonl"])) == expected("a.jsonl")


def test_a_window_of_128_mib_is_read(tmp_path):
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = compressor.compress(JSON_LINES) + compressor.flush()
    assert zstandard.get_frame_parameters(content).window_size == 2**27
    (tmp_path / "a.jsonl.zst").write_bytes(content)
    assert list(read_documents([tmp_path / "a.jsonl.zst"])) == expected("a.jsonl.zst")


def test_a_small_file_that_unpacks_to_much_takes_little_memory(tmp_path):
    """256 MiB of zeros come in pieces of at most 64 MiB."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(1 << 24)
    with (tmp_path / "a.jsonl.zst").open("wb") as file:
        for _ in range(16):
            file.write(compressor.compress(zeros))
        file.write(compressor.flush())
    assert (tmp_path / "a.jsonl.zst").stat().st_size < 1 << 16
    sizes = [len(chunk) for chunk in lines._read_chunks(tmp_path / "a.jsonl.zst")]
    assert sum(sizes) == 16 << 24
    assert max(sizes) <= 64 << 20


def test_bad_records_are_counted_by_reason_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("t5pegasus.text.lines.MAX_RECORD_BYTES", 2000)
    bad = [
        b'{"text": "cut',
        "{'text': '单引号'}".encode(),
        b"[" * 1500,
        b"1" * 1900,
        b'["a"]',
        b'{"title": "x"}',
        b'{"text": null}',
        b'{"text": 3}',
        b'{"text": "x", "title": ["y"]}',
        '{"text": "编码"}'.encode("gb18030"),
        rb'{"text": "\ud800"}',
        b'{"text": "' + b"x" * 3000 + b'"}',
        b"",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(bad) + '\n{"text": "好"}\n'.encode())
    dropped = Counter()
    assert list(read_documents([tmp_path / "a.jsonl"], dropped)) == [Document("a.jsonl:14", "好")]
    assert dropped.pop(lines.TOO_LONG) == 1
    assert dropped["not a JSON object"] + dropped["not valid JSON"] == 5
    assert (dropped["no text"], dropped["a field is not a string"], dropped["not valid UTF-8"]) == (2, 2, 2)
    assert dropped.total() == 11


def test_plain_text_is_cut_at_blank_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("t5pegasus.text.read.MAX_RECORD_BYTES", 100)
    gbk, long = "错误编码".encode("gbk"), b"x" * 60 + b"\n" + b"y" * 60
    blocks = [*("\n\n甲一\r\n甲二\n \t\n\n乙\u2028丙".encode(), gbk, long), "丁".encode()]
    (tmp_path / "a.txt").write_bytes(b"\n\n".join(blocks))
    dropped = Counter()
    assert list(read_documents([tmp_path / "a.txt"], dropped)) == [
        Document("a.txt:3", "甲一\n甲二"),
        Document("a.txt:7", "乙\u2028丙"),
        Document("a.txt:14", "丁"),
    ]
    assert dropped == {"not valid UTF-8": 1, lines.TOO_LONG: 1}


def test_parquet_gives_the_same_documents_and_counts_bad_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = pa.array([record["text"].encode("utf-8") for record in RECORDS] + [b"\xff\xfe", None], pa.binary())
    table = pa.table({
        "text": texts.view(pa.string()),
        "id": ["甲", None, "7", None, None],
        "title": pa.array(["题", None, None, None, None]).dictionary_encode(),
        "source": ["报", None, None, None, None],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    dropped = Counter()
    assert list(read_documents([tmp_path / "a.parquet"], dropped)) == expected("a.parquet")
    assert dropped == {"not valid UTF-8": 1, "no text": 1}
    pq.write_table(table.drop(["text"]), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet has no column 'text'; it has id"):
        list(read_documents([tmp_path / "b.parquet"]))
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"c\.parquet is not a whole Parquet file"):
        list(read_documents([tmp_path / "c.parquet"]))


def test_unusable_files_are_named_before_anything_is_read(tmp_path):
    good, empty, other = tmp_path / "good.jsonl", tmp_path / "empty.jsonl", tmp_path / "a.docx"
    good.write_bytes(JSON_LINES)
    empty.touch()
    other.write_bytes(b"x")
    for path, message in [
        (empty, "is empty"),
        (other, "unknown kind; known are .jsonl"),
        (tmp_path / "missing.jsonl", "does not exist"),
        (tmp_path, "is a folder"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            read_documents([good, path])
        assert str(path) in str(caught.value)
    with pytest.raises(UsageError, match="no input files"):
        read_documents([])


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_file_that_was_cut_off_is_an_error_and_not_a_short_corpus(tmp_path, name):
    content = gzip.compress(JSON_LINES) if name.endswith("gz") else zstandard.compress(JSON_LINES)
    for part in (content[:-4], content[:20], b"not compressed"):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(UsageError, match=f"{name} is damaged or cut off"):
            list(read_documents([tmp_path / name]))


def test_verbs_read_json_lines_or_plain_lines_from_files_and_streams(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n" + JSON_LINES))
    assert list(read_lines_or_json(tmp_path / "a.jsonl.gz")) == RECORDS
    assert list(read_lines_or_json(io.BytesIO(JSON_LINES))) == RECORDS
    plain = "\n今天\u2028晴\r\n\n{不是 JSON}\n".encode()
    assert [record["text"] for record in read_lines_or_json(io.BytesIO(plain))] == [
        "",
        "今天\u2028晴",
        "",
        "{不是 JSON}",
    ]
    assert list(read_lines_or_json(io.BytesIO(b"\n"))) == [{"text": ""}]


def test_verbs_name_the_line_they_cannot_read():
    for content, message in [
        (b'{"text": "a"}\nplain\n', "stdin:2 must be a JSON object with the key 'text', got 'plain'"),
        (b'{"body": "a"}\n', "stdin:1 must be a JSON object with the key 'text'"),
        ('{"text": "今\n{"text": "天"}\n'.encode(), "stdin:1 must be a JSON object with the key 'text'"),
        (b'{"text": "\\ud800"}\n', "stdin:1 holds half a surrogate pair"),
        ("甲\n".encode() + "乙".encode("gbk"), "stdin:2 is not valid UTF-8"),
    ]:
        with pytest.raises(DataError, match=message):
            list(read_lines_or_json(io.BytesIO(content)))
