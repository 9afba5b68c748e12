"""`t5pegasus pseudo-summary`: look at the examples that documents turn into."""

import dataclasses
import json
import sys

from launch.command_line import StoragePath, parse_command_line
from t5pegasus.errors import DataError
from t5pegasus.storage import fetch
from t5pegasus.text.clean import clean_text
from t5pegasus.text.pseudo_summary import make_pseudo_summary
from t5pegasus.text.read import read_lines_or_json
from t5pegasus.text.sentences import MAX_SENTENCE_CHARACTERS, MIN_CHUNK_SENTENCES, chunk_sentences, split_sentences


@dataclasses.dataclass(frozen=True)
class PseudoSummary:
    """Show which sentences become the target of each document.

    For example: t5pegasus pseudo-summary --input corpus.jsonl.gz | head -n 3

    Reads a document per line and writes a JSON line {"source", "target", "target_sentences"} per chunk of up to
    768 characters. The sentences of the target are cut out of the source; joined they are the target.
    """

    input: StoragePath | None = None
    """JSON lines with the key `text`, or plain lines; also .gz and .zst. Default: stdin."""


def main(argv: list[str]) -> None:
    """Parse, and write the chunks of each document."""
    args = parse_command_line(PseudoSummary, prog="t5pegasus pseudo-summary", args=argv)
    num_documents = num_without = 0
    for record in read_lines_or_json(fetch(args.input) if args.input else sys.stdin.buffer):
        if not isinstance(record["text"], str):
            raise DataError(f"text must be a string, got {record['text']!r}")
        num_chunks = 0
        for sentences in chunk_sentences(split_sentences(clean_text(record["text"]))):
            num_chunks += 1
            example = make_pseudo_summary(sentences)
            line = {
                "source": example.source,
                "target": example.target,
                "target_sentences": [sentences[index] for index in example.target_indices],
            }
            sys.stdout.buffer.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        sys.stdout.buffer.flush()
        num_documents += 1
        num_without += not num_chunks
    without = (
        f"{num_without:,} of {num_documents:,} documents gave nothing, having fewer than {MIN_CHUNK_SENTENCES} "
        f"sentences (of up to {MAX_SENTENCE_CHARACTERS} characters, ended by 。 or a line end)"
    )
    if num_without == num_documents > 0:
        raise DataError(f"{without}; give longer documents")
    if num_without:
        print(f"t5pegasus pseudo-summary: {without}", file=sys.stderr)
