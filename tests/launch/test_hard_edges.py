"""What goes wrong for a user: every verb answers with one line in words and the right exit code, and leaves nothing.

In-process, on tiny artifacts that one fixture makes with the verbs themselves. The commands are written with the names
of files in that folder; OUT is a place that does not exist yet.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from launch import cli

SENTENCES = ["今天上午新图书馆开馆，首日到馆的读者超过三千人。", "馆内藏书一百万册，读者可以凭身份证免费借阅。"] * 4
SHAPE = (
    "--model.d-model 8 --model.d-ff 16 --model.num-heads 2 --model.d-kv 4 --model.num-encoder-layers 1 "
    "--model.num-decoder-layers 1 --data.max-source-tokens 48 --data.max-target-tokens 24 --train.batch-size 8 "
    "--train.steps 2 --train.save-every-steps 1 --train.evaluate-every-steps 2"
)
TINY = f"tiny --examples-path examples --run-path OUT {SHAPE}"
LENGTHS = "--max-source-tokens 48 --max-target-tokens 24"


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def run(command, **paths):
    argv = [str(paths.get(word, word)) for word in command.split()]
    return cli.main(argv)


def change_json(path, **fields):
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(value | fields), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents, pairs, a vocabulary, tokenizer, examples and run; and what nobody should have."""
    here, before = tmp_path_factory.mktemp("edges"), Path.cwd()
    os.chdir(here)
    texts = ["".join(SENTENCES[i % 3 :]) + f"第{i}次。" for i in range(40)]
    write_lines(Path("documents.jsonl"), [{"text": text} for text in texts])
    write_lines(Path("pairs.jsonl"), [{"text": text, "summary": "图书馆开馆"} for text in texts[:8]])
    characters = sorted(set("".join(texts) + "图书馆0123456789"))
    for name, tokens in (("vocab.txt", characters), ("other.txt", characters[1:])):
        Path(name).write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *tokens]) + "\n", encoding="utf-8")
    for vocabulary, tokenizer, examples in (("vocab.txt", "tokenizer", "examples"), ("other.txt", "tok2", "examples2")):
        assert run(f"tokenizer train --from-vocabulary {vocabulary} --output-path {tokenizer}") == 0
        assert run(f"build documents.jsonl --tokenizer-path {tokenizer} --output-path {examples} {LENGTHS}") == 0
    assert run(f"pretrain {TINY}", OUT="run") == 0

    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text('{"text": "断\n[1]\n', encoding="utf-8")
    Path("gbk.jsonl").write_bytes(Path("documents.jsonl").read_bytes().decode().encode("gb18030"))
    write_lines(Path("short.jsonl"), [{"text": "只有一句话，没有别的句子，所以从中不能取出摘要，虽然它已经足够长了。"}])
    write_lines(Path("no-pairs.jsonl"), [{"text": "没有摘要"}])
    Path("noise.model").write_bytes(bytes(range(256)))
    Path("noise.jsonl.gz").write_bytes(bytes(range(256)))
    Path("a-file").touch()
    for name in ("tokenizer", "examples", "run"):
        shutil.copytree(name, f"old-{name}")
    change_json(Path("old-tokenizer/tokenizer.json"), schema=99)
    change_json(Path("old-examples/manifest.json"), schema=99)
    for name in ("manifest.json", "checkpoint.json"):
        change_json(Path("old-run/checkpoints/2") / name, schema=99)
    shutil.rmtree("old-run/checkpoints/1")
    shutil.copytree("run", "old-record")
    change_json(Path("old-record/config.json"), schema=99)
    shutil.copytree("run", "damaged")
    for step in ("1", "2"):
        with Path(f"damaged/checkpoints/{step}/checkpoint.json").open("a", encoding="utf-8") as file:
            file.write(" ")
    yield here
    os.chdir(before)


NO_TEXT = "no text to train a tokenizer on"
USED = "already in use|is in use|exists"
EDGES = [
    # missing or empty files
    ("tokenizer train --input missing.jsonl --output-path OUT", 2, "missing.jsonl does not exist"),
    ("tokenizer train --input empty.jsonl --output-path OUT", 2, "empty.jsonl is empty"),
    ("tokenizer train --from-vocabulary missing.txt --output-path OUT", 2, "missing.txt does not exist"),
    ("tokenizer encode --tokenizer-path missing", 2, "missing is no tokenizer folder"),
    ("tokenizer encode --tokenizer-path tokenizer --input empty.jsonl", 2, "empty.jsonl is empty"),
    ("build missing.jsonl --tokenizer-path tokenizer --output-path OUT", 2, "missing.jsonl does not exist"),
    ("build documents.jsonl --tokenizer-path missing --output-path OUT", 2, "missing is no tokenizer folder"),
    ("pseudo-summary --input missing.jsonl", 2, "missing.jsonl does not exist"),
    ("pseudo-summary --input empty.jsonl", 2, "empty.jsonl is empty"),
    (
        f"pretrain tiny --examples-path missing --run-path OUT {SHAPE}",
        2,
        "missing is no folder of examples: it does not exist",
    ),
    ("grow missing --to d_model=16 --output-path OUT", 2, "missing is neither a checkpoint .* nor a run"),
    ("finetune missing --train-path pairs.jsonl --run-path OUT", 2, "missing is neither a checkpoint .* nor a run"),
    ("finetune run --train-path missing.jsonl --run-path OUT", 2, "missing.jsonl does not exist"),
    ("summarize missing --input documents.jsonl", 2, "missing is neither a checkpoint .* nor a run"),
    ("summarize run --input missing.jsonl", 2, "missing.jsonl does not exist"),
    ("evaluate missing --pairs-path pairs.jsonl", 2, "missing is neither a checkpoint .* nor a run"),
    ("evaluate run --pairs-path missing.jsonl", 2, "missing.jsonl does not exist"),
    ("convert missing OUT", 2, "missing"),
    ("report missing", 2, "missing is no run folder"),
    # broken lines, wrong encodings, nothing to be had
    ("tokenizer train --input broken.jsonl --output-path OUT", 44, f"{NO_TEXT}: .*not valid JSON"),
    ("tokenizer train --input gbk.jsonl --output-path OUT", 44, rf"{NO_TEXT}: not valid UTF-8 \(40\); .*iconv"),
    ("tokenizer train --input noise.jsonl.gz --output-path OUT", 2, "noise.jsonl.gz is damaged"),
    ("tokenizer train --from-vocabulary noise.model --output-path OUT", 2, "is not a sentencepiece model"),
    ("build broken.jsonl --tokenizer-path tokenizer --output-path OUT", 44, "none of the 2 documents can be used"),
    ("build gbk.jsonl --tokenizer-path tokenizer --output-path OUT", 44, r"not valid UTF-8 \(40\); .*iconv"),
    ("build short.jsonl --tokenizer-path tokenizer --output-path OUT", 44, "fewer than 3 sentences"),
    ("build documents.jsonl --kind pairs --tokenizer-path tokenizer --output-path OUT", 44, "no summary and text"),
    ("pseudo-summary --input broken.jsonl", 44, "broken.jsonl:1 must be a JSON object"),
    ("pseudo-summary --input gbk.jsonl", 44, "gbk.jsonl:1 is not valid UTF-8"),
    ("pseudo-summary --input short.jsonl", 44, "1 of 1 documents gave nothing, having fewer than 3 sentences"),
    ("finetune run --train-path no-pairs.jsonl --run-path OUT", 44, "no summary and text"),
    ("summarize run --input broken.jsonl", 44, "broken.jsonl:1 must be a JSON object"),
    ("evaluate run --pairs-path no-pairs.jsonl", 44, "no summary and text"),
    # artifacts that do not belong together
    ("pretrain --start-from run --examples-path examples2 --run-path OUT", 2, "vocab_size=.* differs from"),
    (
        f"pretrain {TINY} --heldout-path examples2",
        2,
        "held-out examples examples2 have another tokenizer than examples",
    ),
    (
        "grow run --to d_model=16 --examples-path examples2 --output-path OUT",
        2,
        "examples2 have another tokenizer than checkpoint run",
    ),
    ("finetune run --examples-path examples2 --run-path OUT", 2, "vocab_size=.* differs from"),
    ("grow run --to d_model=4 --output-path OUT", 2, "d_model=4 is smaller than the checkpoint's 8"),
    # a mesh that does not divide
    (f"pretrain {TINY} --mesh.data 3", 2, "mesh data=3 × fsdp=1 × tensor=1 does not use exactly the 8 devices"),
    (f"pretrain {TINY} --mesh.data 1 --mesh.tensor 8", 2, "num_heads=2 .* tensor=8|tensor=8"),
    (f"pretrain {TINY} --train.batch-size 6", 2, "batch_size=6 .* 8"),
    # another schema, damage
    ("build documents.jsonl --tokenizer-path old-tokenizer --output-path OUT", 2, "schema is 99.* reads schema 1"),
    (f"pretrain tiny --examples-path old-examples --run-path OUT {SHAPE}", 2, "schema is 99.* reads schema 1"),
    ("pretrain --examples-path examples --run-path old-record", 2, "schema is 99.* reads schema 1"),
    ("pretrain --start-from old-run --examples-path examples --run-path OUT", 2, "schema is 99.* reads schema 1"),
    ("grow old-run --to d_model=16 --output-path OUT", 2, "schema is 99.* reads schema 1"),
    ("finetune old-run --train-path pairs.jsonl --run-path OUT", 2, "schema is 99.* reads schema 1"),
    ("summarize old-run --input documents.jsonl", 2, "schema is 99.* reads schema 1"),
    ("evaluate old-run --pairs-path pairs.jsonl", 2, "schema is 99.* reads schema 1"),
    ("convert old-run OUT", 2, "schema is 99.* reads schema 1"),
    ("report old-run", 2, "schema is 99.* reads schema 1"),
    ("summarize damaged --input documents.jsonl", 2, r"all of its checkpoints are damaged \(2, 1\)"),
    ("summarize damaged/checkpoints/2 --input documents.jsonl", 2, "checkpoint.json is damaged"),
    # outputs in use
    ("tokenizer train --from-vocabulary vocab.txt --output-path run", 2, USED),
    ("build documents.jsonl --tokenizer-path tokenizer --output-path run", 2, USED),
    (f"pretrain tiny --examples-path examples --run-path tokenizer {SHAPE}", 2, USED),
    ("finetune run --train-path pairs.jsonl --run-path examples2", 2, USED),
    ("grow run --to d_model=16 --output-path examples", 2, USED),
    ("convert run examples", 2, USED),
    ("report run --output examples", 2, "examples is a folder"),
    # a place where nothing can be written: a folder below a file, which not even root can make
    ("tokenizer train --from-vocabulary vocab.txt --output-path a-file/out", 46, "a-file.*Not a directory"),
    ("build documents.jsonl --tokenizer-path tokenizer --output-path a-file/out", 46, "a-file.*Not a directory"),
    (f"pretrain tiny --examples-path examples --run-path a-file/out {SHAPE}", 46, "a-file.*Not a directory"),
    ("finetune run --train-path pairs.jsonl --run-path a-file/out", 46, "a-file.*Not a directory"),
    ("grow run --to d_model=16 --output-path a-file/out", 46, "a-file.*Not a directory"),
    ("convert run a-file/out", 46, "a-file.*Not a directory"),
    ("report run --output a-file/out", 46, "a-file: File exists"),
    ("quickstart --output-path a-file/out", 46, "a-file.*Not a directory"),
    # jobs
    ("launch local --processes 2 -- report run", 2, "report"),
    ("launch local -- pretrian", 2, "perhaps you meant 'pretrain'"),
]


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("command", "code", "words"), EDGES, ids=[command for command, _, _ in EDGES])
def test_it_says_what_is_wrong_and_leaves_nothing(folder, command, code, words, capfd):
    before = snapshot(folder)
    capfd.readouterr()
    got = run(command, OUT="new")
    error = capfd.readouterr().err.rstrip("\n").split("\n")
    assert got == code, error
    assert error[-1].startswith(f"t5pegasus {command.split()[0]}: ")
    assert re.search(words, error[-1]), error[-1]
    assert "Traceback" not in "".join(error)
    left = {path.relative_to(folder) for path in snapshot(folder).keys() - before.keys()}
    shutil.rmtree("new", ignore_errors=True)
    # Unfinished work may stay under its temporary name, and the packing table beside examples that were read.
    assert not {path for path in left if not _is_temporary(path) and "packing-" not in str(path)}
    assert before.items() <= snapshot(folder).items()


def _is_temporary(path):
    return any(part.startswith(".") or part.endswith((".tmp", ".unfinished")) for part in path.parts)
