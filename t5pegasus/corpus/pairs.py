"""Reading supervised pairs of text and summary: JSON lines, or lines of `title<TAB>text`."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from t5pegasus.text.lines import NOT_UTF8, read_texts
from t5pegasus.text.read import NOT_JSON, Document, check_paths

NOT_A_PAIR = "no summary and text"
_KINDS = tuple(kind + packing for kind in (".jsonl", ".tsv") for packing in ("", ".gz", ".zst"))


def check_pair_paths(paths: Iterable[Path | str]) -> list[Path]:
    """The paths, each an existing file of a kind that pairs are read from.

    Raises:
        UsageError: naming the path and what to do.
    """
    return check_paths(paths, _KINDS)


def read_pairs(paths: Sequence[Path], dropped: Counter[str]) -> Iterator[Document]:
    """Stream pairs as documents whose title is the summary, in the order given, in bounded memory.

    `.jsonl(.gz|.zst)` holds objects `{"text": …, "summary": …}`, `.tsv(.gz|.zst)` lines `title<TAB>text`, the
    form of T5-PEGASUS's fine-tuning script. A pair without an id is called `<file name>:<line number>`. Text and
    summary still quoted as in CSV (`"`, and `""` within), as sets copied from tables often are, lose these quotes.

    Args:
        paths: files to read, of `check_pair_paths`.
        dropped: receives, per reason, the number of lines that could not be used.

    Raises:
        UsageError: if a file is damaged.
    """
    for path in paths:
        parse = _parse_json if ".jsonl" in path.suffixes else _parse_tabbed
        for number, line in read_texts(path, dropped):
            document = parse(line.rstrip("\r"), f"{path.name}:{number}", dropped)
            if document is not None:
                yield document


def _parse_json(line: str, default_id: str, dropped: Counter[str]) -> Document | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        dropped[NOT_JSON] += 1
        return None
    if not isinstance(record, dict):
        dropped[NOT_A_PAIR] += 1
        return None
    text, summary = record.get("text"), record.get("summary")
    if not (isinstance(text, str) and isinstance(summary, str)):
        dropped[NOT_A_PAIR] += 1
        return None
    try:  # an escape such as \ud800 gives half a surrogate pair, which no file can hold
        (text + summary).encode("utf-8")
    except UnicodeEncodeError:
        dropped[NOT_UTF8] += 1
        return None
    return Document(str(record.get("id") or default_id), _unquote(text), title=_unquote(summary))


def _parse_tabbed(line: str, default_id: str, dropped: Counter[str]) -> Document | None:
    title, tab, text = line.partition("\t")
    if not tab:
        dropped[NOT_A_PAIR] += 1
        return None
    return Document(default_id, _unquote(text), title=_unquote(title))


def _unquote(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    # CSV quotes a field for a reason: it holds a comma, or a quotation mark, which it doubles.
    if len(field) > 2 and field[0] == field[-1] == '"' and '"' not in inner and ("," in inner or inner != field[1:-1]):
        return field[1:-1].replace('""', '"')
    return field
