"""The tokenizer of T5-PEGASUS: dictionary words first, BERT's basic and wordpiece rules for the rest.

Same ids as bert4keras `Tokenizer(vocab, do_lower_case=True, pre_tokenize=jieba.cut(…, HMM=False))`; without the
dictionary, as `Tokenizer(vocab, do_lower_case=True)`, which is Chinese BERT's. White space and letter case are lost.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import rjieba

from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.text.tokenizer import TokenText
from t5pegasus.text.tokenizer.folder import write_tokenizer

MAX_WORD_CHARACTERS = 200
MAX_CACHED_WORDS = 1 << 20
RULES = {
    "wordpiece": "rjieba-default-dictionary hmm-off lower nfd bert-wordpiece 1",
    "bert": "lower nfd bert-wordpiece 1",
}
"""By kind, part of the fingerprint: another dictionary or rule gives other ids for the same vocabulary."""

HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f"
)
"""The blocks that BERT isolates, as the inside of a character class."""
_HAN_CHARACTER = re.compile(f"[{HAN}]")
_HAN_OR_RUN = re.compile(f"[{HAN}]|[^{HAN} \n\r\t]+")
_CJK_PUNCTUATION = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗"
    "〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏﹑﹔·！？｡。"
)
_SPECIAL = re.compile(r"\[.+\]|<.+>")
_SPACES = re.compile(" +")
_ENGLISH_SUFFIX = re.compile("' (re|m|s|t|ve|d|ll) ")
_GLUED_ON_THE_RIGHT = re.compile(f"([{re.escape(_CJK_PUNCTUATION + '+-/={(<[')}]) ")
_DECIMAL = re.compile(r"(\d\.) (\d)")


class WordpieceTokenizer:
    """A vocabulary list with the specials `[PAD] [UNK] [CLS] [SEP]`; decoding starts with `[CLS]`.

    `dictionary` says whether jieba's words are looked up whole (kind `wordpiece`, T5-PEGASUS), or every text is
    single Han characters and word pieces (kind `bert`).
    """

    def __init__(self, vocabulary: list[str], *, dictionary: bool = True) -> None:
        self.kind = "wordpiece" if dictionary else "bert"
        self._tokens = vocabulary
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        if len(self._ids) != len(vocabulary):
            twice = next(token for index, token in enumerate(vocabulary) if self._ids[token] != index)
            raise ArtifactError(f"the vocabulary lists {twice!r} twice; every token must have one id")
        missing = [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if token not in self._ids]
        if missing:
            raise ArtifactError(f"the vocabulary lacks {', '.join(missing)}; a BERT-style list was wanted")
        self.vocab_size = len(vocabulary)
        self.pad_id, self.unk_id = self._ids["[PAD]"], self._ids["[UNK]"]
        self.start_id, self.end_id = self._ids["[CLS]"], self._ids["[SEP]"]
        content = "\n".join([RULES[self.kind], *vocabulary])
        self.fingerprint = hashlib.sha256(content.encode("utf-8")).hexdigest()
        self._ids_of_word = _WordCache(self._ids, self.unk_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text without specials; an unknown word or character is `unk_id`."""
        if len(self._ids_of_word) > MAX_CACHED_WORDS:
            self._ids_of_word.clear()
        text = normalise(text)
        words = rjieba.cut(text, False) if self.kind == "wordpiece" else _HAN_OR_RUN.findall(text)
        return list(chain.from_iterable(map(self._ids_of_word.__getitem__, words)))

    def decode(self, ids: list[int]) -> str:
        """The text of ids by bert4keras's rules for spaces; tokens of the form `[…]` vanish.

        Raises:
            UsageError: for an id that is not in the vocabulary.
        """
        pieces: list[str] = []
        after_han = False
        for token in self._tokens_of(ids):
            if token[:2] == "##":
                pieces.append(token[2:])
            elif len(token) == 1 and _HAN_CHARACTER.match(token):
                pieces.append(token)
            elif len(token) == 1 and is_punctuation(token):
                pieces.append(token + " ")
            elif after_han:
                pieces.append(token)
            else:
                pieces.append(" " + token)
            after_han = _HAN_CHARACTER.match(pieces[-1][-1:]) is not None if pieces[-1] else after_han
        text = _SPACES.sub(" ", "".join(pieces))
        text = _ENGLISH_SUFFIX.sub(r"'\1 ", text)
        text = _GLUED_ON_THE_RIGHT.sub(r"\1", text)
        return _DECIMAL.sub(r"\1\2", text).strip()

    def token(self, index: int) -> str:
        """The line of the vocabulary with this id."""
        return self._tokens[index]

    def token_text(self, index: int) -> TokenText | None:
        """`x` begins a word, `##x` continues one; `[…]` and `<…>` are specials."""
        token = self._tokens[index]
        if _SPECIAL.fullmatch(token):
            return None
        return TokenText(token[2:], False) if token[:2] == "##" and len(token) > 2 else TokenText(token, True)

    def encode_source(self, text: str, max_tokens: int) -> list[int]:
        """`[CLS] text [SEP]`, at most `max_tokens` of them; the text gives way."""
        if max_tokens < 2:
            raise UsageError(f"max_source_tokens={max_tokens} must be at least 2, for [CLS] and [SEP]")
        return [self.start_id, *self.encode(text)[: max_tokens - 2], self.end_id]

    def encode_target(self, text: str, max_tokens: int) -> list[int]:
        """`text [SEP]`, at most `max_tokens` of them; the text gives way."""
        if max_tokens < 1:
            raise UsageError(f"max_target_tokens={max_tokens} must be at least 1, for [SEP]")
        return [*self.encode(text)[: max_tokens - 1], self.end_id]

    def save(self, path: Path, made_by: dict[str, Any] | None = None) -> None:
        """Write `vocab.txt` and `tokenizer.json` into a new folder, whole or not at all."""
        content = "".join(token + "\n" for token in self._tokens).encode("utf-8")
        write_tokenizer(self, path, "vocab.txt", content, made_by)

    def extend(self, tokens: Sequence[str]) -> "WordpieceTokenizer":
        """The tokenizer with further entries behind its own, whose ids stay (`added_tokens` says which are of use)."""
        return WordpieceTokenizer([*self._tokens, *tokens], dictionary=self.kind == "wordpiece")

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of letters or digits that continue a word, by `##` entries alone; `unk_id` if there are none for it."""
        pieces = split_wordpieces(text, self._ids, continues=True)
        return [self.unk_id] if pieces == [text] else [self._ids[piece] for piece in pieces]

    def _tokens_of(self, ids: list[int]) -> list[str]:
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise UsageError(
                    f"id {index} is not in the vocabulary of {self.vocab_size} tokens; were these ids made by "
                    "another tokenizer?"
                )
        tokens = [self._tokens[index] for index in ids]
        return [token for token in tokens if not (token[:1] == "[" and token[-1:] == "]")]


class _WordCache(dict[str, tuple[int, ...]]):
    """Ids of every word met so far: a text has few different words, and looking up is all that remains."""

    def __init__(self, ids: dict[str, int], unk_id: int) -> None:
        self._ids, self._unk_id = ids, unk_id

    def __missing__(self, word: str) -> tuple[int, ...]:
        whole = self._ids.get(word)
        if whole is not None:
            ids = (whole,)
        else:
            ids = tuple(
                self._ids.get(piece, self._unk_id)
                for part in split_basic(word)
                for piece in split_wordpieces(part, self._ids)
            )
        self[word] = ids
        return ids


def normalise(text: str) -> str:
    """Lower-case, NFD, without nonspacing marks (category Mn). Full-width forms stay.

    What comes back from `decode` is this, up to white space and unknown characters.
    """
    text = text.lower()
    return text if text.isascii() else _changed_by_nfd().sub(_decompose, text)


def _decompose(match: re.Match[str]) -> str:
    decomposed = unicodedata.normalize("NFD", match.group())
    return "".join(character for character in decomposed if unicodedata.category(character) != "Mn")


@functools.cache
def _changed_by_nfd() -> re.Pattern[str]:
    """Finds the runs of characters that NFD or the removal of marks changes; Chinese prose has few.

    A run by itself comes out as it would within its text: NFD reorders neighbouring marks only.
    """
    codes = [
        code
        for code in chain(range(0x80, 0x3400), range(0xA000, 0xAC00), range(0xD7B0, 0x10000))
        if unicodedata.category(chr(code)) == "Mn"
        or unicodedata.combining(chr(code))
        or unicodedata.decomposition(chr(code))[:1] not in ("", "<")
    ]
    # Hangul syllables decompose by rule. The other planes are given whole: a few ranges keep the class a
    # table, which finds at 400 MB/s instead of 2, and to decompose an emoji changes nothing.
    planes = "\uac00-\ud7a3\U00010000-\U0001ffff\U0002f800-\U0002fa1d\U000e0100-\U000e01ef"
    return re.compile(f"[{''.join(map(chr, codes))}{planes}]+")


def is_punctuation(character: str) -> bool:
    """BERT's punctuation: all ASCII signs, and category P."""
    code = ord(character)
    return (
        33 <= code <= 47
        or 58 <= code <= 64
        or 91 <= code <= 96
        or 123 <= code <= 126
        or unicodedata.category(character).startswith("P")
    )


def is_isolated(character: str) -> bool:
    """Whether BERT's basic tokenizer makes a word of this character alone: Han and punctuation."""
    return _HAN_CHARACTER.match(character) is not None or is_punctuation(character)


def split_basic(word: str) -> list[str]:
    """BERT's basic tokenizer: Han and punctuation characters alone, the rest split at white space."""
    spaced: list[str] = []
    for character in word:
        if is_isolated(character):
            spaced += (" ", character, " ")
        elif character in " \n\r\t" or unicodedata.category(character) == "Zs":
            spaced.append(" ")
        elif character not in "\0\ufffd" and unicodedata.category(character) not in ("Cc", "Cf"):
            spaced.append(character)
    return "".join(spaced).split()


def split_wordpieces(word: str, vocabulary: dict[str, int], *, continues: bool = False) -> list[str]:
    """Greedy longest match from the left, `##` before a continuation; the whole word if it gets stuck.

    With `continues` the word itself is the end of a longer one, so that its first piece has a `##`, too.
    """
    if len(word) > MAX_WORD_CHARACTERS:
        return [word]
    pieces: list[str] = []
    start = 0
    while start < len(word):
        prefix = "##" if start or continues else ""
        end = next((end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary), None)
        if end is None:
            return [word]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


def read_vocabulary(path: Path) -> list[str]:
    r"""The tokens of a `vocab.txt`, one per line ended by ``\n`` (a token may be U+2028, so nothing else ends one).

    Raises:
        ArtifactError: if the file is missing or not UTF-8.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ArtifactError(f"vocabulary {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ArtifactError(f"vocabulary {path} is not valid UTF-8 ({error.reason} at byte {error.start})") from None
    tokens = [line.removesuffix("\r") for line in text.split("\n")]
    return tokens[:-1] if tokens[-1] == "" else tokens
