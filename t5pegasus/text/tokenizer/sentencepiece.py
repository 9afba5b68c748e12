"""Sentencepiece models as mT5 uses them: pad 0, end 1, unknown 2, decoding starts with pad."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from t5pegasus.errors import ArtifactError, UsageError
from t5pegasus.text.tokenizer import TokenText
from t5pegasus.text.tokenizer.folder import write_tokenizer

SPACE = "▁"
"""U+2581, which stands for a space in pieces."""
_USER_DEFINED = 4
"""Kind of a piece in sentencepiece_model.proto."""


class SentencepieceTokenizer:
    """A serialized sentencepiece model; `name` stands for it in error messages."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "the sentencepiece model") -> None:
        self._model, self._name = model, name
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, UnicodeDecodeError) as error:  # the library's message may hold bytes of the model
            raise ArtifactError(f"{name} is not a sentencepiece model ({error}); fetch or train it anew") from None
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id: int = self._processor.pad_id()
        self.unk_id: int = self._processor.unk_id()
        self.end_id: int = self._processor.eos_id()
        self.start_id = self.pad_id
        for field in ("pad", "end"):
            if getattr(self, f"{field}_id") < 0:
                raise ArtifactError(f"{name} has no {field} piece; a model with pad, eos and unk was wanted (mT5)")
        self.fingerprint = hashlib.sha256(b"sentencepiece 1\n" + model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text without specials."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; pad, end and unknown vanish.

        Raises:
            UsageError: for an id that is not in the vocabulary.
        """
        for index in ids:
            if not 0 <= index < self.vocab_size:
                raise UsageError(
                    f"id {index} is not in the vocabulary of {self.vocab_size} pieces; were these ids made by "
                    "another tokenizer?"
                )
        return self._processor.decode([index for index in ids if index not in (self.pad_id, self.end_id, self.unk_id)])

    def token(self, index: int) -> str:
        """The piece with this id."""
        return self._processor.id_to_piece(index)

    def token_text(self, index: int) -> TokenText | None:
        """`▁x` begins a word, `x` continues one; controls, unknown, bytes and the bare `▁` have no text."""
        kinds = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        piece = self.token(index)
        if any(is_kind(index) for is_kind in kinds) or piece == SPACE:
            return None
        return TokenText(piece.removeprefix(SPACE).replace(SPACE, " "), piece.startswith(SPACE))

    def encode_source(self, text: str, max_tokens: int) -> list[int]:
        """`text </s>`, at most `max_tokens` of them; the text gives way."""
        if max_tokens < 1:
            raise UsageError(f"max_source_tokens={max_tokens} must be at least 1, for </s>")
        return [*self.encode(text)[: max_tokens - 1], self.end_id]

    def encode_target(self, text: str, max_tokens: int) -> list[int]:
        """`text </s>`, at most `max_tokens` of them; the text gives way."""
        if max_tokens < 1:
            raise UsageError(f"max_target_tokens={max_tokens} must be at least 1, for </s>")
        return [*self.encode(text)[: max_tokens - 1], self.end_id]

    def extend(self, tokens: Sequence[str]) -> "SentencepieceTokenizer":
        """The tokenizer with further pieces behind its own, whose ids stay: pieces that the user defined.

        They are cut out of texts first, and the scores of all others are among themselves as before.
        """
        from sentencepiece import sentencepiece_model_pb2 as schema

        proto = schema.ModelProto.FromString(self._model)  # pyright: ignore[reportAttributeAccessIssue] - made at import
        for token in tokens:
            proto.pieces.add(piece=token, score=0.0, type=_USER_DEFINED)
        return SentencepieceTokenizer(proto.SerializeToString(deterministic=True), name=self._name)

    def save(self, path: Path, made_by: dict[str, Any] | None = None) -> None:
        """Write `spiece.model` and `tokenizer.json` into a new folder, whole or not at all."""
        write_tokenizer(self, path, "spiece.model", self._model, made_by)


def read_model(path: Path) -> bytes:
    """The bytes of a `*.model` file.

    Raises:
        ArtifactError: if it does not exist.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"vocabulary {path} does not exist") from None
