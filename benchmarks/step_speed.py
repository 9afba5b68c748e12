"""Training speed on a CPU beside Hugging Face: one step of T5-PEGASUS small here and of MT5 in torch, in turn.

Both sides train the same 95,262,080 parameters from the same initial values in float32 with AdamW, gradients clipped
to norm 1, and dropout, each in a process of its own with all cores. They take turns of a few steps, so that whatever
else the machine does meets both. The first step of a turn is not counted: while a process waits for the other one, a
virtual machine gives memory that it freed back to its host, which never happens in training.

The scores are positions per second of full rows, 8 x 256/64, and, with --documents, tokens per second without
padding: ours from packed rows, theirs from batches of 8 examples of about equal length, padded to the longest.

    python benchmarks/step_speed.py --documents ../shared/data/pretrain_zh_small.jsonl.gz

Needs torch and transformers. The exit status is 1 if a ratio is below its bar: 1.0 for full rows, 1.3 for documents.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROWS, SOURCE, TARGET, VOCABULARY = 8, 256, 64, 50_000
BARS = {"full rows": 1.0, "documents": 1.3}
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def main() -> None:
    """Measure what was asked for, print tables and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="default: full rows only")
    parser.add_argument("--kind", choices=("pretrain", "pairs"), default="pretrain", help="what the documents are")
    parser.add_argument("--vocabulary", type=Path, help="a vocab.txt of 50,000 entries; default: train one")
    parser.add_argument("--output-path", type=Path, default=Path("runs/step-speed"), help="tokenizer and examples")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each side per table")
    parser.add_argument("--steps", type=int, default=4, help="of a turn that count")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0])
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--examples", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        serve(args.side, args.dropout[0], args.examples, args.rounds * (args.steps + 1))
        return
    missed = []
    for dropout in args.dropout:
        missed += compare("full rows", dropout, None, args.rounds, args.steps)
    if args.documents:
        examples = build_examples(args.documents, args.kind, args.vocabulary, args.output_path)
        missed += compare("documents", args.dropout[0], examples, args.rounds, args.steps)
    sys.exit(1 if missed else 0)


def build_examples(documents: Path, kind: str, vocabulary: Path | None, output_path: Path) -> Path:
    """Tokenizer and examples by the command a user would type; a build done before is found done."""

    def run(verb: str, *arguments: Any) -> None:
        importlib.import_module(f"launch.verbs.{verb}").main([str(argument) for argument in arguments])

    tokenizer, examples = output_path / "tokenizer", output_path / "examples"
    lengths = ("--max-source-tokens", SOURCE, "--max-target-tokens", TARGET)
    texts = ("--from-vocabulary", vocabulary) if vocabulary else ("--input", documents, "--vocab-size", VOCABULARY)
    run("tokenizer", "train", *texts, "--output-path", tokenizer)
    run("build", documents, "--kind", kind, "--output-path", examples, "--tokenizer-path", tokenizer, *lengths)
    return examples


def compare(what: str, dropout: float, examples: Path | None, rounds: int, num_steps: int) -> list[str]:
    """Let both sides take steps in turn; what missed its bar."""
    sides = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, "--side", side, "--dropout", str(dropout)]
        command += ["--rounds", str(rounds), "--steps", str(num_steps)]
        command += ["--examples", str(examples)] if examples else []
        environment = {**os.environ, **HUGE_PAGES}
        sides[side] = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )  # fmt: skip
    ready = {side: ask(process) for side, process in sides.items()}
    print(f"{what}, dropout {dropout}: " + "; ".join(f"{side} {line['about']}" for side, line in ready.items()))
    taken: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, process in sides.items():
            taken[side] += [ask(process, "step") for _ in range(num_steps + 1)][1:]
    for process in sides.values():
        process.communicate()
    speeds = {}
    for side, steps in taken.items():
        seconds = [step["seconds"] for step in steps]
        speeds[side] = sum(step["tokens"] for step in steps) / sum(seconds)
        if examples is None:  # the same work in every step, so the median is free of what else the machine did
            speeds[side] = steps[0]["tokens"] / statistics.median(seconds)
        print(
            f"  {side:<7} {speeds[side]:7.0f} tokens/s; seconds per step: median {statistics.median(seconds):.2f}, "
            f"{min(seconds):.2f} to {max(seconds):.2f}, "
            f"processor time {statistics.median(step['cpu'] for step in steps):.2f}; "
            f"{sum(step['tokens'] for step in steps) / sum(step['positions'] for step in steps):.0%} of positions full"
        )
    ratio = speeds["ours"] / speeds["theirs"]
    print(f"  ratio {ratio:.2f}, the bar is {BARS[what]:.1f}; load {os.getloadavg()[0]:.1f}", flush=True)
    return [what] if ratio < BARS[what] else []


def ask(process: subprocess.Popen, line: str = "") -> dict[str, Any]:
    """Send a line, if any, and read the answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{' '.join(map(str, process.args))} ended with status {process.wait()}")
    return json.loads(answer)


def serve(side: str, dropout: float, examples: Path | None, num_steps: int) -> None:
    """One side: a warm step, then a step for every line read."""
    from t5pegasus.config import DataConfig, MeshConfig, RunConfig, TrainConfig
    from t5pegasus.presets import small

    config = RunConfig(
        model=dataclasses.replace(small().model, vocab_size=VOCABULARY, dropout_rate=dropout),
        data=DataConfig(SOURCE, TARGET),
        mesh=MeshConfig(data=1),
        train=TrainConfig(batch_size=ROWS),
    )
    batches = full_rows() if examples is None else documents(side, config, examples, num_steps)
    take_step, about = (our_step if side == "ours" else their_step)(config)
    take_step(next(batches))
    print(json.dumps({"about": about}), flush=True)
    for _ in sys.stdin:
        batch = next(batches)
        began, cpu_began = time.perf_counter(), time.process_time()
        take_step(batch)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        masks = batch.encoder_segment_ids > 0, batch.decoder_segment_ids > 0
        counts = {"tokens": int(sum(m.sum() for m in masks)), "positions": sum(m.size for m in masks)}
        print(json.dumps({"seconds": seconds, "cpu": cpu, **counts}), flush=True)


def full_rows() -> Iterator[Any]:
    """One batch without padding, for ever."""
    from t5pegasus.batch import Batch

    random = np.random.default_rng(0)
    source, target = (random.integers(103, VOCABULARY, (ROWS, n), dtype=np.int32) for n in (SOURCE, TARGET))
    ones = [np.ones_like(side) for side in (source, target)]
    places = [np.tile(np.arange(side.shape[1], dtype=np.int32), (ROWS, 1)) for side in (source, target)]
    return itertools.repeat(
        Batch(
            source, ones[0], places[0], np.roll(target, 1, axis=1), target, ones[1].astype(np.float32), ones[1],
            places[1], np.arange(ROWS, dtype=np.uint32),
        )
    )  # fmt: skip


def documents(side: str, config: Any, examples: Path, num_steps: int) -> Iterator[Any]:
    """Our rows are packed, in the order of a run; theirs hold one example each, batches spread evenly over lengths."""
    from t5pegasus.data.loader import PackedRows, load_batches

    data = config.data if side == "ours" else dataclasses.replace(config.data, pack=False)
    rows = PackedRows(examples, data, config.model.pad_token_id, config.model.decoder_start_token_id)
    if side == "ours":
        yield from load_batches(rows, ROWS, 0)
        return
    lengths = np.load(examples / "lengths.npy")
    batches = np.argsort(lengths.sum(axis=1), kind="stable")[: len(lengths) // ROWS * ROWS].reshape(-1, ROWS)
    shares = (np.arange(num_steps + 1) + 0.5) / (num_steps + 1)
    chosen = batches[(shares * len(batches)).astype(int)]
    for numbers in np.random.default_rng(0).permutation(chosen):
        batch = rows.ordered_batch(numbers)
        source, target = (np.max(np.sum(ids > 0, axis=1)) for ids in (batch[1], batch[6]))
        yield batch._replace(
            **{
                name: array[:, : source if name.startswith("encoder") else target]
                for name, array in batch._asdict().items()
                if getattr(array, "ndim", 0) == 2
            }
        )


def our_step(config: Any) -> tuple[Any, str]:
    """A function that trains on a batch, and what it is made of."""
    import jax

    from t5pegasus.model.t5 import count_parameters
    from t5pegasus.sharding import make_mesh, place_batch
    from t5pegasus.train.estimate import abstract_batch, abstract_state
    from t5pegasus.train.state import init_state
    from t5pegasus.train.step import make_train_step

    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_state(config.model, 0, mesh, config.optimizer)
    compiled = make_train_step(config, mesh).compile(abstract_state(config, mesh), abstract_batch(config, mesh))
    fill = np.zeros(ROWS, np.int32)

    def take_step(batch: Any) -> None:
        nonlocal state
        if batch.source_ids is None:
            batch = batch._replace(source_ids=fill, num_bad_examples=fill)
        state, _ = compiled(state, place_batch(batch, np.arange(ROWS), ROWS, mesh))
        jax.block_until_ready(state)

    return take_step, f"jax {jax.__version__}, {count_parameters(config.model):,} parameters"


def their_step(config: Any) -> tuple[Any, str]:
    """The same by MT5ForConditionalGeneration and torch.optim.AdamW, fused as in transformers' Trainer."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    from t5pegasus.convert.hf import model_to_hf_config
    from t5pegasus.convert.hf_tensors import parameters_to_hf
    from t5pegasus.model.t5 import init_parameters

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        description = {**model_to_hf_config(config.model), "dropout_rate": config.model.dropout_rate}
        (Path(folder) / "config.json").write_text(json.dumps(description), encoding="utf-8")
        parameters = {name: np.asarray(value) for name, value in init_parameters(config.model, 0).items()}
        tensors = parameters_to_hf(parameters, config.model)
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = transformers.MT5ForConditionalGeneration.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def take_step(batch: Any) -> None:
        labels = np.where(batch.decoder_loss_weights > 0, batch.decoder_target_tokens, -100)
        optimizer.zero_grad()
        loss = model(
            input_ids=torch.from_numpy(np.ascontiguousarray(batch.encoder_input_tokens)).long(),
            attention_mask=torch.from_numpy(batch.encoder_segment_ids > 0).long(),
            decoder_input_ids=torch.from_numpy(np.ascontiguousarray(batch.decoder_input_tokens)).long(),
            labels=torch.from_numpy(labels).long(),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    count = sum(parameter.numel() for parameter in model.parameters())
    kernel = model.config._attn_implementation
    return (
        take_step,
        f"torch {torch.__version__}, transformers {transformers.__version__}, {kernel}, {count:,} parameters",
    )


if __name__ == "__main__":
    print(f"Python {platform.python_version()}", file=sys.stderr)
    main()
