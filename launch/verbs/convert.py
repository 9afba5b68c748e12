"""`t5pegasus convert`: models of other programs become checkpoints, checkpoints Hugging Face folders."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.staging import local_source, staged_output
from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.json_files import write_json
from t5pegasus.storage import fetch

if TYPE_CHECKING:
    from t5pegasus.convert.imported import Imported

RETOKENIZED = "retokenize.json"


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn another program's T5 into a checkpoint, or a checkpoint into a Hugging Face folder.

    For example:
      t5pegasus convert runs/title title-hf
      t5pegasus convert t5-pegasus-port t5-pegasus --numerics bert4keras
      t5pegasus convert --check chinese_t5_pegasus_base --text articles.jsonl
      t5pegasus convert mt5-base t5-zh --retokenize tokenizer

    SOURCE decides the direction. Read are Hugging Face folders of T5, T5.1.1 and mT5, bert4keras folders of T5 PEGASUS,
    and T5X checkpoints; a checkpoint made of them can be fine-tuned, grown and trained on. What our model would not
    compute in the same way is refused by name, and so is an export that would lose something.
    """

    source: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Checkpoint, run (its best or last good checkpoint is meant), or model of another program."""
    output: Annotated[StoragePath | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")] = None
    """Folder to create; none with --check."""
    tokenizer_path: StoragePath | None = None
    """Tokenizer folder of a foreign source; without it, the spiece.model or vocab.txt beside it is adopted."""
    numerics: Literal["hf-mt5", "bert4keras", "t5-1.0"] | None = None
    """What a Hugging Face folder was trained with, where its config.json is not to be believed: ports of T5 PEGASUS
    are bert4keras. The special ids are then the tokenizer's."""
    lossy: bool = False
    """Export also what Hugging Face's code cannot compute in the same way; the model card then says so."""
    retokenize: StoragePath | None = None
    """Tokenizer folder: OUTPUT is a checkpoint with its vocabulary, rows of embedding and head made of the old ones."""
    check: bool = False
    """Write nothing; print what SOURCE is, and its cross-entropy on a text."""
    text: StoragePath | None = None
    """Documents or pairs to check on (jsonl, txt, parquet; pairs also tsv); the embedded sample if not given."""
    max_examples: int = 64
    """Examples to check on at most."""
    batch_size: int = 8
    """Rows per batch of the check."""

    def __post_init__(self) -> None:
        for name in ("max_examples", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
            if not self.check and getattr(self, name) != getattr(type(self), name):
                raise UsageError(f"{name}={getattr(self, name)} is of the check; give --check, too, or leave it out")
        if self.check and self.output is not None:
            raise UsageError(f"OUTPUT {self.output} is given, but --check writes nothing; leave one of them out")
        if not self.check and self.output is None:
            raise UsageError("OUTPUT is missing, the folder to create; or give --check to look only")
        if self.text is not None and not self.check:
            raise UsageError(f"--text {self.text} is what --check measures on; give --check, too")
        if self.lossy and (self.check or self.retokenize is not None):
            raise UsageError("--lossy is for an export; neither --check nor --retokenize makes one: leave it out")
        if self.check and self.retokenize is not None:
            raise UsageError("--retokenize writes a checkpoint, --check nothing; retokenize first, then check OUTPUT")


def main(argv: list[str]) -> None:
    """Convert, retokenize or check, and print what was made and what to do with it."""
    args = _bring_here(parse_command_line(Convert, prog="t5pegasus convert", args=argv))
    if args.check:
        _check(args)
    elif args.retokenize is not None:
        _retokenize(args, args.retokenize)
    elif _is_foreign(args):
        _import(args)
    else:
        _export(args)


def _bring_here(args: Convert) -> Convert:
    """The same conversion of local copies, where something is read from a store."""
    given = {name: getattr(args, name) for name in ("tokenizer_path", "retokenize", "text")}
    fetched = {name: fetch(path) for name, path in given.items() if path is not None}
    return dataclasses.replace(args, source=local_source(args.source), **fetched)


def _output(args: Convert) -> Path:
    from t5pegasus.convert.imported import require_free

    assert args.output is not None  # __post_init__ has seen to it
    require_free(args.output)
    return args.output


def _is_foreign(args: Convert) -> bool:
    """Whether the source is another program's; flags for such sources are refused with one of ours."""
    from t5pegasus.convert.sources import is_foreign

    if is_foreign(args.source):
        return True
    for flag, given in (("--tokenizer-path", args.tokenizer_path), ("--numerics", args.numerics)):
        if given is not None:
            raise UsageError(f"{flag} is for a foreign source; {args.source} brings its own, leave it out")
    return False


def _load(args: Convert) -> tuple["Imported", RunConfig, str]:
    """The source in memory, its config, and what it is."""
    from t5pegasus.convert.imported import import_foreign, load_imported
    from t5pegasus.convert.sources import describe_kind, open_source

    if not _is_foreign(args):
        imported, info = load_imported(args.source)
        return imported, info.config, f"checkpoint of step {info.step:,}"
    foreign, where = open_source(args.source, args.numerics)
    imported = import_foreign(foreign, where, args.tokenizer_path, ids_of_tokenizer=args.numerics is not None)
    for sentence in imported.assumed:
        print(f"assumed: {sentence}")
    if imported.num_padding_rows:
        print(f"left out: the last {imported.num_padding_rows} rows of the vocabulary, which belong to no token")
    return imported, RunConfig(model=imported.model), describe_kind(args.source)


def _import(args: Convert) -> None:
    from t5pegasus.convert.imported import save_imported

    output = _output(args)
    if args.lossy:
        raise UsageError(f"--lossy is for an export; {args.source} is read, and nothing of it is lost: leave it out")
    imported, _, kind = _load(args)
    with staged_output(output) as made:
        save_imported(imported, made)
    path = output
    tokenizer = imported.tokenizer
    print(f"read: {kind}, numerics {imported.model.numerics}")
    print(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    print(f"checkpoint: {path}")
    print(f"next: t5pegasus convert --check {shlex.quote(str(path))}")
    print(f"then: t5pegasus finetune {shlex.quote(str(path))} --train-path PAIRS.jsonl --run-path runs/finetune")


def _export(args: Convert) -> None:
    from t5pegasus.convert.hf import export_hf

    output = _output(args)
    with staged_output(output) as made:
        export_hf(args.source, made, lossy=args.lossy)
    path = shlex.quote(str(output))
    print(f"Hugging Face folder: {path}; its README.md says how transformers loads it")
    print(f"next: (cd {path} && sha256sum --check SHA256SUMS)")


def _retokenize(args: Convert, tokenizer_path: Path) -> None:
    from t5pegasus.convert.imported import save_imported
    from t5pegasus.convert.retokenize import retokenize
    from t5pegasus.text.tokenizer import load_tokenizer

    output = _output(args)
    tokenizer = load_tokenizer(tokenizer_path)
    imported, config, kind = _load(args)
    changed, mapped = retokenize(imported, tokenizer)
    print(
        f"{kind}: {imported.tokenizer.kind} {imported.tokenizer.vocab_size:,} → {tokenizer.kind} "
        f"{tokenizer.vocab_size:,} tokens"
    )
    print(mapped.to_table())
    with staged_output(output) as made:
        save_imported(changed, made, config, lambda folder: write_json(folder / RETOKENIZED, mapped.to_json()))
    path = output
    print(f"checkpoint: {path}; all unknown tokens stand in {RETOKENIZED}")
    print(f"next: t5pegasus convert --check {shlex.quote(str(path))}")


def _check(args: Convert) -> None:
    from t5pegasus.evaluate.check import check_model, make_examples

    imported, config, kind = _load(args)
    examples, of_what = make_examples(imported, config, args.text, args.max_examples)
    print(check_model(kind, imported, config, examples, of_what, args.batch_size).to_table())
