"""`t5pegasus grow`: turn a checkpoint into a larger one that computes the same."""

import dataclasses
import difflib
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from t5pegasus.config import ModelConfig
from t5pegasus.errors import UsageError
from t5pegasus.presets import PRESETS, preset

if TYPE_CHECKING:
    from growth.plan import GrowthPlan


@dataclasses.dataclass(frozen=True)
class Grow:
    """Turn a checkpoint into a larger one that computes the same, and print the receipt that it does.

    For example: t5pegasus grow runs/tiny --to d_model=96,num_encoder_layers=4 --output-path grown

    Sizes come from a preset (--to large), from a list (--to d_model=96,d_ff=256), from flags (--d-model 96), or from
    several of them, the flags deciding. What is named nowhere stays, as do vocabulary, token ids and dropout.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A checkpoint folder, or a run, whose best or last good checkpoint is meant."""
    output_path: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Folder to create; default is the run's or checkpoint's name with -grown."""
    to: str | None = None
    """A preset (small, base, large, xl), or field=size pairs joined by commas."""
    d_model: int | None = None
    """Width of the residual stream; any larger number."""
    d_ff: int | None = None
    """Feed-forward units."""
    num_heads: int | None = None
    """Attention heads."""
    d_kv: int | None = None
    """Entries per head."""
    num_encoder_layers: int | None = None
    """Encoder layers."""
    num_decoder_layers: int | None = None
    """Decoder layers."""
    examples_path: Path | None = None
    """Examples to compare the two models on, their `heldout` folder if there is one; default is random tokens."""
    seed: int = 0
    """Of the new random entries."""


def main(argv: list[str]) -> None:
    """Parse, grow, print plan, receipt, path and what to do next."""
    args = tyro.cli(Grow, prog="t5pegasus grow", args=argv)
    start = time.monotonic()
    from growth.grow import grow_checkpoint
    from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info

    checkpoint = find_checkpoint(args.checkpoint)
    info = load_checkpoint_info(checkpoint)
    target = choose_target(info.config.model, args.to, {field: getattr(args, field) for field in growing_fields()})
    output_path = args.output_path or default_output_path(args.checkpoint)
    done = grow_checkpoint(checkpoint, target, output_path, seed=args.seed, examples_path=args.examples_path)
    print(format_plan(done.plan))
    took = "made before" if done.already_there else f"{time.monotonic() - start:.1f} s"
    print(f"receipt: {done.receipt}, {done.receipt.grown_bytes:,} bytes, {took}")
    print(f"checkpoint: {done.path}" + (" (already grown by this plan, nothing to do)" if done.already_there else ""))
    print(f"next: {_next_command(done.path, args.examples_path or find_examples(checkpoint), info.step)}")


def growing_fields() -> tuple[str, ...]:
    """The config fields that this verb can enlarge, named by its flags."""
    return tuple(field.name for field in dataclasses.fields(Grow) if field.name in ModelConfig.__dataclass_fields__)


def choose_target(source: ModelConfig, to: str | None, flags: dict[str, int | None]) -> ModelConfig:
    """The config to reach: the source's, with the sizes of `to`, then those of the flags that were given.

    Raises:
        UsageError: if `to` is neither a preset nor a list of sizes, or nothing was given.
    """
    given = {field: size for field, size in flags.items() if size is not None}
    if to is None and not given:
        raise UsageError(
            "nothing says how large to grow; give --to PRESET, --to d_model=96,… or flags like --d-model 96"
        )
    sizes = {} if to is None else _read_sizes(to, tuple(flags))
    return dataclasses.replace(source, **{**sizes, **given})


def default_output_path(checkpoint: Path) -> Path:
    """Beside the run, under its name with `-grown`; for a lone checkpoint beside that."""
    named = checkpoint.resolve()
    if named.parent.name == "checkpoints":
        named = named.parent.parent
    return named.with_name(named.name + "-grown")


def find_examples(checkpoint: Path) -> Path | None:
    """The examples of the run that a checkpoint belongs to, None for a lone checkpoint."""
    from t5pegasus.train.run import load_run_record

    record = load_run_record(checkpoint.parent.parent) if checkpoint.parent.name == "checkpoints" else None
    return None if record is None or record[1]["examples_path"] is None else Path(record[1]["examples_path"])


def _next_command(grown: Path, examples_path: Path | None, step: int) -> str:
    """How to train on: as many updates again, since steps go on being counted."""
    examples = "EXAMPLES" if examples_path is None else shlex.quote(str(examples_path))
    start, run = shlex.quote(str(grown)), shlex.quote(f"{grown}-run")
    steps = f" --train.steps {2 * step}" if step else ""
    return f"t5pegasus pretrain --start-from {start} --examples-path {examples} --run-path {run}{steps}"


def format_plan(plan: "GrowthPlan") -> str:
    """The plan as a table: field, sizes, what is promised, how."""
    lines = [
        f"  {each.field:<18} {each.source:>6} → {each.target:<6} {each.function_class}  {each.rule}; "
        f"set in motion by: {each.breaker}"
        for each in plan.fields
    ]
    return "\n".join([f"plan {plan.hash[:12]} (seed {plan.seed}; B: bitwise, R: up to rounding)", *lines])


def _read_sizes(to: str, fields: tuple[str, ...]) -> dict[str, int]:
    if "=" not in to:
        model = preset(to).model
        return {field: getattr(model, field) for field in fields}
    sizes = {}
    for pair in to.split(","):
        field, _, size = (part.strip() for part in pair.partition("="))
        if field not in fields:
            near = difflib.get_close_matches(field, fields, n=1)
            raise UsageError(
                f"--to {to}: {field!r} cannot be grown; "
                + (f"perhaps you meant {near[0]!r}" if near else f"choose among {', '.join(fields)}")
                + f", or give a preset ({', '.join(PRESETS)})"
            )
        if not size.isdecimal():
            raise UsageError(f"--to {to}: {field}={size!r} is not a whole number; write {field}=96, say")
        sizes[field] = int(size)
    return sizes
