import io
import json
import shlex
import subprocess
import sys

import pytest

from launch.verbs import pseudo_summary, tokenizer
from t5pegasus.errors import ArtifactError, DataError, UsageError
from t5pegasus.text.tokenizer import load_tokenizer

PARTS = ["模型训练", "数据处理", "摘要生成", "语言理解", "城市交通", "天气预报"]
TEXTS = [
    "".join(f"第{i}篇文章说明{PARTS[(i + j) % 6]}与{PARTS[i * j % 6]}的关系，并且比较其中的方法。" for j in range(6))
    for i in range(20)
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "语料.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def lines_of(text):
    return [json.loads(line) for line in text.split("\n") if line]


def test_train_encode_decode(corpus, tmp_path, capsys, monkeypatch):
    path = tmp_path / "tokenizer"
    train = ["train", "--input", str(corpus), "--output-path", str(path), "--vocab-size", "4025"]
    tokenizer.main(train)
    out = capsys.readouterr().out
    assert "100.000 % of the characters covered, 0.000 % of 2,208 tokens unknown" in out
    assert out.endswith(
        f"next: t5pegasus build {shlex.quote(str(corpus))} --tokenizer-path {path} --output-path examples\n"
    )
    before = (path / "tokenizer.json").stat()
    tokenizer.main(train)
    assert "complete already" in capsys.readouterr().out
    assert (path / "tokenizer.json").stat() == before
    with pytest.raises(ArtifactError, match="made with vocab_size=4025, now vocab_size=4020"):
        tokenizer.main([*train[:-1], "4020"])

    tokenizer.main(["encode", "--tokenizer-path", str(path), "--input", str(corpus)])
    encoded = capsys.readouterr().out
    expected = load_tokenizer(path)
    assert lines_of(encoded) == [{"ids": expected.encode(text)} for text in TEXTS]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded.encode("utf-8")), encoding="utf-8"))
    tokenizer.main(["decode", "--tokenizer-path", str(path)])
    decoded = lines_of(capsys.readouterr().out)
    # The rules of the original put a space between a digit and a word of two characters.
    assert [record["text"].replace(" ", "") for record in decoded] == TEXTS

    plain = io.TextIOWrapper(io.BytesIO("天气。\n".encode()), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", plain)
    tokenizer.main(["encode", "--tokenizer-path", str(path), "--specials"])
    assert lines_of(capsys.readouterr().out) == [{"ids": [101, *expected.encode("天气。"), 102]}]


def test_a_vocabulary_file_is_adopted_as_it_is(corpus, tmp_path, capsys):
    tokenizer.main(["train", "--input", str(corpus), "--output-path", str(tmp_path / "a"), "--vocab-size", "4025"])
    adopt = ["train", "--from-vocabulary", str(tmp_path / "a" / "vocab.txt"), "--output-path", str(tmp_path / "b")]
    tokenizer.main(adopt)
    assert load_tokenizer(tmp_path / "a").fingerprint == load_tokenizer(tmp_path / "b").fingerprint
    tokenizer.main(adopt)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(UsageError, match="either --input FILES to train on, or --from-vocabulary"):
        tokenizer.main(["train", "--output-path", str(tmp_path / "c")])


def test_a_vocabulary_of_bert_is_adopted_by_its_own_rules(tmp_path, capsys):
    characters = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "300", "℃", "##℃"]
    (tmp_path / "vocab.txt").write_text("\n".join(characters), encoding="utf-8")
    adopt = ["train", "--from-vocabulary", str(tmp_path / "vocab.txt"), "--output-path", str(tmp_path / "a")]
    tokenizer.main([*adopt, "--kind", "bert"])
    assert "bert, 7 entries" in capsys.readouterr().out
    assert load_tokenizer(tmp_path / "a").encode("300℃") == [4, 6]
    with pytest.raises(ArtifactError, match="made with fingerprint="):
        tokenizer.main(adopt)
    with pytest.raises(UsageError, match="kind=bert is not trained"):
        tokenizer.main(["train", "--input", "a.txt", "--kind", "bert", "--output-path", str(tmp_path / "c")])
    with pytest.raises(UsageError, match=r"kind=sentencepiece adopts a \*\.model file"):
        tokenizer.main([*adopt, "--kind", "sentencepiece"])


def test_ids_that_are_no_numbers_are_refused(corpus, tmp_path):
    tokenizer.main(["train", "--input", str(corpus), "--output-path", str(tmp_path / "a"), "--vocab-size", "4025"])
    for line in ('{"ids": [1, "2"]}', '{"ids": 3}', "今天"):
        (tmp_path / "ids.jsonl").write_text(line, encoding="utf-8")
        with pytest.raises(DataError, match="ids must be a list of whole numbers"):
            tokenizer.main(["decode", "--tokenizer-path", str(tmp_path / "a"), "--input", str(tmp_path / "ids.jsonl")])


def test_pseudo_summary_writes_a_line_per_chunk_and_reports_what_gave_none(corpus, capsys):
    with corpus.open("a", encoding="utf-8") as file:
        file.write('{"text": "太短。"}\n')
    pseudo_summary.main(["--input", str(corpus)])
    captured = capsys.readouterr()
    examples = lines_of(captured.out)
    assert len(examples) == len(TEXTS)
    for text, example in zip(TEXTS, examples, strict=True):
        assert list(example) == ["source", "target", "target_sentences"]
        assert "".join(example["target_sentences"]) == example["target"]
        assert sorted(example["source"] + example["target"]) == sorted(text)
    assert "1 of 21 documents gave nothing" in captured.err


def test_the_text_verbs_do_not_import_jax():
    code = (
        "import sys, launch.verbs.tokenizer, launch.verbs.pseudo_summary, t5pegasus.text.tokenizer.training\n"
        "print(sorted({'jax', 'flax', 'grain', 'orbax', 'optax', 'tensorstore'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=".").stdout
    assert out == "[]\n"
