"""Pairs to evaluate on, and summaries that someone else wrote for them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from t5pegasus.corpus.chain import EMPTY_SUMMARY, EMPTY_TEXT
from t5pegasus.errors import DataError
from t5pegasus.evaluate.results import Pair
from t5pegasus.text.clean import clean_text
from t5pegasus.text.read import Document, read_lines_or_json


def clean_pairs(documents: Iterable[Document], dropped: Counter[str]) -> list[Pair]:
    """The pairs that can be used, cleaned as in training; the others are counted by reason.

    Raises:
        DataError: if none is left.
    """
    pairs = []
    for document in documents:
        pair = Pair(document.id, clean_text(document.text), clean_text(document.title or ""))
        if pair.source and pair.reference:
            pairs.append(pair)
        else:
            dropped[EMPTY_SUMMARY if pair.source else EMPTY_TEXT] += 1
    if not pairs:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "the file holds none"
        raise DataError(f"no pair can be used ({reasons}); give lines {{text, summary}} or title<TAB>text")
    return pairs


def read_summaries(path: Path, documents: Sequence[Document]) -> dict[str, str]:
    """Summaries by the id of their pair, from JSON lines {"summary": …} or plain text, one per line.

    If every summary has an "id" they are matched by it; else summary n belongs to pair n.

    Args:
        path: the summaries.
        documents: all pairs of the file they were written for, usable or not.

    Raises:
        DataError: if one is no string, two pairs or summaries share an id, the numbers differ, or there is no pair
            for an id.
    """
    records = list(read_lines_or_json(path, key="summary"))
    for number, record in enumerate(records, start=1):
        if not isinstance(record["summary"], str):
            raise DataError(f'{path}: "summary" {number} is {record["summary"]!r}, a string was wanted')
    ids = [document.id for document in documents]
    _refuse_repeated(ids, "the pairs")
    if records and all(record.get("id") is not None for record in records):
        given = [str(record["id"]) for record in records]
        _refuse_repeated(given, str(path))
        unknown = set(given).difference(ids)
        if unknown:
            raise DataError(
                f"{path}: {len(unknown):,} ids are of no pair, {min(unknown)!r} for one; give the pairs that the "
                'summaries were written for, or leave out "id" to match them by their order'
            )
    else:
        given = ids
        if len(records) != len(ids):
            raise DataError(
                f"{path} holds {len(records):,} summaries, there are {len(ids):,} pairs; give one for each pair, in "
                'their order, or lines {"id", "summary"}'
            )
    return {identifier: record["summary"] for identifier, record in zip(given, records)}


def _refuse_repeated(ids: Sequence[str], where: str) -> None:
    identifier, count = Counter(ids).most_common(1)[0] if ids else ("", 1)
    if count > 1:
        raise DataError(f"id {identifier!r} stands {count} times in {where}; make the ids different")
