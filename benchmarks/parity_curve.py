"""The same learning curve as Hugging Face: one model trained twice, here and by torch, from the same initial weights.

Same batches in the same order, same loss (mean cross-entropy per target token), gradients clipped to global norm 1,
AdamW with the learning rate of our schedule at every step, no dropout, one example per row (Hugging Face has no
segment ids). Two trajectories that differ by rounding drift apart sooner or later whoever computes them, so a third
run tells how soon: ours again, with every initial weight moved to a neighbouring float32 (a single rounding error,
where two implementations differ by rounding in every operation). The curves overlap if the losses differ by at most
1e-3 relative at every step, or by more only after the third run does. The same in float64, where rounding does not
hide anything: at most 1e-9 relative. Exit status 1 if one of the two does not hold.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/parity_curve.py --documents ../shared/data/pretrain_zh_small.jsonl.gz

Needs torch and transformers. Seconds per step are printed for information; this is a benchmark of agreement.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from torch.overrides import TorchFunctionMode

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig, write_json
from t5pegasus.convert.hf import model_to_hf_config
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.model.t5 import count_parameters, declare_parameters, init_parameters
from t5pegasus.presets import tiny
from t5pegasus.sample import HELDOUT_PATH, TRAIN_PATH
from t5pegasus.sharding import make_mesh
from t5pegasus.train.optimizer import make_schedule
from t5pegasus.train.run import fit_to_examples
from t5pegasus.train.state import start_state
from t5pegasus.train.step import make_heldout_loss, make_train_step, pure_train_step

OVERLAP, OVERLAP_FLOAT64 = 1e-3, 1e-9
HELDOUT_DOCUMENTS = 60
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Train both, print the table and the verdict, write every step to OUTPUT_PATH/curve.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="default: the embedded sample")
    parser.add_argument("--output-path", type=Path, default=Path("runs/parity-curve"))
    parser.add_argument("--vocab-size", type=int, help="default: 8000, of the embedded sample 4608")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--float64-steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=50, help="steps between rows of the table and held-out losses")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it tells at length that it does not tie the head, which is wanted
    transformers.logging.disable_progress_bar()
    examples, heldout = build_examples(args.documents, args.output_path, args.vocab_size)
    config = RunConfig(
        model=dataclasses.replace(tiny().model, d_model=128, d_kv=32, num_heads=4, d_ff=256),
        data=DataConfig(max_source_tokens=128, max_target_tokens=48, pack=False),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=args.steps // 8, decay_steps=args.steps // 5),
        train=TrainConfig(steps=args.steps, batch_size=16, z_loss=0.0),
    )
    with contextlib.ExitStack() as stack:
        ids = config.model.pad_token_id, config.model.decoder_start_token_id
        rows, heldout_rows = (stack.enter_context(PackedRows(path, config.data, *ids)) for path in (examples, heldout))
        config = fit_to_examples(config, rows.shards.manifest)
        print(
            f"torch {torch.__version__}, transformers {transformers.__version__}, jax {jax.__version__}; "
            f"{count_parameters(config.model):,} parameters, {rows.num_rows:,} rows of 128/48, batch 16"
        )
        held = list(load_epoch(heldout_rows, config.train.batch_size))
        good = compare_float32(config, rows, held, args.every, args.output_path / "curve.csv")
        good &= compare_float64(config, rows, args.float64_steps)
    sys.exit(0 if good else 1)


def build_examples(documents: Path | None, output_path: Path, vocab_size: int | None) -> tuple[Path, Path]:
    """Tokenizer and examples by the command a user would type; a build done before is found done."""

    def run(verb: str, *arguments: Any) -> None:
        importlib.import_module(f"launch.verbs.{verb}").main([str(argument) for argument in arguments])

    tokenizer, examples = output_path / "tokenizer", output_path / "examples"
    lengths = ["--tokenizer-path", tokenizer, "--max-source-tokens", 128, "--max-target-tokens", 48]
    size = vocab_size or (4608 if documents is None else 8000)
    run("tokenizer", "train", "--input", documents or TRAIN_PATH, "--output-path", tokenizer, "--vocab-size", size)
    if documents is None:
        run("build", TRAIN_PATH, "--output-path", examples, *lengths)
        run("build", HELDOUT_PATH, "--output-path", output_path / "heldout", *lengths)
        return examples, output_path / "heldout"
    run("build", documents, "--output-path", examples, "--heldout-documents", HELDOUT_DOCUMENTS, *lengths)
    return examples, examples / "heldout"


class Ours:
    """This package's training from given parameters."""

    def __init__(self, config: RunConfig, parameters: Arrays, train_step: Callable) -> None:
        self.train_step, self.seconds = train_step, []
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.heldout_loss = make_heldout_loss(config, mesh)
        placed = {name: jnp.array(value) for name, value in parameters.items()}
        self.state = start_state(placed, declare_parameters(config.model))
        self.config = config

    def update(self, batch: Batch) -> float:
        """One step; its loss before the update."""
        began = time.perf_counter()
        self.state, metrics = self.train_step(self.state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - began)
        return loss

    def heldout(self, batches: list[Batch]) -> float:
        """Mean loss per target token."""
        return self.heldout_loss(self.state.parameters, batches)["loss"]

    def tensors(self) -> Arrays:
        """Parameters by Hugging Face's names, float64; the conversion is a float32 one, so it takes two goes."""
        values = {name: np.asarray(value) for name, value in self.state.parameters.items()}
        rest = {name: value - value.astype(np.float32) for name, value in values.items()}
        high, low = (parameters_to_hf(part, self.config.model) for part in (values, rest))
        return {name: high[name].astype(np.float64) + low[name] for name in high}


class HuggingFace:
    """The same by MT5ForConditionalGeneration and torch.optim.AdamW."""

    def __init__(self, config: RunConfig, parameters: Arrays, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", model_to_hf_config(config.model))
            tensors = parameters_to_hf(parameters, config.model)
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.model = transformers.MT5ForConditionalGeneration.from_pretrained(folder).to(dtype).train()
        embedding, head = self.model.get_input_embeddings().weight, self.model.lm_head.weight
        if embedding.data_ptr() == head.data_ptr():
            raise RuntimeError("transformers has tied the head to the embedding: not the model that was meant")
        optimizer = config.optimizer
        parts = [
            {"params": [p for p in self.model.parameters() if p.ndim > 1], "weight_decay": optimizer.weight_decay},
            {"params": [p for p in self.model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        betas = optimizer.beta1, optimizer.beta2
        self.optimizer = torch.optim.AdamW(parts, betas=betas, eps=optimizer.epsilon)
        self.max_norm, self.schedule = optimizer.max_grad_norm, make_schedule(optimizer, config.train.steps)
        self.step, self.seconds = 0, []

    def loss(self, batch: Batch) -> torch.Tensor:
        """Hugging Face's own: mean cross-entropy over the targets."""
        return self.model(
            input_ids=torch.from_numpy(batch.encoder_input_tokens).long(),
            attention_mask=torch.from_numpy(batch.encoder_segment_ids > 0).long(),
            decoder_input_ids=torch.from_numpy(batch.decoder_input_tokens).long(),
            labels=torch.from_numpy(np.where(batch.decoder_loss_weights > 0, batch.decoder_target_tokens, -100)).long(),
        ).loss

    def update(self, batch: Batch) -> float:
        """One step; its loss before the update."""
        learning_rate = float(self.schedule(jnp.int32(self.step)))
        began = time.perf_counter()
        for part in self.optimizer.param_groups:
            part["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        # torch.nn.utils.clip_grad_norm_ adds 1e-6 to the norm, we 1e-9: clipped by hand, so that rounding is all.
        gradients = [p.grad for p in self.model.parameters()]
        scale = torch.clamp(self.max_norm / (torch.nn.utils.get_total_norm(gradients) + 1e-9), max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
        self.optimizer.step()
        self.step += 1
        self.seconds.append(time.perf_counter() - began)
        return loss.item()

    @torch.no_grad()
    def heldout(self, batches: list[Batch]) -> float:
        """Mean loss per target token."""
        counts = [float(batch.decoder_loss_weights.sum()) for batch in batches]
        return sum(self.loss(batch).item() * n for batch, n in zip(batches, counts)) / sum(counts)

    def tensors(self) -> Arrays:
        """Parameters by name, float64."""
        return {name: p.detach().double().numpy() for name, p in self.model.named_parameters()}


class KeepFloat64(TorchFunctionMode):
    """Hugging Face takes the variance of its norms in float32 whatever the model's dtype; here in float64, too."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
            return args[0]
        return function(*args, **(kwargs or {}))


def compare_float32(config: RunConfig, rows: PackedRows, held: list[Batch], every: int, csv_path: Path) -> bool:
    """The curves in float32, ours by the very step of `t5pegasus pretrain`; whether they overlap."""
    start = initial_parameters(config)
    train_step = make_train_step(config, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    ours, twin = Ours(config, start, train_step), Ours(config, neighbours(start), train_step)
    theirs = HuggingFace(config, start, torch.float32)
    print(
        "\nfloat32\n| step | loss, ours | Hugging Face | relative difference | ours twice | held-out, ours "
        "| Hugging Face | relative difference | parameters | ours twice |\n|" + " ---: |" * 10
    )
    curve = []
    for step, batch in numbered_batches(rows, config, config.train.steps):
        one, other, again = ours.update(batch), theirs.update(batch), twin.update(batch)
        curve.append((step, one, other, relative(one, other), relative(again, one)))
        if step == 1 or step % every == 0:
            held_ours, held_theirs = ours.heldout(held), theirs.heldout(held)
            print(
                f"| {step} | {one:.6f} | {other:.6f} | {curve[-1][3]:.1e} | {curve[-1][4]:.1e} | {held_ours:.6f} "
                f"| {held_theirs:.6f} | {relative(held_ours, held_theirs):.1e} "
                f"| {difference(ours.tensors(), theirs.tensors()):.1e} "
                f"| {difference(twin.tensors(), ours.tensors()):.1e} |",
                flush=True,
            )
    with csv_path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "ours", "hugging_face", "relative_difference", "ours_twice_relative_difference"])
        writer.writerows(curve)
    return judge_float32(curve, ours.seconds, theirs.seconds)


def judge_float32(curve: list[tuple], our_seconds: list[float], their_seconds: list[float]) -> bool:
    """Print what the curves come to."""
    between, floor = (np.array([row[column] for row in curve]) for column in (3, 4))

    def first_above(differences: np.ndarray) -> float:
        above = np.flatnonzero(~(differences <= OVERLAP))
        return curve[above[0]][0] if len(above) else math.inf

    print(f"\nlargest relative difference of the {len(curve)} losses: Hugging Face {between.max():.1e} at step "
          f"{curve[between.argmax()][0]}, ours twice {floor.max():.1e} at step {curve[floor.argmax()][0]}")  # fmt: skip
    print(f"first step above {OVERLAP:.0e}: Hugging Face {first_above(between)}, ours twice {first_above(floor)}")
    one, other = (float(np.median(seconds[1:])) for seconds in (our_seconds, their_seconds))
    print(f"median seconds per step, in turn on the same cores: ours {one:.3f}, Hugging Face {other:.3f}: "
          f"ratio {one / other:.2f}")  # fmt: skip
    overlap = first_above(between) == math.inf or first_above(between) >= first_above(floor)
    print("the curves overlap" if overlap else "THE CURVES DIFFER by more than rounding explains")
    return overlap


def compare_float64(config: RunConfig, rows: PackedRows, steps: int) -> bool:
    """Losses and parameters of a few steps in float64; whether they are the same."""
    start = {name: value.astype(np.float64) for name, value in initial_parameters(config).items()}
    with jax.enable_x64(True), KeepFloat64():
        specs = declare_parameters(config.model)
        ours = Ours(config, start, jax.jit(pure_train_step(config, specs, jnp.float64), donate_argnums=0))
        theirs = HuggingFace(config, start, torch.float64)
        batches = numbered_batches(rows, config, steps)
        largest = max(relative(ours.update(batch), theirs.update(batch)) for _, batch in batches)
        parameters = difference(ours.tensors(), theirs.tensors())
    same = largest <= OVERLAP_FLOAT64
    print(
        f"\nfloat64, {steps} steps: largest relative difference of the losses {largest:.1e}, of the parameters after "
        f"them {parameters:.1e}: " + ("the same function" if same else "NOT THE SAME FUNCTION")
    )
    return same


def initial_parameters(config: RunConfig) -> Arrays:
    """Those of a fresh run, float32."""
    return {name: np.asarray(value) for name, value in init_parameters(config.model, config.train.seed).items()}


def neighbours(parameters: Arrays) -> Arrays:
    """Every weight replaced by the next float32 above or below, by the toss of a coin."""
    random = np.random.default_rng(0)
    return {
        name: np.nextafter(value, np.where(random.random(value.shape) < 0.5, -np.inf, np.inf).astype(np.float32))
        for name, value in parameters.items()
    }


def numbered_batches(rows: PackedRows, config: RunConfig, steps: int) -> Iterator[tuple[int, Batch]]:
    """(1, first batch) … (steps, last batch) of the stream that a run with this config reads."""
    with contextlib.closing(load_batches(rows, config.train.batch_size, start_row=0)) as batches:
        yield from zip(range(1, steps + 1), batches)


def relative(one: float, other: float) -> float:
    """|one − other| / |other|."""
    return abs(one - other) / abs(other)


def difference(ours: Arrays, theirs: Arrays) -> float:
    """The largest |difference| of an entry relative to the largest entry of its tensor, over all tensors."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"tensors differ: {', '.join(sorted(ours.keys() ^ theirs.keys()))}")
    return max(float(np.max(np.abs(ours[name] - theirs[name])) / np.max(np.abs(theirs[name]))) for name in theirs)


if __name__ == "__main__":
    main()
