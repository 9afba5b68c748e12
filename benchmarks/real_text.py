"""The whole flow on real Chinese text: every command, its wall time and the figures it ends with.

Documents (jsonl.gz) → tokenizer → examples → short pretraining → growth → continuing → fine-tuning on abstracts and
their titles → scores beside the lead baseline, which is the peer here: a summarizer that needs no training at all.

    python benchmarks/real_text.py --data-path ../shared/data --output-path runs/real-text
"""

import argparse
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from t5pegasus.config import read_json

SIZES = "d_model=192,num_heads=6,d_ff=512,num_encoder_layers=4,num_decoder_layers=4"


def main() -> None:
    """Run the flow and print a table of stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--output-path", type=Path, required=True)
    parser.add_argument("--grow-at-step", type=int, default=600)
    parser.add_argument("--last-step", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=2.0)
    args = parser.parse_args()
    data, out = args.data_path, args.output_path
    out.mkdir(parents=True, exist_ok=True)
    corpus, csl = data / "pretrain_zh_small.jsonl.gz", data / "summarization"
    stages = [
        f"tokenizer train --input {corpus} --output-path {out}/tokenizer --vocab-size 16000",
        f"build {corpus} --tokenizer-path {out}/tokenizer --output-path {out}/examples --heldout-documents 200",
        f"pretrain tiny --examples-path {out}/examples --run-path {out}/pretrained --model.d-model 128 "
        "--model.d-kv 32 --model.num-heads 4 --model.d-ff 384 --model.num-encoder-layers 3 "
        "--model.num-decoder-layers 3 --data.max-source-tokens 384 --data.max-target-tokens 128 "
        f"--train.steps {args.grow_at_step} --train.evaluate-every-steps 200 --train.save-every-steps 200",
        f"grow {out}/pretrained --to {SIZES} --examples-path {out}/examples --output-path {out}/grown",
        f"pretrain --start-from {out}/grown --examples-path {out}/examples --run-path {out}/continued "
        f"--train.steps {args.last_step}",
        f"finetune {out}/continued --train-path {csl}/csl_train.jsonl --heldout-path {csl}/csl_dev.jsonl "
        f"--run-path {out}/finetuned --epochs {args.epochs} --data.max-source-tokens 512 "
        "--data.max-target-tokens 80 --train.batch-size 8 --optimizer.learning-rate 1e-3",
        f"evaluate {out}/finetuned --pairs-path {csl}/csl_dev.jsonl --max-new-tokens 40",
        f"report {out}/continued {out}/finetuned --output {out}/report.html",
    ]
    seconds = [_run(stage) for stage in stages]
    print(f"\n{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    for stage, took in zip(stages, seconds):
        print(f"{took:8.1f} s  t5pegasus {stage.split(' --')[0]}")
    receipt, scores = read_json(out / "grown" / "receipt.json"), read_json(out / "finetuned" / "scores.json")
    print(
        f"\ngrowth: max |Δlogit| {receipt['max_logit_difference']:.2e} ({receipt['floor_ratio']:.2f} × the permutation "
        f"floor), ΔNLL {receipt['nll_difference']:+.1e} on {receipt['num_target_tokens']:,} tokens"
    )
    model, lead = (scores["systems"][system]["scores"]["rouge-l"]["value"] for system in ("model", "lead"))
    print(f"CSL dev: loss {scores['heldout_loss']:.4f}, ROUGE-L {model:.2f}, lead {lead:.2f}: ratio {model / lead:.2f}")


def _run(stage: str) -> float:
    print(f"\n$ t5pegasus {stage}", flush=True)
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "launch.cli", *shlex.split(stage)], check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
