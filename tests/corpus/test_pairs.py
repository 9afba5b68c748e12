import json
from collections import Counter

from t5pegasus.corpus.pairs import read_pairs


def test_csv_quotes_around_a_field_go_and_quotation_marks_of_the_text_stay(tmp_path):
    fields = [
        ('"他说""你好"",就走了。"', '他说"你好",就走了。'),
        ('"甲,乙"', "甲,乙"),
        ('"外部性"是术语,"科斯定理"', '"外部性"是术语,"科斯定理"'),
        ('"全文引用"', '"全文引用"'),
        ('"', '"'),
        ('""', '""'),
        ('"开头', '"开头'),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": quoted, "summary": quoted}) + "\n" for quoted, _ in fields), encoding="utf-8"
    )
    plain = [text for _, text in fields]
    assert [(pair.text, pair.title) for pair in read_pairs([path], Counter())] == list(zip(plain, plain, strict=True))
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"{quoted}\t{quoted}\n" for quoted, _ in fields), encoding="utf-8")
    assert [(pair.text, pair.title) for pair in read_pairs([path], Counter())] == list(zip(plain, plain, strict=True))


def test_the_quoted_abstracts_of_csl_are_unquoted_and_no_others(shared_data):
    for name, num_quoted in (("train", 168), ("dev", 0), ("test", 0)):
        path = shared_data / "summarization" / f"csl_{name}.jsonl"
        raw = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]
        texts = [pair.text for pair in read_pairs([path], Counter())]
        assert sum(a != b for a, b in zip(raw, texts, strict=True)) == num_quoted
        assert all(b == a[1:-1].replace('""', '"') for a, b in zip(raw, texts, strict=True) if a != b)
