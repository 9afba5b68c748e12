"""`t5pegasus evaluate`: held-out loss, ROUGE, BLEU and the lead baseline on pairs, as a table and as JSON."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.generation import Generation, GenerationFlags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a checkpoint, or summaries that are there already, on pairs of text and summary.

    For example: t5pegasus evaluate runs/title --pairs-path dev.jsonl --num-beams 4

    Or: t5pegasus evaluate --summaries written.jsonl --pairs-path dev.jsonl

    Prints scores with their bootstrap intervals beside the lead baseline, and writes scores.json and summaries.jsonl
    (source, reference, summary and scores of every pair); t5pegasus report makes a page of them.
    """

    checkpoint: Annotated[tyro.conf.Positional[StoragePath | None], tyro.conf.arg(metavar="[CHECKPOINT]")] = None
    """Checkpoint folder, or a run whose best or last good one is meant."""
    pairs_path: StoragePath
    """Pairs: jsonl {text, summary} or lines title<TAB>text (.jsonl, .tsv, .gz and .zst of them)."""
    summaries: StoragePath | None = None
    """Score these instead: JSON lines {"summary": …} or lines of text in the order of the pairs, or with their "id"."""
    max_examples: int | None = None
    """Use only so many pairs, the first ones."""
    num_resamples: int = 1000
    """Of the pairs, for the bootstrap intervals."""
    output_path: StoragePath | None = None
    """Folder for the two files; the run the checkpoint belongs to, else CHECKPOINT.scores (SUMMARIES.scores) beside."""

    generation: Generation = dataclasses.field(default_factory=GenerationFlags)
    """How the checkpoint writes them; with --num-return above 1 the best of so many candidates is scored, too."""

    def __post_init__(self) -> None:
        from t5pegasus.errors import UsageError

        if (self.checkpoint is None) == (self.summaries is None):
            raise UsageError(
                "evaluate wants either a checkpoint or --summaries: one of "
                "t5pegasus evaluate runs/title --pairs-path dev.jsonl and "
                "t5pegasus evaluate --summaries written.jsonl --pairs-path dev.jsonl"
            )
        if self.summaries is not None and self.generation != GenerationFlags():
            raise UsageError(
                f"--summaries {self.summaries} scores what is written; the flags of how to write, such as num_beams, "
                "are for a checkpoint: leave them out"
            )
        if self.output_path is not None and self.output_path.is_file():
            raise UsageError(
                f"output {self.output_path} is a file, a folder was wanted; give the folder for both files"
            )
        if self.max_examples is not None and self.max_examples < 1:
            raise UsageError(f"max_examples={self.max_examples} must be at least 1")


def main(argv: list[str]) -> None:
    """Parse, evaluate, print the table and where the files lie."""
    args = parse_command_line(Evaluate, prog="t5pegasus evaluate", args=argv)
    folder = evaluate(args)
    print(f"\nscores: {folder / 'scores.json'}   summaries: {folder / 'summaries.jsonl'}")
    print(f"next: t5pegasus report {folder}")


def evaluate(args: Evaluate) -> Path:
    """Evaluate, print the table, and return the folder that holds the results."""
    from t5pegasus.corpus.pairs import check_pair_paths, read_pairs
    from t5pegasus.evaluate.bootstrap import Bootstrap
    from t5pegasus.evaluate.results import save_evaluation
    from t5pegasus.evaluate.table import format_scores
    from t5pegasus.storage import fetch, is_remote

    bootstrap = Bootstrap(args.num_resamples)
    dropped: Counter[str] = Counter()
    documents = read_pairs(check_pair_paths([fetch(args.pairs_path)]), dropped)
    given: dict[str, Any] = {"pairs_path": args.pairs_path, "bootstrap": bootstrap}
    if args.summaries is not None:
        from t5pegasus.evaluate.summaries import evaluate_summaries

        summaries = fetch(args.summaries)
        scores, records = evaluate_summaries(summaries, list(documents), dropped, args.max_examples, **given)
        folder = args.summaries.with_name(f"{args.summaries.name}.scores")
    else:
        assert args.checkpoint is not None
        from launch.processes import init_distributed

        init_distributed()
        from launch.staging import local_checkpoint
        from t5pegasus.evaluate.checkpoint import evaluate_checkpoint

        checkpoint = local_checkpoint(args.checkpoint)
        summarizer = args.generation.load_summarizer(checkpoint)
        first_documents = itertools.islice(documents, args.max_examples)
        scores, records = evaluate_checkpoint(checkpoint, summarizer, first_documents, dropped, **given)
        if is_remote(args.checkpoint):
            is_run = (args.checkpoint / "checkpoints").is_dir()
            folder = args.checkpoint if is_run else find_output_folder(args.checkpoint)
            scores = dataclasses.replace(scores, checkpoint=str(args.checkpoint))
        else:
            folder = find_output_folder(checkpoint)
    folder = args.output_path or folder
    save_evaluation(folder, scores, records)
    print(format_scores(scores))
    return folder


def find_output_folder(checkpoint: Path) -> Path:
    """The run folder of RUN/checkpoints/STEP; of any other checkpoint, a folder beside it.

    Nothing is written into a checkpoint: its manifest lists every file.
    """
    if not checkpoint.parent.name:  # "." or a name without its folder
        checkpoint = checkpoint.absolute()
    if checkpoint.parent.name == "checkpoints":
        return checkpoint.parent.parent
    return checkpoint.with_name(f"{checkpoint.name}.scores")
