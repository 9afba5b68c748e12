"""A Hugging Face folder of T5 or mT5 in, a larger one that computes the same out: import, grow, export."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from growth.choices import Choices
from growth.grow import GrownCheckpoint, grow_checkpoint
from t5pegasus.config import ModelConfig
from t5pegasus.convert.hf import export_hf, list_losses
from t5pegasus.convert.imported import import_foreign, require_free, save_imported
from t5pegasus.convert.sources import open_source
from t5pegasus.errors import UsageError


def grow_hugging_face(
    folder: Path,
    output_path: Path,
    aim: Callable[[ModelConfig], tuple[ModelConfig, Choices]],
    *,
    tokens: Sequence[str] = (),
    receipt: str = "full",
) -> tuple[GrownCheckpoint, Path]:
    """Grow a folder that transformers reads into one that it reads, too.

    The checkpoints in between lie beside the output while it works, and are gone when it is there.

    Args:
        folder: of the source, with config.json, weights and tokenizer.
        output_path: folder to create.
        aim: the model there is → the config to reach, and how.
        tokens: to add to tokenizer and vocabulary.
        receipt: how much is measured, as in `grow_checkpoint`.

    Returns:
        What the growth did, with its receipt, and the folder.

    Raises:
        UsageError: if the source is of a kind that is not exported, the plan is refused, or the output is in use.
        ArtifactError: if the source is damaged, or the grown model is not its equal.
    """
    require_free(output_path)
    foreign, where = open_source(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no Hugging Face folder; make a checkpoint of it first: t5pegasus convert")
    imported = import_foreign(foreign, where, None, ids_of_tokenizer=False)
    target, choices = aim(imported.model)
    if choices.learned is not None:
        raise UsageError(
            f"the plan has learned maps, which are trained on examples, and {folder} has none; make a checkpoint of it "
            "first (t5pegasus convert), and grow that with --examples-path"
        )
    if losses := list_losses(target):
        raise UsageError(
            f"{folder} cannot be grown to a folder for transformers: {'; '.join(losses)}; make a checkpoint of it "
            "first (t5pegasus convert), and grow that"
        )
    work = output_path.with_name(output_path.name + ".growing")
    shutil.rmtree(work / "source", ignore_errors=True)  # of another source, perhaps; the same one gives the same bytes
    save_imported(imported, work / "source")
    del imported, foreign
    done = grow_checkpoint(work / "source", target, work / "grown", choices=choices, tokens=tokens, receipt=receipt)
    path = export_hf(work / "grown", output_path)
    shutil.rmtree(work)
    return done, path
