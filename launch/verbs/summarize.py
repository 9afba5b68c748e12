"""`t5pegasus summarize`: summaries of documents, one JSON line each."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.generation import Generation, GenerationFlags

_PORTION_BATCHES = 16


@dataclasses.dataclass(frozen=True)
class Summarize:
    """Write a summary of every document as {"summary": …} to stdout, in their order; an "id" is kept.

    For example: echo '今天上午，新图书馆开馆。首日到馆读者超过三千人。' | t5pegasus summarize runs/title --num-beams 4

    With --num-return above 1 also the best so many, best first: {"summary": …, "candidates": [{"summary": …, "score":
    …}, …]}. Documents are JSON lines {"text": …} or plain text, one per line. A file is worked off in portions in
    which texts of similar length go together; stdin is answered batch by batch.
    """

    checkpoint: tyro.conf.Positional[StoragePath]
    """Checkpoint folder, or a run whose best or last good one is meant."""
    input: StoragePath = Path("-")
    """File of documents (also .gz, .zst), or - for stdin."""
    generation: Generation = dataclasses.field(default_factory=GenerationFlags)
    """How the summaries are written."""


def main(argv: list[str]) -> None:
    """Parse, load the parameters, summarize, portion by portion."""
    args = parse_command_line(Summarize, prog="t5pegasus summarize", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    from launch.staging import local_checkpoint
    from t5pegasus.progress import Progress

    summarizer = args.generation.load_summarizer(local_checkpoint(args.checkpoint))
    from_stdin = args.input == Path("-")
    portion = summarizer.batch_size * (1 if from_stdin else _PORTION_BATCHES)
    with Progress("summarize", unit="texts") as progress:
        for records in _portions(_read_records(args.input), portion):
            texts = [record["text"] for record in records]
            for record, summaries in zip(records, summarizer.summarize_n_best(texts, first_index=progress.done)):
                answer = {"id": record["id"]} if "id" in record else {}
                answer["summary"] = summaries[0].text
                if summarizer.options.num_return > 1:
                    answer["candidates"] = [{"summary": found.text, "score": found.score} for found in summaries]
                print(json.dumps(answer, ensure_ascii=False))
            sys.stdout.flush()
            progress.advance(len(records))


def _read_records(source: Path) -> Iterator[dict[str, Any]]:
    from t5pegasus.errors import DataError
    from t5pegasus.storage import fetch
    from t5pegasus.text.read import read_lines_or_json

    opened = sys.stdin.buffer if source == Path("-") else fetch(source)
    for number, record in enumerate(read_lines_or_json(opened), start=1):
        if not isinstance(record["text"], str):
            raise DataError(f'document {number}: "text" is {record["text"]!r}, a string was wanted')
        yield record


def _portions(records: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while portion := list(itertools.islice(records, size)):
        yield portion
