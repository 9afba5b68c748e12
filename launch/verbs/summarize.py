"""`t5pegasus summarize`: summaries of documents, one JSON line each."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

_PORTION_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Summarize:
    """Write a summary of every document as {"summary": …} to stdout, in their order; an "id" is kept.

    For example: echo '今天上午，新图书馆开馆。首日到馆读者超过三千人。' | t5pegasus summarize runs/title --num-beams 4

    With --num-return above 1 also the best so many, best first: {"summary": …, "candidates": [{"summary": …, "score":
    …}, …]}. Documents are JSON lines {"text": …} or plain text, one per line. A file is worked off in portions in
    which texts of similar length go together; stdin is answered batch by batch.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint folder, or a run whose last good one is meant."""
    input: Path = Path("-")
    """File of documents (also .gz, .zst), or - for stdin."""
    num_beams: int = 1
    """Hypotheses of beam search; 1 takes the likeliest token at each step."""
    finalisation: Literal["exact", "huggingface", "huggingface-early", "huggingface-never", "bert4keras"] = "exact"
    """How beam search ends: exact when nothing can become better any more; or as in transformers with early_stopping
    False (huggingface), True (-early) or "never" (-never); or as in bert4keras, when the best hypothesis ends."""
    length_penalty: float = 1.0
    """Scores are Σ log p / length ** length_penalty; in beam search more gives longer summaries."""
    max_new_tokens: int | None = None
    """Tokens of a summary at most; as many as the checkpoint was trained on."""
    min_new_tokens: int = 0
    """Tokens of a summary at least, the end token not counted."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice in a summary; 0 allows all."""
    prefix: str = ""
    """What every summary begins with."""
    temperature: float = 0.0
    """Above 0, tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that have this probability together."""
    seed: int = 0
    """Of the drawing."""
    num_return: int = 1
    """Summaries of a document: the best of num_beams hypotheses, or as many drawn ones."""
    max_source_tokens: int | None = None
    """Tokens of a document that are read, the rest is cut off; as many as the checkpoint was trained on. More is
    possible (T5 has no longest input), but the model has not learned from such."""
    batch_size: int = 16
    """Texts per batch."""


def main(argv: list[str]) -> None:
    """Parse, load the parameters, summarize, portion by portion."""
    args = tyro.cli(Summarize, prog="t5pegasus summarize", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    from t5pegasus.checkpoint import find_checkpoint
    from t5pegasus.generate.summarize import load_summarizer
    from t5pegasus.progress import Progress

    checkpoint = find_checkpoint(args.checkpoint)
    options = _choose_options(args, checkpoint)
    summarizer = load_summarizer(
        checkpoint,
        options,
        max_source_tokens=args.max_source_tokens,
        batch_size=args.batch_size,
        prefix=args.prefix,
    )
    from_stdin = args.input == Path("-")
    portion = args.batch_size * (1 if from_stdin else _PORTION_BATCHES)
    with Progress("summarize", unit="texts") as progress:
        for records in _portions(_read_records(args.input), portion):
            texts = [record["text"] for record in records]
            for record, summaries in zip(records, summarizer.summarize_n_best(texts, first_index=progress.done)):
                answer = {"id": record["id"]} if "id" in record else {}
                answer["summary"] = summaries[0].text
                if options.num_return > 1:
                    answer["candidates"] = [{"summary": found.text, "score": found.score} for found in summaries]
                print(json.dumps(answer, ensure_ascii=False))
            sys.stdout.flush()
            progress.advance(len(records))


def _choose_options(args: Summarize, checkpoint: Path) -> Any:
    from t5pegasus.checkpoint import load_checkpoint_info
    from t5pegasus.generate.options import GenerationOptions

    names = {field.name for field in dataclasses.fields(GenerationOptions)} - {"max_new_tokens"}
    chosen = {name: getattr(args, name) for name in names}
    if args.max_new_tokens is None:
        chosen["max_new_tokens"] = load_checkpoint_info(checkpoint).config.data.max_target_tokens
    else:
        chosen["max_new_tokens"] = args.max_new_tokens
    return GenerationOptions(**chosen)


def _read_records(source: Path) -> Iterator[dict[str, Any]]:
    from t5pegasus.errors import DataError
    from t5pegasus.text.read import read_lines_or_json

    for number, record in enumerate(read_lines_or_json(sys.stdin.buffer if source == Path("-") else source), start=1):
        if not isinstance(record["text"], str):
            raise DataError(f'document {number}: "text" is {record["text"]!r}, a string was wanted')
        yield record


def _portions(records: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while portion := list(itertools.islice(records, size)):
        yield portion
