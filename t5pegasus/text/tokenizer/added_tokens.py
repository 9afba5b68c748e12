"""New tokens behind those of a vocabulary: every old id stays, and so do the ids of texts without the new tokens.

A vocabulary entry that no text is ever cut into would be a row that is never trained, so such tokens are refused.
What a tokenizer can make use of depends on how it cuts texts before it looks anything up:

- `wordpiece` (T5-PEGASUS) looks up the words that jieba cuts by its default dictionary, whole and before anything
  else. A new Han word is used wherever jieba cuts it out, so it must be in that dictionary; a run of Latin letters and
  digits is a word for jieba in any case. A single character and a `##` piece serve words that are no entries.
- `bert` cuts every Han character alone: new Han characters, Latin words and `##` pieces can be used, Han words cannot.
- `sentencepiece`: a new token becomes a piece that the user defined, which is cut out wherever its characters stand,
  before all others and the longest first. Text is not normalised within it, and `▁` is no part of it.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from t5pegasus.errors import UsageError
from t5pegasus.text.tokenizer import Tokenizer, load_tokenizer
from t5pegasus.text.tokenizer.sentencepiece import SPACE, SentencepieceTokenizer
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer, is_isolated, normalise, split_basic

_SHOWN = 5


def read_tokens(path: Path) -> list[str]:
    r"""The tokens of a UTF-8 file, one per line ended by ``\n``.

    Raises:
        UsageError: if the file is missing, not UTF-8, or has no line.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"tokens {path}: there is no such file; write one token per line") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"tokens {path}: not valid UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UsageError(f"tokens {path}: the file is empty; write one token per line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def add_tokens(tokenizer_path: Path, tokens: Sequence[str], output_path: Path) -> tuple[tuple[int, ...], ...]:
    """Write the tokenizer folder with further tokens, of which the first has the id `vocab_size` had.

    Args:
        tokenizer_path: a tokenizer folder of any kind; it stays as it is.
        tokens: texts as the tokenizer reads them; in wordpiece vocabularies `##x` continues a word.
        output_path: the folder to create.

    Returns:
        For each new token the ids of the pieces it was read as before, without unknown ones; the unknown token alone
        where all of them were unknown (a character that is new to the vocabulary). Never empty.

    Raises:
        UsageError: if tokens are empty, twice there or never to be used (see `refuse_tokens`), or the output is in use.
        ArtifactError: if there is no tokenizer, or it is damaged.
    """
    old = load_tokenizer(tokenizer_path)
    if not tokens:
        raise UsageError("there are no tokens to add; give at least one")
    if refused := refuse_tokens(old, tokens):
        reasons = [f"{token!r} {why}" for token, why in list(refused.items())[:_SHOWN]]
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise UsageError(
            f"{len(refused)} of {len(tokens)} tokens cannot be added to the {old.kind} tokenizer {tokenizer_path}: "
            f"{'; '.join(reasons)}{more}. Leave them out, or correct them{_scope(old)}"
        )
    made_by = {"added_tokens": len(tokens), "to_tokenizer": old.fingerprint}
    _extend(old, tokens).save(output_path, made_by)
    return tuple(_find_pieces(old, token) for token in tokens)


def refuse_tokens(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, str]:
    """The tokens that cannot be added to a tokenizer, and for each why, as the end of a sentence about it."""
    times = Counter(tokens)
    there = {tokenizer.token(index): index for index in range(tokenizer.vocab_size)}
    refused: dict[str, str] = {}
    for token in times:
        if not token:
            refused[token] = "is empty"
        elif times[token] > 1:
            refused[token] = f"is given {times[token]} times"
        elif token in there:
            refused[token] = f"is in the vocabulary already, with id {there[token]}"
        elif why := _find_fault(tokenizer, token):
            refused[token] = why
    possible = [token for token in times if token not in refused]
    extended = _extend(tokenizer, possible)
    for index, token in enumerate(possible, start=tokenizer.vocab_size):
        if token[:2] == "##" and isinstance(tokenizer, WordpieceTokenizer):
            continue  # found within words only
        ids = extended.encode(token)
        if index not in ids:
            parts = " | ".join(extended.token(each) for each in ids)
            refused[token] = f"would never be used, because it is cut into {parts or 'nothing'} before it is looked up"
    return refused


def _scope(tokenizer: Tokenizer) -> str:
    """Which Han words a tokenizer can take, as the end of a sentence."""
    if not isinstance(tokenizer, WordpieceTokenizer):
        return ""
    if tokenizer.kind == "bert":
        return "; a bert tokenizer reads every Han character alone, and takes no Han words"
    return "; of Han words a wordpiece tokenizer takes those that jieba's own dictionary cuts out, and no others"


def _find_fault(tokenizer: Tokenizer, token: str) -> str | None:
    """What is wrong with a token by itself."""
    if not isinstance(tokenizer, WordpieceTokenizer):
        if SPACE in token or any(character.isspace() for character in token):
            return "holds white space, which pieces that the user defines cannot"
        return None
    if "\n" in token:
        return "holds a line break, which a vocabulary of one token per line cannot"
    if (plain := normalise(token)) != token:
        return f"is never read, because texts are put in lower case and without accents before: give {plain!r}"
    if token[:2] == "##":
        text = token[2:]
        if split_basic(text) != [text] or is_isolated(text[0]):
            return "continues no word: only characters that stay together can, not Han, punctuation or white space"
    return None


def _extend(old: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    if not isinstance(old, WordpieceTokenizer | SentencepieceTokenizer):
        raise UsageError(f"tokens cannot be added to a tokenizer of kind {old.kind!r}")
    return old.extend(tokens)


def _find_pieces(old: Tokenizer, token: str) -> tuple[int, ...]:
    if isinstance(old, WordpieceTokenizer) and token[:2] == "##":
        ids = old.encode_continuation(token[2:])
    else:
        ids = old.encode(token)
    if isinstance(old, SentencepieceTokenizer) and len(ids) > 1 and old.token(ids[0]) == SPACE:
        ids = ids[1:]
    return tuple(index for index in ids if index != old.unk_id) or (old.unk_id,)
