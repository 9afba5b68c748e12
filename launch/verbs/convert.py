"""`t5pegasus convert`: a Hugging Face folder becomes a checkpoint, a checkpoint a Hugging Face folder."""

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn a Hugging Face T5.1.1 or mT5 folder into a checkpoint, or a checkpoint into a Hugging Face folder.

    For example: t5pegasus convert runs/tiny exported/tiny

    SOURCE decides the direction. A Hugging Face folder has config.json and model.safetensors of an untied model with
    gated GELU; the checkpoint made of it can be fine-tuned, grown and trained on. What does not fit is refused.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint, run (its last good checkpoint is meant) or Hugging Face folder."""
    output: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    """Folder to create."""
    tokenizer_path: Path | None = None
    """Tokenizer folder for a Hugging Face source; without it, the source's own spiece.model or vocab.txt is adopted."""


def main(argv: list[str]) -> None:
    """Convert, and print the folder written and what to do with it."""
    args = tyro.cli(Convert, prog="t5pegasus convert", args=argv)
    from t5pegasus.convert.hf import export_hf, is_hf_folder, read_hf
    from t5pegasus.convert.imported import import_foreign, require_free, save_imported
    from t5pegasus.errors import UsageError

    if is_hf_folder(args.source):
        require_free(args.output)
        imported = import_foreign(read_hf(args.source), args.source / "config.json", args.tokenizer_path)
        path = save_imported(imported, args.output)
        if imported.num_padding_rows:
            print(f"left out: the last {imported.num_padding_rows} rows of the vocabulary, which belong to no token")
        print(f"tokenizer: {imported.tokenizer.kind}, {imported.tokenizer.vocab_size:,} tokens")
        print(f"checkpoint: {path}")
        print(f"next: t5pegasus finetune {path} --train-path PAIRS.jsonl --run-path runs/finetune")
        return
    if args.tokenizer_path is not None:
        raise UsageError(f"--tokenizer-path is for a Hugging Face source; {args.source} brings its own tokenizer")
    path = export_hf(args.source, args.output)
    print(f"Hugging Face folder: {path}, which transformers loads as MT5ForConditionalGeneration")
    print(f"next: (cd {shlex.quote(str(path))} && sha256sum --check SHA256SUMS)")
