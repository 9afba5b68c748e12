"""The tokenizer of an export, so that AutoTokenizer of transformers 5 gives our ids, or refuses; never others.

Without these files AutoTokenizer takes an empty T5 tokenizer of 104 tokens for a folder with vocab.txt, and for one
with spiece.model one that knows neither byte pieces nor line breaks.
"""

import base64
import re
import shutil
from importlib.resources import files
from pathlib import Path
from typing import Any

from t5pegasus.json_files import write_json
from t5pegasus.text.tokenizer import Tokenizer
from t5pegasus.text.tokenizer.sentencepiece import SPACE

REMOTE_CODE = "tokenization_t5_pegasus.py"
_UNIGRAM = 1
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
"""Kinds of pieces in sentencepiece_model.proto."""
_ALL = 2**31


def write_tokenizer_files(tokenizer: Tokenizer, tokenizer_path: Path, output_path: Path, max_source_tokens: int) -> str:
    """Write what AutoTokenizer reads into an export; returns the Python expression that loads the tokenizer.

    Args:
        tokenizer: the checkpoint's.
        tokenizer_path: its folder.
        output_path: the export, which must exist.
        max_source_tokens: where `truncation=True` cuts.
    """
    own: dict[str, Any] = {"model_max_length": max_source_tokens, "split_special_tokens": True}
    if tokenizer.kind == "sentencepiece":
        shutil.copyfile(tokenizer_path / "spiece.model", output_path / "spiece.model")
        fast = fast_tokenizer_json((tokenizer_path / "spiece.model").read_bytes(), tokenizer)
        if fast is None:
            # A class that does not exist: AutoTokenizer then says that it cannot load it instead of guessing.
            write_json(output_path / "tokenizer_config.json", own | {"tokenizer_class": "SentencepieceTokenizer"})
            return 'sentencepiece.SentencePieceProcessor(f"{folder}/spiece.model")'
        write_json(output_path / "tokenizer.json", fast)
        special = {f"{name}_token": fast["added_tokens"][index]["content"] for name, index in _SPECIALS.items()}
        own |= special | {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
        write_json(output_path / "tokenizer_config.json", own)
        return "AutoTokenizer.from_pretrained(folder)"
    shutil.copyfile(tokenizer_path / "vocab.txt", output_path / "vocab.txt")
    code = files("t5pegasus.convert").joinpath(REMOTE_CODE).read_bytes()
    (output_path / REMOTE_CODE).write_bytes(code)
    own |= {
        "tokenizer_class": "T5PegasusTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_t5_pegasus.T5PegasusTokenizer", None]},
        "dictionary": tokenizer.kind == "wordpiece",
    }
    write_json(output_path / "tokenizer_config.json", own)
    return "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)"


_SPECIALS = {"pad": 0, "eos": 1, "unk": 2}
"""Their places in `added_tokens`."""


def fast_tokenizer_json(serialized: bytes, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A sentencepiece model in the format of the `tokenizers` library (its tokenizer.json).

    The text is normalised, gets `▁` in front and for its spaces, and is segmented as a whole, so that the pieces are
    sentencepiece's. It is split before at two places alone: around pieces that the user defined, which always win;
    and after the first character of something like `</s>` that the text itself spells out, which sentencepiece never
    takes for the special. (There, a model that does not know `<` gives one unknown more.)

    Args:
        serialized: the model.
        tokenizer: made of it; knows the special ids.

    Returns:
        The JSON object; None for what it cannot be sure to say with the same ids: models other than unigram, and
        other ways to treat spaces than these.
    """
    from sentencepiece import sentencepiece_model_pb2 as schema

    model = schema.ModelProto.FromString(serialized)  # pyright: ignore[reportAttributeAccessIssue] - made at import
    spec, pieces = model.normalizer_spec, model.pieces
    whitespace = spec.add_dummy_prefix and spec.escape_whitespaces and not model.trainer_spec.treat_whitespace_as_suffix
    if model.trainer_spec.model_type != _UNIGRAM or not whitespace:
        return None
    bytes_known = any(piece.type == _BYTE for piece in pieces)
    defined = sorted((piece.piece for piece in pieces if piece.type == _USER_DEFINED), key=len, reverse=True)
    others = [piece.piece for piece in pieces if piece.type in (_UNKNOWN, _CONTROL, _UNUSED)]
    literals = [*map(re.escape, others), *(["<0x[0-9A-F]{2}>"] if bytes_known else [])]
    # Not those of the trainer's options: sentencepiece itself goes by the pieces, and these may be -1 beside them.
    ids = {"pad": tokenizer.pad_id, "eos": tokenizer.end_id, "unk": tokenizer.unk_id}
    end = pieces[ids["eos"]].piece
    spaces: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"Regex": rf"\A +|[ {SPACE}]+\z"}, "content": ""},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[name], "content": pieces[ids[name]].piece, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for name in _SPECIALS
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Precompiled", "precompiled_charsmap": charsmap}] if charsmap else []),
                *(spaces if spec.remove_extra_whitespaces else []),
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *([_split("|".join(map(re.escape, defined)), "Isolated")] if defined else []),
                _split(f"(?={'|'.join(literals)}).", "MergedWithPrevious"),
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}}],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}}, {"SpecialToken": {"id": end, "type_id": 0}},
            ],
            "special_tokens": {end: {"id": end, "ids": [ids["eos"]], "tokens": [end]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                *([{"type": "ByteFallback"}] if bytes_known else []),
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": _ALL if spec.remove_extra_whitespaces else 1, "stop": 0},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": ids["unk"],
            "vocab": [[piece.piece, piece.score] for piece in pieces],
            "byte_fallback": bytes_known,
        },
    }  # fmt: skip


def _split(pattern: str, behavior: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
