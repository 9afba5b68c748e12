"""`t5pegasus evaluate`: held-out loss, ROUGE and the lead baseline on pairs, as a table and as JSON."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import tyro


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on pairs of text and summary: jsonl {text, summary} or lines title<TAB>text (.tsv).

    For example: t5pegasus evaluate runs/title --pairs-path dev.jsonl --num-beams 4

    Prints a table, and writes scores.json and summaries.jsonl (source, reference, summary of every pair).
    """

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, or a run whose last good one is meant."""
    pairs_path: Path
    """Pairs (.jsonl, .tsv, .gz and .zst of them)."""
    max_examples: int | None = None
    """Use only so many pairs, the first ones."""
    num_beams: int = 1
    """Hypotheses of beam search; 1 takes the likeliest token at each step."""
    length_penalty: float = 1.0
    """Beam scores are Σ log p / length ** length_penalty; more gives longer summaries."""
    max_new_tokens: int | None = None
    """Tokens of a summary at most; as many as the checkpoint was trained on."""
    batch_size: int = 16
    """Texts per batch."""
    output_path: Path | None = None
    """Folder for the two files; the run the checkpoint belongs to, else CHECKPOINT.scores beside it."""

    def __post_init__(self) -> None:
        from t5pegasus.errors import UsageError

        if self.max_examples is not None and self.max_examples < 1:
            raise UsageError(f"max_examples={self.max_examples} must be at least 1")


def main(argv: list[str]) -> None:
    """Parse, load the parameters, evaluate, print the table and where the files lie."""
    args = tyro.cli(Evaluate, prog="t5pegasus evaluate", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    folder = evaluate(args)
    print(f"\nscores: {folder / 'scores.json'}   summaries: {folder / 'summaries.jsonl'}")
    if (folder / "metrics.jsonl").is_file():
        print(f"next: t5pegasus report {folder}")
    else:
        print(f"next: t5pegasus summarize {args.checkpoint} --input TEXTS")


def evaluate(args: Evaluate) -> Path:
    """Evaluate, print the table, and return the folder that holds the results."""
    from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info
    from t5pegasus.corpus.pairs import read_pairs
    from t5pegasus.evaluate.checkpoint import evaluate_checkpoint, save_evaluation
    from t5pegasus.generate.options import GenerationOptions
    from t5pegasus.generate.summarize import load_summarizer

    checkpoint = find_checkpoint(args.checkpoint)
    limit = args.max_new_tokens
    if limit is None:
        limit = load_checkpoint_info(checkpoint).config.data.max_target_tokens
    options = GenerationOptions(limit, num_beams=args.num_beams, length_penalty=args.length_penalty)
    summarizer = load_summarizer(checkpoint, options, batch_size=args.batch_size)
    dropped: Counter[str] = Counter()
    pairs = itertools.islice(read_pairs([args.pairs_path], dropped), args.max_examples)
    scores, records = evaluate_checkpoint(checkpoint, summarizer, pairs, dropped)
    folder = args.output_path or find_output_folder(checkpoint)
    save_evaluation(folder, scores, records)
    print(scores.to_table())
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
