"""From raw Chinese documents to scored titles: every command, its wall time, and what the titles are worth.

Documents → tokenizer → examples → pretraining → growth → continuing → one pass over pairs whose summary stands in the
text, and titles → fine-tuning on abstracts and on articles with their titles → scores beside the lead baseline, the
peer that needs no training. The last columns say whether the titles depend on what was to be read.

    python benchmarks/real_result.py --data-path ../shared/data --output-path runs/real
"""

import argparse
import json
import platform
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from t5pegasus.evaluate import score_pairs
from t5pegasus.json_files import read_json
from t5pegasus.text.clean import clean_text
from t5pegasus.text.lines import read_texts
from t5pegasus.text.overlap import measure_copied_fraction
from t5pegasus.text.pseudo_summary import select_gap_sentences
from t5pegasus.text.sentences import chunk_sentences, split_sentences

LEFT_OUT = "niutrans"
"""The group whose rights were not checked."""
GROWN = "d_model=160,num_heads=5,d_ff=512,num_encoder_layers=4,num_decoder_layers=3"
SCORES = [f"t5-pegasus-rouge-{n}" for n in "12l"]


def main() -> None:
    """Run all of it and print two tables: stages, and scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True, help="pretrain_zh.jsonl.zst and summarization/")
    parser.add_argument("--output-path", type=Path, required=True)
    args = parser.parse_args()
    pairs, out = args.data_path / "summarization", args.output_path
    out.mkdir(parents=True, exist_ok=True)
    documents = [record for record in _read(args.data_path / "pretrain_zh.jsonl.zst") if record["group"] != LEFT_OUT]
    _write(out / "corpus.jsonl", documents)
    _write(out / "extracts.jsonl", make_extracts(record["text"] for record in documents))
    for task, count in (("csl", 200), ("lctt_title", 150)):
        _write(out / f"{task}_first.jsonl", islice(_read(pairs / f"{task}_dev.jsonl"), count))
    stages = [*pretraining(out), *fine_tuning(out, pairs), *evaluations(out, pairs)]
    seconds = [_run(stage) for stage in stages]
    print(f"\n{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    for stage, took in zip(stages, seconds):
        print(f"{took:8.1f} s  t5pegasus {stage}")
    receipt = read_json(out / "grown" / "receipt.json")
    found = receipt["logits"]["float32"]
    print(
        f"\ngrowth: max |Δlogit| {found['maximum']:.2e} ({found['ratio']:.2f} × the permutation "
        f"floor), ΔNLL {receipt['nll_difference']:+.1e} on {receipt['num_target_tokens']:,} tokens\n"
    )
    print("ROUGE-1/2/L by the package rouge 1.0.1; copied: characters in runs of two or more that the text has, too")
    for folder in sorted((out / "scores").iterdir()):
        print(describe(folder))


def pretraining(out: Path) -> list[str]:
    """Commands up to the pretrained, grown and continued model."""
    return [
        f"tokenizer train --input {out}/corpus.jsonl --output-path {out}/tokenizer --vocab-size 6000",
        f"build {out}/corpus.jsonl --tokenizer-path {out}/tokenizer --output-path {out}/examples "
        "--max-source-tokens 192 --max-target-tokens 64 --heldout-documents 60",
        f"pretrain tiny --examples-path {out}/examples --run-path {out}/pretrained --model.d-model 128 "
        "--model.d-kv 32 --model.num-heads 4 --model.d-ff 384 --model.num-encoder-layers 3 "
        "--model.num-decoder-layers 3 --data.max-source-tokens 192 --data.max-target-tokens 64 "
        "--optimizer.learning-rate 2e-3 --optimizer.warmup-steps 300 --train.batch-size 16 --train.steps 2500 "
        "--train.log-every-steps 50 --train.evaluate-every-steps 500 --train.save-every-steps 500",
        f"grow {out}/pretrained --to {GROWN} --examples-path {out}/examples --output-path {out}/grown",
        f"pretrain --start-from {out}/grown --examples-path {out}/examples --run-path {out}/continued "
        "--optimizer.decay-steps 400 --train.steps 3850 --train.evaluate-every-steps 250 --train.save-every-steps 50",
    ]


def fine_tuning(out: Path, pairs: Path) -> list[str]:
    """Commands from there to one model per task."""
    common = (
        "--data.max-source-tokens 192 --data.max-target-tokens 40 --train.batch-size 16 --optimizer.warmup-steps 50"
    )
    own = f"{common} --dropout-rate 0.1 --optimizer.schedule cosine --keep-best loss"
    titles = {"csl": pairs / "csl_train.jsonl", "lctt_title": pairs / "lctt_title_train.jsonl.gz"}
    return [
        f"build --kind pairs {out}/extracts.jsonl {titles['csl']} {titles['lctt_title']} --tokenizer-path "
        f"{out}/tokenizer --output-path {out}/mixed_examples --max-source-tokens 192 --max-target-tokens 40",
        f"finetune {out}/continued --examples-path {out}/mixed_examples --run-path {out}/mixed --epochs 1 {common} "
        "--optimizer.learning-rate 1e-3 --train.save-every-steps 100",
        f"finetune {out}/mixed --train-path {titles['csl']} --heldout-path {out}/csl_first.jsonl --run-path {out}/csl "
        f"--epochs 2 {own} --optimizer.learning-rate 3e-4 --train.evaluate-every-steps 70 --train.save-every-steps 70",
        f"finetune {out}/mixed --train-path {titles['lctt_title']} --heldout-path {out}/lctt_title_first.jsonl "
        f"--run-path {out}/lctt_title --epochs 2.5 {own} --optimizer.learning-rate 1e-3 "
        "--train.evaluate-every-steps 140 --train.save-every-steps 140",
    ]


def evaluations(out: Path, pairs: Path) -> list[str]:
    """Commands that score both models on dev and test, greedily and by beam search; and the page of curves."""
    return [
        *(
            f"evaluate {out}/{task} --pairs-path {pairs}/{task}_{part}.jsonl --num-beams {beams} "
            f"--output-path {out}/scores/{task}-{part}-{beams}"
            for task in ("csl", "lctt_title")
            for part in ("dev", "test")
            for beams in (1, 4)
        ),
        f"report {out}/continued {out}/csl --output {out}/report.html",
    ]


def make_extracts(texts: Iterable[str], max_summary_characters: int = 54) -> Iterator[dict[str, str]]:
    """One chunk of each text with the sentence of it that shares most with the rest, which stays where it is.

    PEGASUS left a fifth of its gap sentences in the source to teach copying (Zhang et al. 2020).
    """
    rng = random.Random(0)
    for text in texts:
        chunks = [
            chunk for chunk in chunk_sentences(split_sentences(clean_text(text)), 240) if sum(map(len, chunk)) <= 260
        ]
        rng.shuffle(chunks)
        for chunk in chunks[:1]:
            summary = chunk[select_gap_sentences(chunk, summary_rate=0.0)[0]].strip()
            if 8 <= len(summary) <= max_summary_characters:
                yield {"text": "".join(chunk), "summary": summary}


def describe(folder: Path) -> str:
    """The scores in one folder of `evaluate`, in one line: system, lead, and how the outputs hang on their texts.

    For the last two, every output is also laid beside the text and the reference half the file further on.
    """
    systems: Mapping[str, Any] = read_json(folder / "scores.json")["systems"]
    sources, references, outputs = (
        [record[side] for record in _read(folder / "summaries.jsonl")] for side in ("source", "reference", "summary")
    )
    half = len(outputs) // 2
    elsewhere = score_pairs(references[half:] + references[:half], outputs)["t5-pegasus-rouge-l"]
    own, other = (
        100 * sum(map(measure_copied_fraction, paired, outputs)) / len(outputs)
        for paired in (sources, sources[half:] + sources[:half])
    )
    cells = [
        f"{system} " + "/".join(f"{systems[system]['scores'][name]['value']:.2f}" for name in SCORES)
        for system in ("model", "lead")
    ]
    return (
        f"{folder.name:20}{cells[0]:26}{cells[1]:26}{len(set(outputs)):,} different outputs of {len(outputs):,}; "
        f"ROUGE-L to another reference {elsewhere:.2f}; "
        f"copied {own:.1f} % from the own text, {other:.1f} % from another one"
    )


def _read(path: Path) -> Iterator[dict[str, Any]]:
    dropped: Counter[str] = Counter()
    yield from (json.loads(line) for _, line in read_texts(path, dropped))
    if dropped:
        raise SystemExit(f"{path} has lines that cannot be read: {dict(dropped)}")


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _run(stage: str) -> float:
    print(f"\n$ t5pegasus {stage}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch.cli", *shlex.split(stage)], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
