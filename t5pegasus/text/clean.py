"""Simple cleaning: what no reader would miss is removed, what was written stays as it was written.

Full-width punctuation, digits and letters stay full-width: Chinese text uses them on purpose.
"""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from t5pegasus.text.read import Document

MIN_CHARACTERS = 32
"""Shorter than one sentence of the segmenter: nothing to take a summary out of."""
MIN_HAN_RATE = 0.3
"""Of the characters that are no space; code, tables and other languages lie below, prose with terms above."""

_LINE_END = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
# Categories Cc, Cf, Cs, Co and the noncharacters, without \t and the line ends above; and the two
# stand-ins U+FFFC, U+FFFD that a broken conversion leaves behind. tests/text/test_clean.py checks the list.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e"
    "\u200b-\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufeff\ufff0-\uffff"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e00ff\U000f0000-\U0010ffff]+"
)
_SPACES = re.compile("[ \t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]{2,}|[\t\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_SPACE_AT_EDGE = re.compile(" +\n| *\n +")
_BLANK_LINES = re.compile("\n{2,}")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")


def clean_text(text: str) -> str:
    r"""One text without invisible characters and superfluous white space, in Unicode NFC; idempotent.

    All line ends become ``\n``; control, format (zero-width), private-use and replacement characters are
    dropped; every run of spaces (also ideographic ones and tabs) becomes one space and goes away at the ends
    of lines; blank lines go away.
    """
    text = _LINE_END.sub("\n", text)
    text = _INVISIBLE.sub("", text)
    text = unicodedata.normalize("NFC", text)
    text = _SPACES.sub(" ", text)
    text = _SPACE_AT_EDGE.sub("\n", text)
    return _BLANK_LINES.sub("\n", text).strip(" \n")


def reject_reason(text: str) -> str | None:
    """Why a cleaned text is of no use for Chinese summarization, or None.

    Returns:
        "too short" below `MIN_CHARACTERS`; "not Chinese enough" if Han characters are less than
        `MIN_HAN_RATE` of its characters that are no space.
    """
    if len(text) < MIN_CHARACTERS:
        return "too short"
    num_han = sum(map(len, _HAN.findall(text)))
    if num_han < MIN_HAN_RATE * (len(text) - text.count(" ") - text.count("\n")):
        return "not Chinese enough"
    return None


def clean_documents(documents: Iterable[Document], dropped: Counter[str]) -> Iterator[Document]:
    """Clean text and title of each document; those with a `reject_reason` are counted in `dropped`."""
    for document in documents:
        text = clean_text(document.text)
        reason = reject_reason(text)
        if reason is None:
            title = clean_text(document.title) if document.title else None
            yield dataclasses.replace(document, text=text, title=title or None)
        else:
            dropped[reason] += 1
