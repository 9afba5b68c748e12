"""`t5pegasus build`: documents or pairs → training examples."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any, Literal

import tyro

from launch.command_line import StoragePath, parse_command_line
from t5pegasus.corpus.build import HELDOUT_FOLDER, BuildConfig, build_examples, describe_drops
from t5pegasus.data.shard_files import MANIFEST
from t5pegasus.json_files import read_json


@dataclasses.dataclass(frozen=True)
class Build:
    """Clean and deduplicate documents, make examples of them, shuffle these and write them as shards.

    For example: t5pegasus build corpus.jsonl.gz --tokenizer-path tokenizer --output-path examples

    Documents are .jsonl (key `text`), .txt (blank lines between documents) or .parquet files, pairs .jsonl (keys
    `text` and `summary`) or .tsv (title<TAB>text); .jsonl and .tsv also as .gz and .zst. A build that was stopped
    continues with the same command, and gives the same bytes.
    """

    inputs: tyro.conf.Positional[tuple[StoragePath, ...]]
    """Files to read; their order does not matter, but for which of equal documents is kept."""
    tokenizer_path: StoragePath
    """Folder written by `t5pegasus tokenizer train`."""
    output_path: StoragePath
    """Folder to write."""
    kind: Literal["pretrain", "pairs"] = "pretrain"
    """pretrain: make pseudo-summaries of documents; pairs: texts come with their summaries."""
    objective: Literal["pseudo-summary", "span-corruption"] = "pseudo-summary"
    """pseudo-summary: write the sentences that say most of a document; span-corruption: write the spans cut out of it,
    drawn anew in every epoch. Both together: two builds, and t5pegasus pretrain --data.mixture."""
    corruption_rate: float = 0.15
    """Of span corruption: the share of the tokens that is cut out."""
    mean_span_tokens: float = 3.0
    """Of span corruption: how many tokens are cut out in one place, on average."""
    max_source_tokens: int = 384
    """Longest source, with its special tokens; the rest is cut off."""
    max_target_tokens: int = 128
    """Longest target, with its end token. Documents are cut into chunks of 1.5 characters per token of both."""
    heldout_documents: int = 0
    """Documents kept apart for the held-out loss, in OUTPUT_PATH/heldout."""
    seed: int = 0
    """Of the order of the examples and the choice of held-out documents."""
    num_workers: int | None = None
    """Processes; default one per core. The result does not depend on it."""


def main(argv: list[str]) -> None:
    """Parse, build, print what came of it and the next command."""
    args = parse_command_line(Build, prog="t5pegasus build", args=argv)
    config = BuildConfig(
        kind=args.kind,
        objective=args.objective,
        corruption_rate=args.corruption_rate,
        mean_span_tokens=args.mean_span_tokens,
        max_source_tokens=args.max_source_tokens,
        max_target_tokens=args.max_target_tokens,
        heldout_documents=args.heldout_documents,
        seed=args.seed,
    )
    start = time.monotonic()
    is_new = build_examples(args.inputs, args.tokenizer_path, args.output_path, config, args.num_workers)
    seconds = time.monotonic() - start
    manifest = read_json(args.output_path / MANIFEST)
    print(format_statistics(manifest))
    warning = describe_drops(manifest["documents"])
    if warning:
        print(f"t5pegasus build: warning: {warning}", file=sys.stderr)
    if is_new:
        megabytes = manifest["documents"]["bytes"] / 1e6
        print(f"{megabytes:,.1f} MB of text in {seconds:.1f} s, {megabytes / seconds:.2f} MB/s")
        print(f"wrote {args.output_path}" + (f" and {_heldout(args)}" if args.heldout_documents else ""))
    else:
        print(f"{args.output_path} is complete already, from the same inputs and settings: nothing to do")
    if args.kind == "pretrain":
        print(f"next: t5pegasus pretrain small --examples-path {args.output_path} --run-path runs/small")
    else:
        print(f"next: t5pegasus finetune CHECKPOINT --examples-path {args.output_path} --run-path runs/finetuned")


def _heldout(args: Build) -> Path:
    return args.output_path / HELDOUT_FOLDER


def format_statistics(manifest: dict[str, Any]) -> str:
    """The manifest's account of documents, examples and tokens, as lines for people."""
    documents = manifest["documents"]
    num_tokens = manifest["num_source_tokens"] + manifest["num_target_tokens"]
    num_examples, shards = manifest["num_examples"], len(manifest["shards"])
    lines = [f"documents  {documents['read']:,} read, {documents['kept']:,} kept, {documents['heldout']:,} held out"]
    lines += [f"           {count:,} dropped: {reason}" for reason, count in documents["dropped"].items()]
    source = f"{manifest['num_source_tokens'] / num_examples:.1f} per {{}} (longest {manifest['max_source_tokens']})"
    target = f"{manifest['num_target_tokens'] / num_examples:.1f} per target (longest {manifest['max_target_tokens']})"
    unknown = f"{100 * manifest['num_unknown_tokens'] / num_tokens:.2f} % unknown"
    if corruption := manifest.get("corruption"):
        each = f"{source.format('text')}, of which {100 * corruption['rate']:g} % are cut out when a row is read"
    else:
        each = f"{source.format('source')}, {target}"
    lines += [
        f"examples   {num_examples:,} in {shards} {'shard' if shards == 1 else 'shards'}",
        f"tokens     {num_tokens:,}: {each}, {unknown}",
    ]
    return "\n".join(lines)
