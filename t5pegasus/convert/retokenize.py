"""Another vocabulary for a trained model: every new row is made of the old rows of the same text.

This is how T5 PEGASUS was begun from mT5 (`train.py` of ZhuiyiTechnology/t5-pegasus): a token that the old vocabulary
has keeps its row, any other is the mean of the rows of its old pieces; embedding and output head alike.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np

from t5pegasus.convert.imported import TOKEN_IDS, Imported
from t5pegasus.text.tokenizer import Tokenizer, TokenText
from t5pegasus.text.tokenizer.sentencepiece import SPACE
from t5pegasus.text.tokenizer.wordpiece import is_isolated, normalise

_WORDPIECE_KINDS = ("wordpiece", "bert")


@dataclasses.dataclass(frozen=True)
class VocabularyMap:
    """For each new token the old ids whose mean its row is."""

    sources: tuple[tuple[int, ...], ...]
    """One id: taken over. Several: their mean."""
    special: int
    """How many take over a row by their role: pad, start, end, unknown."""
    direct: int
    """How many take over the row of the same text."""
    means: dict[int, int]
    """Number of pieces → how many new tokens are a mean of so many."""
    reserved: int
    """Entries without a text (other specials, bytes, unused ones); they begin as the unknown token."""
    unknown: tuple[str, ...]
    """Entries of the new vocabulary that the old one cannot spell; they begin as the unknown token, too."""

    def to_json(self) -> dict[str, Any]:
        """Counts, and every unknown token."""
        return {
            "tokens": len(self.sources),
            "special": self.special,
            "direct": self.direct,
            "mean_of_pieces": {str(count): tokens for count, tokens in self.means.items()},
            "reserved": self.reserved,
            "unknown": list(self.unknown),
        }

    def to_table(self) -> str:
        """The counts in a few lines, and the first unknown tokens."""
        total = len(self.sources)
        rows = [
            ("special", self.special),
            ("direct match", self.direct),
            *((f"mean of {count} piece{'s'[: count > 1]}", tokens) for count, tokens in self.means.items()),
            ("reserved, as the unknown token", self.reserved),
            ("unknown, as the unknown token", len(self.unknown)),
        ]
        lines = [f"{name:<32}{count:>9,}{100 * count / total:8.2f} %" for name, count in rows]
        if self.unknown:
            lines.append("unknown: " + " ".join(self.unknown[:20]) + (" …" if len(self.unknown) > 20 else ""))
        return "\n".join(lines)


def map_vocabulary(old: Tokenizer, new: Tokenizer) -> VocabularyMap:
    """Find for every token of `new` the ids of `old` that its row is made of.

    Pad, start, end and unknown correspond by their role; where pad is the start, too, its row is the start's, the only
    one that is read. Between two tokenizers of one kind equal entries correspond,
    specials included. Else a token is looked up by its text (see `_OldTokens`), then encoded by `old`; pieces that
    are unknown there do not count.
    """
    # In this order: of a pad that is the start, too, the start's row stays.
    roles = {getattr(new, name): getattr(old, name) for name in ("unk_id", "pad_id", "start_id", "end_id")}
    of_text = _OldTokens(old)
    of_entry = {old.token(index): index for index in range(old.vocab_size)} if old.kind == new.kind else {}
    sources: list[tuple[int, ...]] = []
    means: Counter[int] = Counter()
    unknown: list[str] = []
    direct = reserved = 0
    for index in range(new.vocab_size):
        entry, token = new.token(index), new.token_text(index)
        if index in roles:
            sources.append((roles[index],))
            continue
        found = of_entry.get(entry)
        if found is None and token is not None:
            found = of_text.find(token)
        if found is not None:
            sources.append((found,))
            direct += 1
        elif token is None:
            sources.append((old.unk_id,))
            reserved += 1
        elif pieces := of_text.spell(token.text):
            sources.append(pieces)
            means[len(pieces)] += 1
        else:
            sources.append((old.unk_id,))
            unknown.append(entry)
    return VocabularyMap(tuple(sources), len(roles), direct, dict(sorted(means.items())), reserved, tuple(unknown))


def retokenize(imported: Imported, tokenizer: Tokenizer) -> tuple[Imported, VocabularyMap]:
    """The model with the vocabulary of another tokenizer; all but embedding and head stay."""
    mapped = map_vocabulary(imported.tokenizer, tokenizer)
    parameters = dict(imported.parameters)
    parameters["token_embedding"] = _mix_rows(parameters["token_embedding"], mapped)
    if "lm_head" in parameters:
        parameters["lm_head"] = np.ascontiguousarray(_mix_rows(parameters["lm_head"].T, mapped).T)
    ids = {field: getattr(tokenizer, name) for field, name in TOKEN_IDS.items()}
    model = dataclasses.replace(imported.model, vocab_size=tokenizer.vocab_size, num_masked_tokens=0, **ids)
    return Imported(model, parameters, tokenizer, assumed=imported.assumed), mapped


class _OldTokens:
    """The old vocabulary by text, with the conventions of both kinds made one.

    A text may stand at the beginning of a word (`x`, `▁x`) or within (`##x`, `x`). What is asked for at one place is
    taken from there if it exists, else from the other place: Chinese has no spaces, and sentencepiece writes most of
    its words as if they stood within one. Wordpiece knows lower-case decomposed text only, and never puts `##` before
    a Han character or a punctuation mark, whatever its list holds.
    """

    def __init__(self, old: Tokenizer) -> None:
        self._old = old
        self._is_wordpiece = old.kind in _WORDPIECE_KINDS
        self._ids: dict[TokenText, int] = {}
        for index in range(old.vocab_size):
            token = old.token_text(index)
            if token is None or (self._is_wordpiece and not token.begins_word and is_isolated(token.text[0])):
                continue
            self._ids.setdefault(token, index)

    def find(self, token: TokenText) -> int | None:
        """The id of a token with this text."""
        text = normalise(token.text) if self._is_wordpiece else token.text
        same, other = TokenText(text, token.begins_word), TokenText(text, not token.begins_word)
        return self._ids.get(same, self._ids.get(other))

    def spell(self, text: str) -> tuple[int, ...]:
        """The ids of a text without the unknown ones, and without the bare `▁` that sentencepiece begins with."""
        ids = self._old.encode(text)
        if not self._is_wordpiece and len(ids) > 1 and self._old.token(ids[0]) == SPACE:
            ids = ids[1:]
        return tuple(index for index in ids if index != self._old.unk_id)


def _mix_rows(table: np.ndarray, mapped: VocabularyMap) -> np.ndarray:
    """[old vocab, embed] → [new vocab, embed]; a row taken over is the same to the bit."""
    mixed = table[[ids[0] for ids in mapped.sources]]
    for index, ids in enumerate(mapped.sources):
        if len(ids) > 1:
            mixed[index] = table[list(ids)].mean(axis=0, dtype=np.float64)
    return mixed
