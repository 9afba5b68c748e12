"""The same learning curve as Hugging Face: one model trained here and by torch from the same initial weights.

Same batches in the same order, same loss (mean cross-entropy per target token), gradients clipped to global norm 1,
AdamW with the learning rate of our schedule at every step, no dropout, one example per row (Hugging Face has no
segment ids). Two laws are checked, and the exit status is 1 if one does not hold:

- float64: the losses are at most 1e-9 relative apart in the first 30 steps, and 1e-3 in all: the same mathematics;
- float32: they are at most 1e-3 apart in all steps, or by more only after rounding alone has done as much, which is
  seen twice: in ours trained once more with every initial weight moved to a neighbouring float32 ("twin"), and in
  Hugging Face's own float32 losses beside its float64 ones.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/parity_curve.py --documents ../shared/data/pretrain_zh_small.jsonl.gz

Needs torch and transformers. Seconds per step are for information: agreement is measured here, not speed.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import math
import platform
import sys
import tempfile
import time
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
from t5pegasus.config import DataConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.convert.hf import model_to_hf_config
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.data.loader import PackedRows, load_batches, load_epoch
from t5pegasus.json_files import write_json
from t5pegasus.model.t5 import count_parameters, declare_parameters, init_parameters
from t5pegasus.presets import tiny
from t5pegasus.sample import TRAIN_PATH
from t5pegasus.sharding import make_mesh
from t5pegasus.train.data_sources import fit_to_examples
from t5pegasus.train.heldout_loss import make_heldout_loss
from t5pegasus.train.state import start_state
from t5pegasus.train.step import make_train_step, pure_train_step

OVERLAP, OVERLAP_FLOAT64, FLOAT64_STEPS = 1e-3, 1e-9, 30
LENGTHS = {"max_source_tokens": 96, "max_target_tokens": 32}
PAIRS = {
    "apart": ("ours", "hf"),
    "twin from ours": ("twin", "ours"),
    "ours from its float64": ("ours", "ours_float64"),
    "HF from its float64": ("hf", "hf_float64"),
    "float64: apart": ("ours_float64", "hf_float64"),
}
"""What is compared, by its heading."""
Arrays = dict[str, np.ndarray]


def main() -> None:
    """Train all, print tables and verdicts, write every step's losses to OUTPUT_PATH/curve.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="default: the embedded sample")
    parser.add_argument("--output-path", type=Path, default=Path("runs/parity-curve"))
    parser.add_argument("--vocab-size", type=int, default=4608)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--every", type=int, default=40, help="steps between rows of the tables")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it tells at length that it does not tie the head, which is wanted
    transformers.logging.disable_progress_bar()
    examples, heldout = build_examples(args.documents, args.output_path, args.vocab_size)
    config = RunConfig(
        model=dataclasses.replace(tiny().model, d_model=128, d_kv=32, num_heads=4, d_ff=256),
        data=DataConfig(**LENGTHS, pack=False),
        optimizer=OptimizerConfig(
            learning_rate=args.learning_rate, warmup_steps=args.steps // 8, decay_steps=args.steps // 5
        ),
        train=TrainConfig(steps=args.steps, batch_size=16, z_loss=0.0),
    )
    with contextlib.ExitStack() as stack:
        ids = config.model.pad_token_id, config.model.decoder_start_token_id
        rows, heldout_rows = (stack.enter_context(PackedRows(path, config.data, *ids)) for path in (examples, heldout))
        config = fit_to_examples(config, rows.shards.manifest)
        held = list(itertools.islice(load_epoch(heldout_rows, 16), 16))
        print(f"Python {platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, transformers "
              f"{transformers.__version__}; {count_parameters(config.model):,} parameters, {rows.num_rows:,} rows, "
              f"{held_tokens(held):,.0f} held-out target tokens")  # fmt: skip
        sys.exit(0 if compare(config, rows, held, args.every, args.output_path / "curve.csv") else 1)


def build_examples(documents: Path | None, output_path: Path, vocab_size: int) -> tuple[Path, Path]:
    """Tokenizer and examples by the command a user would type; a build done before is found done."""

    def run(verb: str, *arguments: Any) -> None:
        importlib.import_module(f"launch.verbs.{verb}").main([str(argument) for argument in arguments])

    tokenizer, examples = output_path / "tokenizer", output_path / "examples"
    flags = [part for name, value in LENGTHS.items() for part in (f"--{name.replace('_', '-')}", value)]
    flags += ["--tokenizer-path", tokenizer]
    texts = documents or TRAIN_PATH
    run("tokenizer", "train", "--input", texts, "--output-path", tokenizer, "--vocab-size", vocab_size)
    run("build", texts, "--output-path", examples, "--heldout-documents", 60, *flags)
    return examples, examples / "heldout"


class Ours:
    """This package's training from given parameters; in float32 by the very step of `t5pegasus pretrain`."""

    def __init__(self, config: RunConfig, parameters: Arrays, *, wide: bool = False) -> None:
        self.config, self.wide, self.seconds = config, wide, []
        specs = declare_parameters(config.model)
        mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
        self.heldout_loss = make_heldout_loss(config, mesh)
        self.train_step = make_train_step(config, mesh)
        if wide:
            self.train_step = jax.jit(pure_train_step(config, specs, jnp.float64), donate_argnums=0)
        dtype = jnp.float64 if wide else jnp.float32
        with jax.enable_x64(wide):
            self.state = start_state({name: jnp.array(value, dtype) for name, value in parameters.items()}, specs)

    def update(self, batch: Batch) -> float:
        """One step; its loss before the update."""
        began = time.perf_counter()
        with jax.enable_x64(self.wide):
            self.state, metrics = self.train_step(self.state, batch)
            jax.block_until_ready(self.state)
            loss, self.learning_rate = float(metrics["loss"]), float(metrics["learning_rate"])
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

    def __init__(self, config: RunConfig, parameters: Arrays, *, wide: bool = False) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", model_to_hf_config(config.model))
            tensors = parameters_to_hf(parameters, config.model)
            save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.model = transformers.MT5ForConditionalGeneration.from_pretrained(folder).train()
        if wide:
            self.model.double()
        embedding, head = self.model.get_input_embeddings().weight, self.model.lm_head.weight
        if embedding.data_ptr() == head.data_ptr():
            raise RuntimeError("transformers has tied the head to the embedding: not the model that was meant")
        kernels, gains = ([p for p in self.model.parameters() if (p.ndim == 1) == gain] for gain in (False, True))
        parts = [
            {"params": kernels, "weight_decay": config.optimizer.weight_decay},
            {"params": gains, "weight_decay": 0.0},
        ]
        betas = config.optimizer.momentum, config.optimizer.beta2
        self.optimizer = torch.optim.AdamW(parts, betas=betas, eps=config.optimizer.epsilon)
        self.max_norm, self.wide, self.seconds = config.optimizer.max_grad_norm, wide, []

    def loss(self, batch: Batch) -> torch.Tensor:
        """Hugging Face's own: mean cross-entropy over the targets."""
        labels = np.where(batch.decoder_loss_weights > 0, batch.decoder_target_tokens, -100)
        with KeepFloat64() if self.wide else contextlib.nullcontext():
            return self.model(
                input_ids=torch.from_numpy(batch.encoder_input_tokens).long(),
                attention_mask=torch.from_numpy(batch.encoder_segment_ids > 0).long(),
                decoder_input_ids=torch.from_numpy(batch.decoder_input_tokens).long(),
                labels=torch.from_numpy(labels).long(),
            ).loss

    def update(self, batch: Batch, learning_rate: float) -> float:
        """One step; its loss before the update."""
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
        self.seconds.append(time.perf_counter() - began)
        return loss.item()

    @torch.no_grad()
    def heldout(self, batches: list[Batch]) -> float:
        """Mean loss per target token."""
        return sum(self.loss(batch).item() * held_tokens([batch]) for batch in batches) / held_tokens(batches)

    def tensors(self) -> Arrays:
        """Parameters by name, float64."""
        return {name: p.detach().double().numpy() for name, p in self.model.named_parameters()}


class KeepFloat64(TorchFunctionMode):
    """Hugging Face takes the variance of its norms in float32 even in a float64 model; here in float64, then."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.to and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
            return args[0]
        return function(*args, **(kwargs or {}))


def compare(config: RunConfig, rows: PackedRows, held: list[Batch], every: int, csv_path: Path) -> bool:
    """Train all five side by side; whether both laws hold."""
    start = {name: np.asarray(value) for name, value in init_parameters(config.model, config.train.seed).items()}
    ours, twin, ours_wide = Ours(config, start), Ours(config, neighbours(start)), Ours(config, start, wide=True)
    theirs, theirs_wide = HuggingFace(config, start), HuggingFace(config, start, wide=True)
    curve, held_rows = [], []
    with contextlib.closing(load_batches(rows, config.train.batch_size, start_row=0)) as batches:
        for step, batch in zip(range(1, config.train.steps + 1), batches):
            losses = {"step": step, "ours": ours.update(batch), "twin": twin.update(batch)}
            losses |= {"hf": theirs.update(batch, ours.learning_rate), "ours_float64": ours_wide.update(batch)}
            curve.append(losses | {"hf_float64": theirs_wide.update(batch, ours_wide.learning_rate)})
            if step == 1 or step % every == 0:
                pairs = (ours, theirs), (twin, ours), (ours_wide, theirs_wide)
                parameters = (difference(one.tensors(), other.tensors()) for one, other in pairs)
                held_rows.append((step, ours.heldout(held), theirs.heldout(held), *parameters))
                print(f"step {step}: {losses}", file=sys.stderr, flush=True)
    np.savetxt(csv_path, [[*row.values()] for row in curve], "%.17g", ",", header=",".join(curve[0]), comments="")
    print_tables(curve, held_rows)
    one, other = (float(np.median(run.seconds[1:])) for run in (ours, theirs))
    print(f"\nmedian seconds per float32 step: ours {one:.3f}, Hugging Face {other:.3f}, ratio {one / other:.2f}")
    return judge(curve)


def print_tables(curve: list[dict], held_rows: list[tuple]) -> None:
    """Losses and how they differ at the chosen steps; then held-out losses and parameters."""
    print(f"\n| step | loss, ours | Hugging Face | {' | '.join(PAIRS)} |\n|{' ---: |' * 8}")
    for row in (curve[held_row[0] - 1] for held_row in held_rows):
        apart = " | ".join(f"{relative(row[one], row[other]):.1e}" for one, other in PAIRS.values())
        print(f"| {row['step']} | {row['ours']:.6f} | {row['hf']:.6f} | {apart} |")
    largest = (max(relative(row[one], row[other]) for row in curve) for one, other in PAIRS.values())
    print(f"| largest of {len(curve)} | | | {' | '.join(f'{value:.1e}' for value in largest)} |")
    print(f"| first above {OVERLAP:.0e} | | | {' | '.join(str(first_above(curve, pair)) for pair in PAIRS)} |\n")
    headings = "step | held-out loss, ours | Hugging Face | apart | parameters: apart | twin from ours | float64: apart"
    print(f"| {headings} |\n|{' ---: |' * 7}")
    for step, one, other, *apart in held_rows:
        parameters = " | ".join(f"{value:.1e}" for value in apart)
        print(f"| {step} | {one:.6f} | {other:.6f} | {relative(one, other):.1e} | {parameters} |")


def judge(curve: list[dict]) -> bool:
    """Print and return whether both laws hold."""
    rounding = min(first_above(curve, "twin from ours"), first_above(curve, "HF from its float64"))
    overlap = first_above(curve, "apart") >= rounding
    apart = [relative(row["ours_float64"], row["hf_float64"]) for row in curve]
    same = max(apart[:FLOAT64_STEPS]) <= OVERLAP_FLOAT64 and max(apart) <= OVERLAP
    print(f"float64, first {FLOAT64_STEPS} steps at most {max(apart[:FLOAT64_STEPS]):.1e}, all {max(apart):.1e} apart: "
          + ("the same" if same else "NOT THE SAME"))  # fmt: skip
    print("float32: the curves overlap" if overlap else "float32: THE CURVES DIFFER by more than rounding explains")
    return overlap and same


def first_above(curve: list[dict], pair: str) -> float:
    """The first step at which they are further apart than curves that overlap, inf if there is none."""
    one, other = PAIRS[pair]
    return next((row["step"] for row in curve if not relative(row[one], row[other]) <= OVERLAP), math.inf)


def neighbours(parameters: Arrays) -> Arrays:
    """Every weight replaced by the next float32 above or below, by the toss of a coin."""
    random = np.random.default_rng(0)
    return {
        name: np.nextafter(value, np.where(random.random(value.shape) < 0.5, -np.inf, np.inf).astype(np.float32))
        for name, value in parameters.items()
    }


def held_tokens(batches: list[Batch]) -> float:
    """Target tokens of these batches."""
    return float(sum(batch.decoder_loss_weights.sum() for batch in batches))


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
