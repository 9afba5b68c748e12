"""Training tokenizers from documents; the same documents give the same bytes.

Documents should be cleaned first (`text.clean`). Titles are read too: summaries are written like them.
"""

import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import rjieba
import sentencepiece

from t5pegasus.errors import DataError, UsageError
from t5pegasus.text.read import Document
from t5pegasus.text.sentences import split_sentences
from t5pegasus.text.tokenizer import Tokenizer
from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer
from t5pegasus.text.tokenizer.wordpiece import HAN, WordpieceTokenizer, normalise, split_basic

SPECIALS = (
    "[PAD]", *(f"[unused{index}]" for index in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<S>", "<T>",
)  # fmt: skip
"""Ids 0–105, as in the released T5-PEGASUS vocabulary."""
MAX_COUNTED_WORDS = 4_000_000
"""Above it, the rarest are forgotten until half of it is left: identifiers and hashes would fill the memory."""
MAX_PIECE_WORDS = 30_000
"""`##` pieces are taken from this many of the most frequent ASCII words."""
MAX_PIECE_CHARACTERS = 10
MAX_SENTENCEPIECE_SENTENCES = 2_000_000
"""Of longer corpora a fixed sample of this size trains the model (about 200 MB of text, which take 4 GB)."""

_ASCII_CHARACTERS = "".join(chr(code) for code in range(33, 127) if not chr(code).isupper())
_PUNCTUATION = "，。、；：？！…—·～“”‘’（）《》〈〉【】〔〕「」『』［］｛｝／％＋－＝￥°℃×÷±→"
_CONTINUATIONS = tuple(f"##{character}" for character in "0123456789abcdefghijklmnopqrstuvwxyz")
_HAN_WORD = re.compile(f"[{HAN}]{{2,8}}")
_ASCII_WORD = re.compile("[0-9a-z]{2,20}")
_OTHER_CHARACTERS_SHARE = 8
_PIECES_SHARE = 32
"""At most 1/8 of the entries are rare characters, 1/32 `##` pieces (1,450 of 50,000 in the released one)."""
_CHARACTER_COVERAGE = 0.9999


def list_common_characters() -> list[str]:
    """The alphabet every trained vocabulary has: 3,755 characters of GB 2312 level 1, punctuation, ASCII."""
    level_1 = [
        bytes((row, column)).decode("gb2312")
        for row in range(0xB0, 0xD8)
        for column in range(0xA1, 0xFF if row < 0xD7 else 0xFA)
    ]
    return [*level_1, *_PUNCTUATION, *_ASCII_CHARACTERS]


def train_wordpiece(documents: Iterable[Document], vocab_size: int) -> WordpieceTokenizer:
    """A T5-PEGASUS vocabulary of exactly `vocab_size` entries, chosen by frequency.

    Layout of the released list: specials (0–105), tokens sorted by length and code point, `##` pieces. The
    entries are the common characters and single-character `##` pieces; other characters until 99.99 % of all
    occurrences are covered; `##` pieces of ASCII words; and the most frequent dictionary and ASCII words.

    Raises:
        UsageError: if `vocab_size` is below the fixed part, or above what the documents can fill; the message
            states the size that can be reached.
        DataError: if there is no text at all.
    """
    documents = iter(documents)
    first = next(documents, None)  # files that cannot be read are named before a size is
    if first is None:
        raise DataError("the documents have no text to train a tokenizer on")
    common = list_common_characters()
    smallest = len(SPECIALS) + len(common) + len(_CONTINUATIONS)
    if vocab_size < smallest:
        raise UsageError(
            f"vocab_size={vocab_size} is too small: specials, common characters and single ## pieces alone are "
            f"{smallest} entries; set vocab_size to {smallest} or more"
        )
    words, characters = _count_words(itertools.chain([first], documents))
    if not characters:
        raise DataError("the documents have no text to train a tokenizer on")
    entries = vocab_size - len(SPECIALS)
    known = set(common)
    others = Counter({token: count for token, count in characters.items() if token not in known})
    ranked_others, ranked_words, pieces = _rank(others), _rank(words), _rank(_count_pieces(words))
    # Best first; what a small corpus leaves open is filled with more pieces, then with the rarest characters.
    candidates = dict.fromkeys([
        *common,
        *_CONTINUATIONS,
        *ranked_others[: min(_num_to_cover(others, characters.total()), entries // _OTHER_CHARACTERS_SHARE)],
        *pieces[: entries // _PIECES_SHARE],
        *ranked_words,
        *pieces,
        *ranked_others,
    ])  # fmt: skip
    if len(candidates) < entries:
        raise UsageError(
            f"vocab_size={vocab_size} cannot be filled: the documents give {len(SPECIALS) + len(candidates)} "
            f"entries; give more documents or set vocab_size to {len(SPECIALS) + len(candidates)} or less"
        )
    tokens = sorted(list(candidates)[:entries], key=lambda token: (token[:2] == "##", len(token), token))
    return WordpieceTokenizer([*SPECIALS, *tokens])


def train_sentencepiece(
    documents: Iterable[Document], vocab_size: int, num_sentinels: int = 0
) -> SentencepieceTokenizer:
    """A unigram model (Kudo 2018) with mT5's specials: pad 0, end 1, unknown 2, then 256 byte pieces.

    Text is taken as it is (no NFKC, unlike mT5's own model), so full-width punctuation survives; byte pieces
    spell every character that is not in the vocabulary, so nothing is unknown. Of the entries, the last
    `num_sentinels` are `<extra_id_0>` and so on, from the end, as in T5's models.

    Raises:
        UsageError: if `vocab_size` is below or above what the documents allow; the message states the bound.
        DataError: if there is no text at all.
    """
    model = io.BytesIO()
    sentences = _Sentences(documents)
    sentencepiece.set_random_generator_seed(0)  # of the sample that input_sentence_size takes
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - num_sentinels,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            byte_fallback=True,
            normalization_rule_name="identity",
            character_coverage=0.9995,
            input_sentence_size=MAX_SENTENCEPIECE_SENTENCES,
            shuffle_input_sentence=True,
            num_threads=8,  # fixed on every machine: it decides the order in which floats are summed
            minloglevel=2,
        )
    except RuntimeError as error:
        if sentences.failure is not None:
            raise sentences.failure from None
        if sentences.count == 0:
            raise DataError("the documents have no text to train a tokenizer on") from None
        if at_least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            fewest = int(at_least[1]) + num_sentinels
            bound = f"too small: characters, bytes and specials alone are {fewest} entries; give more"
        elif at_most := re.search(r"too high .* <= (\d+)", str(error)):
            most = int(at_most[1]) + num_sentinels
            bound = f"too large: the documents give {most} entries at most; give more documents or a smaller size"
        else:
            raise
        raise UsageError(f"vocab_size={vocab_size} is {bound}") from None
    tokenizer = SentencepieceTokenizer(model.getvalue())
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(num_sentinels))]
    return tokenizer.extend(sentinels) if sentinels else tokenizer


def measure_coverage(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, float]:
    """How a tokenizer reads documents: characters (without white space), tokens, unknown tokens, and rates.

    `character_coverage` is the share of the characters that are not unknown when they stand alone.
    """
    characters: Counter[str] = Counter()
    num_tokens = num_unknown = 0
    for text in _iterate_texts(documents):
        ids = tokenizer.encode(text)
        characters.update("".join(text.split()))
        num_tokens += len(ids)
        num_unknown += ids.count(tokenizer.unk_id)
    num_characters = characters.total()
    num_covered = sum(count for token, count in characters.items() if tokenizer.unk_id not in tokenizer.encode(token))
    return {
        "num_characters": num_characters,
        "num_tokens": num_tokens,
        "num_unknown": num_unknown,
        "character_coverage": num_covered / max(num_characters, 1),
        "unknown_rate": num_unknown / max(num_tokens, 1),
        "characters_per_token": num_characters / max(num_tokens, 1),
    }


def _iterate_texts(documents: Iterable[Document]) -> Iterator[str]:
    for document in documents:
        if document.title:
            yield document.title
        yield document.text


class _Sentences:
    """Sentences to train on; keeps an error of the documents, which sentencepiece turns into a message."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self._documents = documents
        self.count = 0
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in _iterate_texts(self._documents):
                # Sentencepiece leaves out lines above 4,192 bytes: whole documents would be lost.
                for sentence in filter(None, split_sentences(text)):
                    self.count += 1
                    yield sentence
        except Exception as error:
            self.failure = error
            raise


def _count_words(documents: Iterable[Document]) -> tuple[Counter[str], Counter[str]]:
    """Occurrences of Han and ASCII words of two characters or more, and of the single characters."""
    words: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for text in _iterate_texts(documents):
        normalised = normalise(text)
        words.update(rjieba.cut(normalised, False))
        characters.update(normalised)
        if len(words) > MAX_COUNTED_WORDS:
            words = _forget_rare(words)
    kept = {token: count for token, count in characters.items() if split_basic(token) == [token]}
    return Counter({word: count for word, count in words.items() if _is_word(word)}), Counter(kept)


def _forget_rare(words: Counter[str]) -> Counter[str]:
    rarest = 1
    while len(words) > MAX_COUNTED_WORDS // 2:
        words = Counter({word: count for word, count in words.items() if count > rarest and _is_word(word)})
        rarest += 1
    return words


def _is_word(word: str) -> bool:
    return bool(_HAN_WORD.fullmatch(word) or _ASCII_WORD.fullmatch(word))


def _rank(counts: Counter[str]) -> list[str]:
    return sorted(counts, key=lambda token: (-counts[token], token))


def _num_to_cover(others: Counter[str], num_characters: int) -> int:
    """How many of the most frequent `others` leave fewer than 0.01 % of all occurrences unknown."""
    left = others.total()
    counts = sorted(others.values(), reverse=True)
    for index, count in enumerate(counts):
        if left <= (1 - _CHARACTER_COVERAGE) * num_characters:
            return index
        left -= count
    return len(counts)


def _count_pieces(words: Counter[str]) -> Counter[str]:
    """Continuations of ASCII words: in how many words, times the characters it saves over single ones.

    Words are counted once each, however frequent: the frequent ones are entries themselves, pieces are for
    the words nobody has seen.
    """
    num_words: Counter[str] = Counter()
    ascii_words = [word for word in words if _ASCII_WORD.fullmatch(word)]
    for word in sorted(ascii_words, key=lambda word: (-words[word], word))[:MAX_PIECE_WORDS]:
        ends = range(1, len(word) + 1)
        num_words.update({word[i:j] for i in ends for j in ends if i + 2 <= j <= i + MAX_PIECE_CHARACTERS})
    # "ollec" occurs almost only within "ollect": a part that a longer piece explains is no piece.
    explained: Counter[str] = Counter()
    for piece, count in num_words.items():
        for part in (piece[1:], piece[:-1]):
            explained[part] = max(explained[part], count)
    return Counter({
        f"##{piece}": count * (len(piece) - 1)
        for piece, count in num_words.items()
        if count > 1 and explained[piece] < 0.7 * count
    })  # fmt: skip
