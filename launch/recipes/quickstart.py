"""The whole flow on the embedded sample: the very commands a user would type, one after the other.

Each of them finds its own work done or continues it, and so does the recipe.
"""

import importlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from launch.cli import Verb
from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info
from t5pegasus.json_files import read_json
from t5pegasus.sample import HELDOUT_PATH, TRAIN_PATH

GROW_AT_STEP = 60
LAST_STEP = 120
EPOCHS = 16
GROW_TO = "d_model=96,d_ff=256,num_heads=12,num_encoder_layers=3,num_decoder_layers=3"
NUM_SHOWN = 5


def run_quickstart(folder: Path) -> None:
    """Run every stage in `folder`, then print summaries, growth receipt, losses and the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    train_pairs = _write_titles(TRAIN_PATH, folder / "titles-train.jsonl")
    heldout_pairs = _write_titles(HELDOUT_PATH, folder / "titles-heldout.jsonl")
    tokenizer, examples, heldout = folder / "tokenizer", folder / "examples", folder / "heldout"
    small, grown, continued, finetuned = (folder / name for name in ("pretrained", "grown", "continued", "finetuned"))
    lengths = ["--max-source-tokens", 224, "--max-target-tokens", 72]
    training = ["--data.max-source-tokens", 224, "--data.max-target-tokens", 72, "--heldout-path", heldout]
    training += ["--model.dropout-rate", 0.1, "--train.evaluate-every-steps", 20, "--train.save-every-steps", 20]
    _run("tokenizer", "train", "--input", TRAIN_PATH, "--output-path", tokenizer, "--vocab-size", 4608)
    _run("build", TRAIN_PATH, "--tokenizer-path", tokenizer, "--output-path", examples, *lengths)
    _run("build", HELDOUT_PATH, "--tokenizer-path", tokenizer, "--output-path", heldout, *lengths)
    _run("pretrain", "tiny", "--examples-path", examples, "--run-path", small, *training,
         "--train.steps", GROW_AT_STEP)  # fmt: skip
    _run("grow", small, "--to", GROW_TO, "--examples-path", heldout, "--output-path", grown)
    _run("pretrain", "--start-from", grown, "--examples-path", examples, "--run-path", continued,
         "--heldout-path", heldout, "--train.steps", LAST_STEP)  # fmt: skip
    _run("finetune", continued, "--train-path", train_pairs, "--heldout-path", heldout_pairs,
         "--run-path", finetuned, "--epochs", EPOCHS, "--optimizer.learning-rate", 1e-3, "--train.batch-size", 16,
         "--train.evaluate-every-steps", 20)  # fmt: skip
    _run("evaluate", finetuned, "--pairs-path", heldout_pairs)
    report = folder / "report.html"
    _run("report", continued, finetuned, "--output", report)
    _print_summaries(finetuned / "summaries.jsonl")
    _print_growth(read_json(grown / "receipt.json"), continued)
    print(f"\nThe whole story, with curves and all settings: {report}")


def _run(verb: str, *arguments: Any) -> None:
    argv = [str(argument) for argument in arguments]
    print(f"\n$ t5pegasus {verb} {shlex.join(argv)}", file=sys.stderr, flush=True)
    importlib.import_module(Verb.module(verb)).main(argv)
    sys.stdout.flush()


def _write_titles(documents_path: Path, pairs_path: Path) -> Path:
    """The documents as pairs of text and title, the summarization task of the sample."""
    documents = [json.loads(line) for line in documents_path.read_text(encoding="utf-8").split("\n") if line]
    pairs = [json.dumps({"text": each["text"], "summary": each["title"]}, ensure_ascii=False) for each in documents]
    content = "".join(pair + "\n" for pair in pairs)
    if not pairs_path.exists() or pairs_path.read_text(encoding="utf-8") != content:
        pairs_path.write_text(content, encoding="utf-8")
    return pairs_path


def _print_summaries(summaries_path: Path) -> None:
    print("\nFive held-out documents and the titles the model wrote for them.")
    print("So small a model on so little text writes poorly: this shows that every stage works, not what it can reach.")
    for line in summaries_path.read_text(encoding="utf-8").split("\n")[:NUM_SHOWN]:
        record = json.loads(line)
        text = record["source"].replace("\n", "")
        print(f"\n  document   {text[:78]}…\n  reference  {record['reference']}\n  model      {record['summary']}")


def _print_growth(receipt: dict[str, Any], continued: Path) -> None:
    history = load_checkpoint_info(find_checkpoint(continued)).history
    found = receipt["logits"]["float32"]
    before, right_after = (entry["loss"] for entry in history if entry["step"] == GROW_AT_STEP)
    print(
        f"\ngrowth: {receipt['source_parameters']:,} → {receipt['grown_parameters']:,} parameters, "
        f"max |Δlogit| {found['maximum']:.1e}, ΔNLL {receipt['nll_difference']:+.1e}"
    )
    print(
        f"held-out loss: {before:.6f} before growth (step {GROW_AT_STEP}), {right_after:.6f} right after, "
        f"{history[-1]['loss']:.6f} after continuing (step {LAST_STEP})"
    )
