"""`t5pegasus tokenizer train|encode|decode`: make a tokenizer folder, and look at what it does."""

import dataclasses
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.staging import staged_output
from t5pegasus.errors import ArtifactError, DataError, UsageError
from t5pegasus.progress import Progress
from t5pegasus.storage import fetch
from t5pegasus.text.clean import clean_documents
from t5pegasus.text.read import Document, check_paths, describe_dropped, read_documents, read_lines_or_json
from t5pegasus.text.tokenizer import Tokenizer, adopt_vocabulary, load_tokenizer
from t5pegasus.text.tokenizer.folder import read_tokenizer_json

NUM_COVERAGE_DOCUMENTS = 1000


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a tokenizer on documents, or adopt an existing vocabulary file.

    For example: t5pegasus tokenizer train --input corpus.jsonl.gz --output-path tokenizer --vocab-size 50000

    Inputs are .jsonl, .jsonl.gz, .jsonl.zst (key `text`), .txt (blank lines between documents) or .parquet files.
    The same inputs give the same tokenizer, byte for byte.
    """

    output_path: StoragePath
    """Folder to write: tokenizer.json and vocab.txt or spiece.model."""
    input: tuple[StoragePath, ...] = ()
    """Files of documents."""
    vocab_size: int = 50_000
    """Number of entries, exactly."""
    kind: Literal["wordpiece", "sentencepiece", "bert"] = "wordpiece"
    """wordpiece: T5-PEGASUS, dictionary words; sentencepiece: mT5, unigram with byte pieces; bert: Chinese BERT,
    single characters and word pieces, for a vocab.txt that is adopted."""
    num_sentinels: int = 0
    """Of kind=sentencepiece: so many of the entries are <extra_id_0>, <extra_id_1>, … for span corruption, e.g. 100;
    wordpiece lists have [unused1] to [unused99]."""
    from_vocabulary: StoragePath | None = None
    """Adopt this vocab.txt or spiece.model as it is, instead of training."""


@dataclasses.dataclass(frozen=True)
class Encode:
    """Turn text into token ids: one line in, one line {"ids": […]} out.

    For example: echo 今天天气不错 | t5pegasus tokenizer encode --tokenizer-path tokenizer
    """

    tokenizer_path: StoragePath
    """Folder written by `t5pegasus tokenizer train`."""
    input: StoragePath | None = None
    """JSON lines with the key `text`, or plain lines; also .gz and .zst. Default: stdin."""
    specials: bool = False
    """With the special tokens that the encoder reads around a source."""


@dataclasses.dataclass(frozen=True)
class Decode:
    """Turn token ids into text: one line {"ids": […]} in, one line {"text": …} out.

    For example: t5pegasus tokenizer decode --tokenizer-path tokenizer --input ids.jsonl
    """

    tokenizer_path: StoragePath
    """Folder written by `t5pegasus tokenizer train`."""
    input: StoragePath | None = None
    """JSON lines with the key `ids`, or plain lines of ids between spaces. Default: stdin."""


def main(argv: list[str]) -> None:
    """Parse the command and run it."""
    args = parse_command_line(
        Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Encode, tyro.conf.subcommand("encode")]
        | Annotated[Decode, tyro.conf.subcommand("decode")],
        prog="t5pegasus tokenizer",
        description="Train a tokenizer on documents; encode and decode text with it.",
        args=argv,
    )
    match args:
        case Train():
            _train(args)
        case Encode():
            tokenizer = load_tokenizer(fetch(args.tokenizer_path))
            for record in read_lines_or_json(fetch(args.input) if args.input else sys.stdin.buffer):
                _write_line({"ids": _encode(tokenizer, record["text"], args.specials)})
        case Decode():
            tokenizer = load_tokenizer(fetch(args.tokenizer_path))
            for record in read_lines_or_json(fetch(args.input) if args.input else sys.stdin.buffer, key="ids"):
                _write_line({"text": tokenizer.decode(_parse_ids(record["ids"]))})


def _encode(tokenizer: Tokenizer, text: Any, specials: bool) -> list[int]:
    if not isinstance(text, str):
        raise DataError(f"text must be a string, got {text!r}")
    return tokenizer.encode_source(text, sys.maxsize) if specials else tokenizer.encode(text)


def _parse_ids(ids: Any) -> list[int]:
    if isinstance(ids, str) and all(word.isdecimal() for word in ids.split()):
        return [int(word) for word in ids.split()]
    if isinstance(ids, list) and all(type(item) is int for item in ids):
        return ids
    raise DataError(f"ids must be a list of whole numbers, got {str(ids)[:60]!r}")


def _write_line(record: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(record, ensure_ascii=False).encode("utf-8") + b"\n")
    sys.stdout.buffer.flush()


def _train(args: Train) -> None:
    if (args.from_vocabulary is None) == (not args.input):
        raise UsageError("give either --input FILES to train on, or --from-vocabulary FILE to adopt")
    if args.num_sentinels < 0 or (args.num_sentinels and (args.kind != "sentencepiece" or args.from_vocabulary)):
        raise UsageError(
            f"num_sentinels={args.num_sentinels} must be 0 or more, and is for training kind=sentencepiece only"
        )
    if args.kind == "bert" and args.from_vocabulary is None:
        raise UsageError("kind=bert is not trained: adopt its vocab.txt by --from-vocabulary, or train kind=wordpiece")
    wanted = {"sentencepiece": ".model", "bert": ".txt"}.get(args.kind)
    if args.from_vocabulary is not None and wanted is not None and args.from_vocabulary.suffix != wanted:
        raise UsageError(f"kind={args.kind} adopts a *{wanted} file, got {args.from_vocabulary}; leave --kind out")
    vocabulary = args.from_vocabulary and fetch(args.from_vocabulary)
    local = dataclasses.replace(args, input=tuple(map(fetch, args.input)), from_vocabulary=vocabulary)
    request = _describe(local)
    if (args.output_path / "tokenizer.json").is_file():
        made = fetch(args.output_path)
        load_tokenizer(made)
        _require_same(request, read_tokenizer_json(made).get("made_by", {}), args.output_path)
        print(f"{args.output_path} is complete already, made the same way: nothing to do")
    else:
        with staged_output(args.output_path) as output:
            _make(local, request, output)
        print(f"wrote {args.output_path}")
    inputs = shlex.join(map(str, args.input)) or "FILES"
    tokenizer_path = shlex.quote(str(args.output_path))
    print(f"next: t5pegasus build {inputs} --tokenizer-path {tokenizer_path} --output-path examples")


def _make(args: Train, request: dict[str, Any], output: Path) -> None:
    if args.from_vocabulary is not None:
        tokenizer = adopt_vocabulary(args.from_vocabulary, dictionary=args.kind != "bert")
        tokenizer.save(output, made_by=request)
        print(f"adopted {args.from_vocabulary}: {tokenizer.kind}, {tokenizer.vocab_size:,} entries")
    else:
        report = _train_on_documents(args, request, output)
        left_out = "".join(f", {count:,} {reason}" for reason, count in report["dropped"].items())
        print(f"trained on {report['documents']:,} documents{left_out}")
        measured = min(report["documents"], NUM_COVERAGE_DOCUMENTS)
        print(
            f"on the first {measured:,} of them: {report['characters_per_token']:.2f} characters per token, "
            f"{100 * report['character_coverage']:.3f} % of the characters covered, "
            f"{100 * report['unknown_rate']:.3f} % of {report['num_tokens']:,} tokens unknown"
        )


def _train_on_documents(args: Train, request: dict[str, Any], output: Path) -> dict[str, Any]:
    from t5pegasus.text.tokenizer.training import measure_coverage, train_sentencepiece, train_wordpiece

    dropped: Counter[str] = Counter()
    with Progress("tokenizer: reading", unit="documents") as progress:
        documents = _iterate_documents(args.input, dropped, progress)
        try:
            if args.kind == "wordpiece":
                tokenizer = train_wordpiece(documents, args.vocab_size)
            else:
                tokenizer = train_sentencepiece(documents, args.vocab_size, args.num_sentinels)
        except DataError as error:
            raise DataError(f"{error}: {describe_dropped(dropped) or 'the files have none'}") from None
        num_documents = progress.done
    some = islice(clean_documents(read_documents(args.input), Counter()), NUM_COVERAGE_DOCUMENTS)
    report: dict[str, Any] = {"documents": num_documents, "dropped": dict(sorted(dropped.items()))}
    report |= {key: round(value, 6) for key, value in measure_coverage(tokenizer, some).items()}
    tokenizer.save(output, made_by=request | {"report": report})
    return report


def _iterate_documents(paths: tuple[Path, ...], dropped: Counter[str], progress: Progress) -> Iterator[Document]:
    for document in clean_documents(read_documents(paths, dropped), dropped):
        progress.advance()
        yield document


def _describe(args: Train) -> dict[str, Any]:
    """What decides the outcome; kept in the folder, to tell a finished stage from another request."""
    if args.from_vocabulary is not None:
        tokenizer = adopt_vocabulary(args.from_vocabulary, dictionary=args.kind != "bert")
        return {"from_vocabulary": args.from_vocabulary.name, "fingerprint": tokenizer.fingerprint}
    inputs = [{"file": path.name, "bytes": path.stat().st_size} for path in check_paths(args.input)]
    sentinels = {"num_sentinels": args.num_sentinels} if args.num_sentinels else {}
    return {"kind": args.kind, "vocab_size": args.vocab_size, **sentinels, "inputs": inputs}


def _require_same(request: dict[str, Any], made_by: dict[str, Any], path: Path) -> None:
    for field, wanted in request.items():
        if made_by.get(field) != wanted:
            raise ArtifactError(
                f"{path} was made with {field}={made_by.get(field)!r}, now {field}={wanted!r} is asked for; "
                "remove it or choose another output path"
            )
