"""New tokens for a model: its tokenizer extended, and a plan that begins their rows as means of their pieces."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from growth.choices import Choices
from growth.t5 import rows_given
from t5pegasus.config import ModelConfig
from t5pegasus.text.tokenizer import load_tokenizer
from t5pegasus.text.tokenizer.added_tokens import add_tokens


class ExtendedVocabulary(NamedTuple):
    """A growth with the tokens that it adds."""

    target: ModelConfig
    choices: Choices
    tokenizer_path: Path
    tokenizer_fingerprint: str


def extend_vocabulary(
    tokenizer_path: Path,
    tokens: Sequence[str],
    target: ModelConfig,
    choices: Choices | Mapping[str, Any] | None,
    output_path: Path,
    *,
    masked: bool,
) -> ExtendedVocabulary:
    """Add tokens to a tokenizer, and to what a growth is to reach.

    Args:
        tokenizer_path: of the source.
        tokens: to add.
        target: config to reach but for the vocabulary.
        choices: how; where they say nothing of `vocab`, a new row begins as the mean of the pieces that its token was
            read as before.
        output_path: tokenizer folder to create.
        masked: whether the new tokens have no probability until they are opened.

    Raises:
        UsageError: if a token cannot be added.
    """
    pieces = add_tokens(tokenizer_path, tokens, output_path)
    if not isinstance(choices, Choices):
        choices = Choices.from_json(choices or {})
    vocab = {"operator": "add", "rows": [list(each) for each in pieces], **rows_given(choices)}
    return ExtendedVocabulary(
        add_to_vocabulary(target, len(tokens), masked=masked),
        dataclasses.replace(choices, axes={**choices.axes, "vocab": vocab}),
        output_path,
        load_tokenizer(output_path).fingerprint,
    )


def add_to_vocabulary(target: ModelConfig, count: int, *, masked: bool) -> ModelConfig:
    """The config with so many more tokens."""
    return dataclasses.replace(
        target,
        vocab_size=target.vocab_size + count,
        num_masked_tokens=target.num_masked_tokens + (count if masked else 0),
    )
