"""The tokens that stand for spans cut out of a text (Raffel et al. 2020, §3.1.4), as vocabularies have them.

BERT-style lists keep `[unused1]`, `[unused2]`, … free for such uses; sentencepiece models of T5 have `<extra_id_0>`,
`<extra_id_1>`, …, those of mT5 the same behind `▁`.
"""

import re

from t5pegasus.errors import UsageError
from t5pegasus.text.tokenizer import Tokenizer

_SENTINELS = {"sentencepiece": re.compile(r"▁?<extra_id_(\d+)>")}
_UNUSED = re.compile(r"\[unused(\d+)\]")


def find_sentinels(tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """The ids of the first `count` sentinels of a tokenizer, in the order of their numbers.

    Raises:
        UsageError: if its vocabulary has fewer.
    """
    pattern = _SENTINELS.get(tokenizer.kind, _UNUSED)
    numbered = {}
    for index in range(tokenizer.vocab_size):
        if match := pattern.fullmatch(tokenizer.token(index)):
            numbered.setdefault(int(match[1]), index)
    if len(numbered) < count:
        name = "<extra_id_0>, <extra_id_1>, …" if tokenizer.kind in _SENTINELS else "[unused1], [unused2], …"
        way_out = (
            f"train it with t5pegasus tokenizer train --kind sentencepiece --num-sentinels {max(100, count)}"
            if tokenizer.kind in _SENTINELS
            else "adopt a list that has them (trained ones have 99)"
        )
        raise UsageError(
            f"the tokenizer has {len(numbered)} of the {count} tokens {name} that span corruption needs for texts of "
            f"this length; {way_out}, or make shorter rows or longer spans"
        )
    return tuple(numbered[number] for number in sorted(numbered)[:count])
