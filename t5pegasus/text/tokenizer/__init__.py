"""Tokenizers behind one protocol: T5-PEGASUS wordpiece and mT5 sentencepiece, as folders on disk.

A tokenizer folder holds `tokenizer.json` (kind, ids of the specials, fingerprint) and `vocab.txt` or
`spiece.model`, the same files other tools read.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from t5pegasus.errors import ArtifactError, UsageError


class TokenText(NamedTuple):
    """What a token stands for in a text, whatever its vocabulary writes for it."""

    text: str
    begins_word: bool
    """`x` and `##x` of a wordpiece list, `▁x` and `x` of sentencepiece: whether white space (or nothing) is before it.

    Chinese has no white space, so its words may be written either way."""


class Tokenizer(Protocol):
    """What every stage asks of a tokenizer; ids are Python ints below `vocab_size`."""

    kind: str
    """`wordpiece`, `bert` or `sentencepiece`."""
    vocab_size: int
    pad_id: int
    unk_id: int
    start_id: int
    """The first decoder input; the loader prepends it, `encode_target` does not."""
    end_id: int
    fingerprint: str
    """SHA-256 (hex) of all that decides the ids of a text."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without specials."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; specials and unknowns vanish.

        Raises:
            UsageError: for an id that is not in the vocabulary.
        """
        ...

    def token(self, index: int) -> str:
        """The vocabulary's entry with this id, as it is written there."""
        ...

    def token_text(self, index: int) -> TokenText | None:
        """What the entry with this id stands for; None for specials, bytes and other entries without a text."""
        ...

    def encode_source(self, text: str, max_tokens: int) -> list[int]:
        """What the encoder reads: at most `max_tokens` ids with the specials, which truncation spares."""
        ...

    def encode_target(self, text: str, max_tokens: int) -> list[int]:
        """What the decoder learns to write: at most `max_tokens` ids, the last of them `end_id`."""
        ...

    def save(self, path: Path, made_by: dict[str, Any] | None = None) -> None:
        """Write the tokenizer folder, whole or not at all.

        Args:
            path: the folder to create; an empty one may exist.
            made_by: JSON to keep with it, e.g. the request and report of its training.

        Raises:
            UsageError: if something is already there.
        """
        ...


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer of a folder written by `Tokenizer.save`.

    Raises:
        ArtifactError: if the folder is no tokenizer, of another schema, or its files were changed.
    """
    from t5pegasus.text.tokenizer.folder import read_tokenizer_json

    path = Path(path)
    if path.is_file():
        raise ArtifactError(
            f"tokenizer {path} is a file, a tokenizer folder was wanted; make one with "
            f"t5pegasus tokenizer train --from-vocabulary {path} --output-path FOLDER"
        )
    facts = read_tokenizer_json(path)
    kind = str(facts.get("kind"))
    file_name = {"wordpiece": "vocab.txt", "bert": "vocab.txt", "sentencepiece": "spiece.model"}.get(kind)
    if file_name is None:
        raise ArtifactError(f"{path}: kind {kind!r} is unknown; wordpiece, bert or sentencepiece was wanted")
    tokenizer = adopt_vocabulary(path / file_name, dictionary=kind != "bert")
    for field in ("vocab_size", "fingerprint"):
        if facts.get(field) != getattr(tokenizer, field):
            raise ArtifactError(
                f"{path}: {field} of {file_name} is {getattr(tokenizer, field)}, tokenizer.json says "
                f"{facts.get(field)}; the folder was changed: restore it or adopt {file_name} anew"
            )
    return tokenizer


def adopt_vocabulary(path: Path | str, *, dictionary: bool = True) -> Tokenizer:
    """A tokenizer of an existing vocabulary: a BERT-style `*.txt` list, or a sentencepiece `*.model`.

    Args:
        path: the vocabulary file.
        dictionary: whether a `*.txt` list has dictionary words (T5-PEGASUS) or is read by BERT's rules alone.

    Raises:
        ArtifactError: if the file is missing or lacks what the tokenizer needs.
        UsageError: if it is neither kind of file.
    """
    path = Path(path)
    if path.suffix == ".txt":
        from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer, read_vocabulary

        return WordpieceTokenizer(read_vocabulary(path), dictionary=dictionary)
    if path.suffix == ".model":
        from t5pegasus.text.tokenizer.sentencepiece import SentencepieceTokenizer, read_model

        return SentencepieceTokenizer(read_model(path), name=str(path))
    raise UsageError(f"vocabulary {path} must be a *.txt (wordpiece) or *.model (sentencepiece) file")
