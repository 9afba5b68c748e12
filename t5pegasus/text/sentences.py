"""Cutting a document into sentences and sentences into chunks of one example each.

Segment and chunk rules of T5-PEGASUS (train.py of ZhuiyiTechnology/t5-pegasus); lengths are code points.
"""

from collections.abc import Iterable, Iterator, Sequence

MAX_SENTENCE_CHARACTERS = 32
SEPARATORS = ("\n", "。")
"""Tried in this order. ！？； do not separate."""
MAX_CHUNK_CHARACTERS = 768
"""1.5 times the 512 tokens of source and target together: a token is about 1.5 characters."""
MIN_CHUNK_SENTENCES = 3


def split_sentences(
    text: str, max_characters: int = MAX_SENTENCE_CHARACTERS, separators: Sequence[str] = SEPARATORS
) -> list[str]:
    r"""Split a text into sentences of about `max_characters`, joined again as far as they fit together.

    Parts between two separators are collected as long as they stay below the limit; what is still too long is
    split by the next separator, and stays whole after the last one. The separator stays at the end of its
    sentence; white space at both ends is stripped, so a trailing ``\n`` goes. An all-white-space part gives
    an empty sentence, as in the original.
    """
    text = text.strip()
    if not separators or len(text) <= max_characters:
        return [text]
    separator, finer = separators[0], separators[1:]
    sentences: list[str] = []
    parts = text.split(separator)
    collected = ""
    for index, part in enumerate(parts):
        if collected and part and len(collected) + len(part) > max_characters - 1:
            sentences += split_sentences(collected, max_characters, finer)
            collected = ""
        collected += part if index == len(parts) - 1 else part + separator
    if collected:
        sentences += split_sentences(collected, max_characters, finer)
    return sentences


def chunk_sentences(
    sentences: Iterable[str],
    max_characters: int = MAX_CHUNK_CHARACTERS,
    min_sentences: int = MIN_CHUNK_SENTENCES,
) -> Iterator[list[str]]:
    """Chunks of consecutive sentences with at most `max_characters`, and at least `min_sentences`.

    The minimum wins: a chunk of fewer sentences goes on growing above the limit. A last chunk below the
    minimum is dropped.
    """
    chunk: list[str] = []
    num_characters = 0
    for sentence in sentences:
        if num_characters + len(sentence) > max_characters and len(chunk) >= min_sentences:
            yield chunk
            chunk, num_characters = [], 0
        chunk.append(sentence)
        num_characters += len(sentence)
    if len(chunk) >= min_sentences:
        yield chunk
