"""From a foreign model to a checkpoint: the one way for all sources, with the tokenizer checked against the model."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from t5pegasus.checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_checkpoint_info,
    load_parameters,
    save_checkpoint,
)
from t5pegasus.config import ModelConfig, RunConfig
from t5pegasus.convert.foreign import Foreign
from t5pegasus.errors import UsageError
from t5pegasus.text.tokenizer import Tokenizer, adopt_vocabulary, load_tokenizer

VOCABULARY_FILES = ("spiece.model", "vocab.txt")
MAX_PADDING_ROWS = 128
"""T5's vocabularies are rounded up to a multiple of 128; those rows belong to no token of the text."""
TOKEN_IDS = {"pad_token_id": "pad_id", "decoder_start_token_id": "start_id", "eos_token_id": "end_id"}
"""Fields of `ModelConfig` and what a tokenizer calls them."""


class Imported(NamedTuple):
    """A model in memory that fits its tokenizer."""

    model: ModelConfig
    parameters: dict[str, np.ndarray]
    """By dotted name, float32."""
    tokenizer: Tokenizer
    num_padding_rows: int = 0
    """Rows of the vocabulary without a token, dropped from embedding and head."""
    assumed: tuple[str, ...] = ()
    """What the files do not say and was taken for true; one sentence each, to be shown to the user."""
    stored_dtype: str = "float32"
    """In what the source holds the weights."""


def require_free(output_path: Path) -> None:
    """Refuse an output that exists.

    Raises:
        UsageError: if something is already there.
    """
    if output_path.exists():
        raise UsageError(f"{output_path} exists already; delete it, or choose another output")


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary file of a folder, if it has one of a known name."""
    return next((folder / name for name in VOCABULARY_FILES if (folder / name).is_file()), None)


def import_foreign(
    foreign: Foreign, where: Path, tokenizer_path: Path | None = None, *, ids_of_tokenizer: bool = False
) -> Imported:
    """A foreign model with its tokenizer.

    Args:
        foreign: what a reader gave.
        where: the file or folder that states the model's ids and sizes, for messages.
        tokenizer_path: a tokenizer folder; None adopts the vocabulary beside the model.
        ids_of_tokenizer: take the special ids from the tokenizer, because the source is known to state wrong ones.

    Raises:
        UsageError: if there is no tokenizer, or it and the model do not belong together.
        ArtifactError: if the tokenizer is damaged.
    """
    if tokenizer_path is not None:
        tokenizer = load_tokenizer(tokenizer_path)
    elif foreign.vocabulary_path is not None:
        tokenizer = adopt_vocabulary(foreign.vocabulary_path)
    else:
        raise UsageError(
            f"{where}: there is neither {' nor '.join(VOCABULARY_FILES)} beside it; give its tokenizer with "
            "--tokenizer-path FOLDER (t5pegasus tokenizer train --from-vocabulary makes one of a vocabulary)"
        )
    if ids_of_tokenizer:
        ids = {field: getattr(tokenizer, name) for field, name in TOKEN_IDS.items()}
        foreign = foreign._replace(model=dataclasses.replace(foreign.model, **ids))
    return join_tokenizer(foreign, tokenizer, where)


def load_imported(checkpoint_path: Path) -> tuple[Imported, CheckpointInfo]:
    """The model of one of our own checkpoints, or of the last good one of a run.

    Raises:
        ArtifactError: if there is none, or it is damaged.
    """
    checkpoint_path = find_checkpoint(checkpoint_path)
    info = load_checkpoint_info(checkpoint_path)
    tokenizer = load_tokenizer(checkpoint_path / "tokenizer")
    return Imported(info.config.model, load_parameters(checkpoint_path), tokenizer), info


def join_tokenizer(foreign: Foreign, tokenizer: Tokenizer, where: Path) -> Imported:
    """Check that model and tokenizer belong together, and drop the rows at the end that have no token.

    Args:
        foreign: what a reader gave.
        tokenizer: the one it was trained with.
        where: the file that states the model's ids and sizes, for messages.

    Raises:
        UsageError: naming the field, if an id or the size differs.
    """
    model = foreign.model
    # Only a config.json can be corrected; the ids of other sources stand in their vocabulary, or are their format's.
    correct = f", or correct {where.name} if that is the mistaken one" if where.name == "config.json" else ""
    for field, name in TOKEN_IDS.items():
        if getattr(model, field) != getattr(tokenizer, name):
            raise UsageError(
                f"{where}: {field} is {getattr(model, field)}, the {tokenizer.kind} tokenizer's is "
                f"{getattr(tokenizer, name)}; give the tokenizer it was trained with{correct}"
            )
    num_padding_rows = model.vocab_size - tokenizer.vocab_size
    if not 0 <= num_padding_rows <= MAX_PADDING_ROWS:
        raise UsageError(
            f"{where}: vocab_size is {model.vocab_size}, the tokenizer has {tokenizer.vocab_size} tokens; "
            f"as many, or at most {MAX_PADDING_ROWS} rows more, were wanted: give the tokenizer it was trained with"
        )
    parameters = dict(foreign.parameters)
    if num_padding_rows:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
        parameters["token_embedding"] = parameters["token_embedding"][: tokenizer.vocab_size]
        if "lm_head" in parameters:
            parameters["lm_head"] = np.ascontiguousarray(parameters["lm_head"][:, : tokenizer.vocab_size])
    return Imported(model, parameters, tokenizer, num_padding_rows, foreign.assumed, foreign.stored_dtype)


def save_imported(
    imported: Imported,
    output_path: Path,
    config: RunConfig | None = None,
    add_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint of parameters only, at step 0; returns its folder.

    Args:
        imported: model, parameters and tokenizer.
        output_path: checkpoint folder to create.
        config: where lengths and training options come from; its model is replaced. Default: a fresh one.
        add_files: called with the unfinished folder, to put more into it.

    Raises:
        UsageError: if the output is in use.
    """
    require_free(output_path)
    info = CheckpointInfo(
        config=dataclasses.replace(config or RunConfig(), model=imported.model),
        step=0,
        rows=0,
        compute_dtype="float32",
        tokenizer_fingerprint=imported.tokenizer.fingerprint,
    )
    with tempfile.TemporaryDirectory() as folder:
        imported.tokenizer.save(Path(folder) / "tokenizer")
        arrays = {f"parameters.{name}": value for name, value in imported.parameters.items()}
        save_checkpoint(output_path, arrays, info, Path(folder) / "tokenizer", add_files)
    return output_path
