"""One document → its examples: clean, reject, cut into chunks, take a pseudo-summary out, tokenise.

For span corruption a document is tokenised whole and cut into pieces; what is cut out of them is drawn when they are
read.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, NamedTuple

from t5pegasus.data.span_corruption import SpanCorruption
from t5pegasus.text.clean import clean_text, reject_reason
from t5pegasus.text.deduplicate import digest_text
from t5pegasus.text.pseudo_summary import make_pseudo_summary
from t5pegasus.text.read import Document
from t5pegasus.text.sentences import MIN_CHUNK_SENTENCES, chunk_sentences, split_sentences
from t5pegasus.text.tokenizer import Tokenizer

Kind = Literal["pretrain", "pairs"]
Objective = Literal["pseudo-summary", "span-corruption"]

TOO_FEW_SENTENCES = f"fewer than {MIN_CHUNK_SENTENCES} sentences"
EMPTY_TEXT = "empty text"
EMPTY_SUMMARY = "empty summary"
HOLDS_SENTINELS = "sentinel tokens in the text"
TOO_FEW_TOKENS = "fewer than 2 tokens"


class DocumentExamples(NamedTuple):
    """What became of a usable document."""

    digest: bytes
    """16 bytes that are equal for documents that count as the same."""
    examples: list[tuple[list[int], list[int]]]
    """(source ids, target ids), at least one; (ids without specials, nothing) where they are to be corrupted."""


class Chain:
    """Turns documents into examples of one kind with one tokenizer and one pair of lengths."""

    def __init__(
        self,
        kind: Kind,
        tokenizer: Tokenizer,
        max_source_tokens: int,
        max_target_tokens: int,
        corruption: SpanCorruption | None = None,
    ) -> None:
        self._tokenizer, self._corruption = tokenizer, corruption
        self._max_source_tokens, self._max_target_tokens = max_source_tokens, max_target_tokens
        self._max_piece_tokens = corruption.longest(max_source_tokens, max_target_tokens) if corruption else 0
        self._make_texts = _summarize_gaps if kind == "pretrain" else _take_pair
        # T5-PEGASUS cuts chunks of 768 characters for 384 + 128 tokens: about 1.5 characters make a token.
        self._max_chunk_characters = (max_source_tokens + max_target_tokens) * 3 // 2

    def run(self, document: Document) -> DocumentExamples | str:
        """The examples of a document, or the reason why it has none."""
        if self._corruption is not None:
            return self._cut_pieces(document, self._corruption)
        made = self._make_texts(document, self._max_chunk_characters)
        if isinstance(made, str):
            return made
        identity, texts = made
        tokenizer = self._tokenizer
        examples = [
            (
                tokenizer.encode_source(source, self._max_source_tokens),
                tokenizer.encode_target(target, self._max_target_tokens),
            )
            for source, target in texts
        ]
        return DocumentExamples(digest_text(identity), examples)

    def _cut_pieces(self, document: Document, corruption: SpanCorruption) -> DocumentExamples | str:
        """As few pieces as fit a row when corrupted, of about the same length, so that no short rest is left."""
        text = clean_text(document.text)
        reason = reject_reason(text)
        if reason is not None:
            return reason
        ids = self._tokenizer.encode(text)
        if len(ids) < 2:
            return TOO_FEW_TOKENS
        if not set(corruption.sentinel_ids).isdisjoint(ids):
            return HOLDS_SENTINELS
        count = -(-len(ids) // self._max_piece_tokens)
        borders = [len(ids) * at // count for at in range(count + 1)]
        pieces = [(ids[begin:end], []) for begin, end in pairwise(borders)]
        return DocumentExamples(digest_text(text), pieces)


def _summarize_gaps(document: Document, max_chunk_characters: int) -> tuple[str, list[tuple[str, str]]] | str:
    text = clean_text(document.text)
    reason = reject_reason(text)
    if reason is not None:
        return reason
    texts = list(_pseudo_summaries(text, max_chunk_characters))
    return (text, texts) if texts else TOO_FEW_SENTENCES


def _pseudo_summaries(text: str, max_chunk_characters: int) -> Iterator[tuple[str, str]]:
    for chunk in chunk_sentences(split_sentences(text), max_chunk_characters):
        made = make_pseudo_summary(chunk)
        if made.target.strip():  # the shorter side; blank only if sentences are
            yield made.source, made.target


def _take_pair(document: Document, _: int) -> tuple[str, list[tuple[str, str]]] | str:
    """A pair is what a person wrote: only emptiness is a reason to drop it."""
    text, summary = clean_text(document.text), clean_text(document.title or "")
    if not text:
        return EMPTY_TEXT
    if not summary:
        return EMPTY_SUMMARY
    return f"{text}\0{summary}", [(text, summary)]
