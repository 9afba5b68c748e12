"""`t5pegasus grow`: turn a checkpoint into a larger one that computes the same."""

import dataclasses
import difflib
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from launch.command_line import StoragePath, parse_command_line
from launch.staging import local_source, staged_output
from t5pegasus.config import ModelConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.json_files import read_json
from t5pegasus.presets import PRESETS, preset
from t5pegasus.storage import is_remote, open_path

if TYPE_CHECKING:
    from growth.choices import Choices

WHOLE_STATE = ("parameters", "first_moment", "second_moment")


@dataclasses.dataclass(frozen=True)
class Grow:
    """Turn a checkpoint into a larger one that computes the same, and print the receipt that it does.

    For example:
      t5pegasus grow runs/tiny grown --to d_model=96,num_encoder_layers=4
      t5pegasus grow runs/base grown --to large --plan plan.json --explain
      t5pegasus grow mt5-small-folder mt5-grown-folder --to d_ff=2048
      t5pegasus grow runs/base grown --add-tokens words.txt

    Sizes come from a preset (--to large), from a list (--to d_model=96,d_ff=256), from flags (--d-model 96), or from
    several of them, the flags deciding. What is named nowhere stays, as do token ids and dropout. A Hugging Face
    folder of T5 or mT5 becomes a larger Hugging Face folder.
    """

    checkpoint: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint folder, a run, whose best or last good checkpoint is meant, or a Hugging Face folder; with --explain
    also a preset."""
    output: Annotated[StoragePath | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")] = None
    """Folder to create; default is the run's, checkpoint's or folder's name with -grown."""
    output_path: Annotated[StoragePath | None, tyro.conf.arg(metavar="PATH")] = None
    """The same, as a flag."""
    to: str | None = None
    """A preset (small, base, large, xl), or field=size pairs joined by commas."""
    plan: Path | None = None
    """JSON file that says how: {"axes": {"embed": "pad", "*.mlp": {"operator": "duplicate", "first_share": 0.7}, …},
    "seed", "noise", "state", "dynamics", "learning_rate", "refactor", "learned"} (docs/growth.md)."""
    explain: bool = False
    """Print the plan as a table, with what it will take, and write nothing."""
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
    relative_attention_boundaries: tuple[int, ...] | None = None
    """Distances from which the last bucket of relative positions is split, e.g. 256 512 1024; with those there are."""
    add_tokens: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Tokens to add to the vocabulary, one per line; each begins as the mean of the pieces it was read as before. To a
    wordpiece vocabulary Han words of jieba's dictionary can be added, to a sentencepiece one any."""
    masked: bool = False
    """With --add-tokens: the new tokens have no probability until --open-tokens, so that not one logit changes."""
    open_tokens: bool = False
    """Open the masked tokens."""
    examples_path: StoragePath | None = None
    """Examples to compare the two models on, their `heldout` folder if there is one; default is random tokens."""
    receipt: Literal["full", "logits", "arrays"] = "full"
    """How much is measured before the checkpoint gets its name: all; no gradients and updates, which takes less
    memory; or arrays only, which takes that of the largest one (--explain says how much)."""
    seed: int | None = None
    """Of the new random entries; default is the plan's, or 0."""


def main(argv: list[str]) -> None:
    """Parse, grow, print plan, receipt, path and what to do next."""
    args = parse_command_line(Grow, prog="t5pegasus grow", args=argv)
    if args.output is not None and args.output_path is not None:
        raise UsageError(f"OUTPUT is given twice, as {args.output} and --output-path {args.output_path}; leave one out")
    if args.masked and args.add_tokens is None:
        raise UsageError("--masked goes with --add-tokens FILE: only new tokens can be masked")
    if args.explain:
        print(_explain(args))
        return
    from launch.processes import init_distributed, is_one_of_several
    from t5pegasus.convert.sources import is_foreign

    init_distributed()
    output = _output_path(args)
    if is_remote(output) and is_one_of_several():
        raise UsageError(
            f"output {output}: several processes grow into a folder that all of them see, which a store is not; "
            "choose such a folder, or start it without launch"
        )
    args = dataclasses.replace(args, checkpoint=local_source(args.checkpoint))
    if is_foreign(args.checkpoint):
        if is_one_of_several():
            raise UsageError(
                f"{args.checkpoint} is a Hugging Face folder, which is grown by one process; start it without launch"
            )
        _grow_hugging_face(args, output)
    else:
        _grow(args, output)


def _grow_hugging_face(args: Grow, output: Path) -> None:
    from growth.explain import explain
    from launch.recipes.grow_hugging_face import grow_hugging_face

    if args.examples_path is not None:
        raise UsageError(
            f"--examples-path {args.examples_path} goes with a checkpoint, whose tokenizer it shares; leave it out, or "
            "make a checkpoint of the folder first: t5pegasus convert"
        )
    if args.masked:
        raise UsageError(
            f"--masked: {args.checkpoint} grows into a folder for transformers, which knows no masked tokens; leave it "
            "out, or make a checkpoint of the folder first: t5pegasus convert"
        )
    with staged_output(output) as made:
        done, _ = grow_hugging_face(
            args.checkpoint,
            made,
            lambda model: _aim(args, model),
            tokens=_read_tokens(args),
            receipt=args.receipt,
        )
    print(explain(done.growth, ["parameters"]))
    print(f"receipt: {done.receipt}")
    print(f"Hugging Face folder: {output}; its README.md says how transformers loads it")
    print(f"next: t5pegasus convert --check {shlex.quote(str(output))}")


def _grow(args: Grow, output: Path) -> None:
    start = time.monotonic()
    from growth.evidence import expect_evidence
    from growth.explain import explain
    from growth.grow import grow_checkpoint
    from t5pegasus.checkpoint import find_checkpoint, load_checkpoint_info

    checkpoint = find_checkpoint(args.checkpoint)
    info = load_checkpoint_info(checkpoint)
    target, choices = _aim(args, info.config.model)
    with staged_output(output, resumes=True) as made:
        done = grow_checkpoint(
            checkpoint,
            target,
            made,
            choices=choices,
            examples_path=args.examples_path,
            receipt=args.receipt,
            tokens=_read_tokens(args),
            masked=args.masked,
        )
    evidence = expect_evidence(info.config.data, with_examples=args.examples_path is not None)
    print(explain(done.growth, list_groups(checkpoint), evidence))
    took = "made before" if done.already_there else f"{time.monotonic() - start:.1f} s"
    print(f"receipt: {done.receipt}")
    print(f"took: {took}" + (f" ({done.costs})" if done.costs else ""))
    print(f"checkpoint: {output}" + (" (already grown by this plan, nothing to do)" if done.already_there else ""))
    examples = None if args.add_tokens is not None else args.examples_path or find_examples(checkpoint)
    print(f"next: {_next_command(output, examples, info.step, new_tokenizer=args.add_tokens is not None)}")


def _explain(args: Grow) -> str:
    """The plan for a checkpoint, a Hugging Face folder or a preset, from its description alone."""
    from growth.evidence import expect_evidence
    from growth.explain import explain
    from growth.t5 import plan_growth

    args = dataclasses.replace(args, checkpoint=local_source(args.checkpoint))

    if str(args.checkpoint) in PRESETS and not args.checkpoint.exists():
        config, step, groups = preset(str(args.checkpoint)), 0, list(WHOLE_STATE)
    else:
        config, step, groups = _read_description(args.checkpoint)
    target, choices = _aim(args, config.model)
    if args.add_tokens is not None:
        from growth.vocabulary import add_to_vocabulary

        target = add_to_vocabulary(target, len(_read_tokens(args)), masked=args.masked)
    growth = plan_growth(config.model, target, choices, step=step, optimizer=config.optimizer)
    evidence = expect_evidence(config.data, with_examples=args.examples_path is not None)
    return explain(growth, groups, evidence)


def _read_description(path: Path) -> tuple[RunConfig, int, list[str]]:
    from t5pegasus.checkpoint import find_best, load_checkpoint_info, verify_structure
    from t5pegasus.convert.sources import is_foreign, open_source

    if is_foreign(path):
        return RunConfig(model=open_source(path)[0].model), 0, ["parameters"]
    checkpoint = path if (path / "checkpoint.json").is_file() else find_best(path, verify_structure)
    if checkpoint is None:
        raise UsageError(f"{path} is neither a checkpoint nor a run with one; check the path, or give a preset")
    info = load_checkpoint_info(checkpoint)
    return info.config, info.step, list_groups(checkpoint)


def list_groups(checkpoint: Path) -> list[str]:
    """The parts of a checkpoint's state that have the size of its parameters."""
    there = {folder.name.partition(".")[0] for folder in (checkpoint / "arrays").iterdir()}
    return [group for group in (*WHOLE_STATE, "ema") if group in there]


def _aim(args: Grow, source: ModelConfig) -> tuple[ModelConfig, "Choices"]:
    """The config to reach, but for added tokens, and how."""
    from growth.choices import Choices

    flags = {field: getattr(args, field) for field in growing_fields()}
    others = args.add_tokens is not None or args.open_tokens
    target = source if others and args.to is None and not any(flags.values()) else choose_target(source, args.to, flags)
    if args.open_tokens:
        if not source.num_masked_tokens:
            raise UsageError("--open-tokens: the checkpoint's model has no masked tokens; leave it out")
        target = dataclasses.replace(target, num_masked_tokens=0)
    fields: dict[str, Any] = {} if args.plan is None else read_json(args.plan)
    if args.seed is not None:
        fields["seed"] = args.seed
    return target, Choices.from_json(fields, "plan" if args.plan is None else str(args.plan))


def _read_tokens(args: Grow) -> list[str]:
    from t5pegasus.text.tokenizer.added_tokens import read_tokens

    return [] if args.add_tokens is None else read_tokens(args.add_tokens)


def growing_fields() -> tuple[str, ...]:
    """The config fields that this verb can enlarge, named by its flags."""
    return tuple(field.name for field in dataclasses.fields(Grow) if field.name in ModelConfig.__dataclass_fields__)


def choose_target(source: ModelConfig, to: str | None, flags: dict[str, Any]) -> ModelConfig:
    """The config to reach: the source's, with the sizes of `to`, then those of the flags that were given.

    Raises:
        UsageError: if `to` is neither a preset nor a list of sizes, or nothing was given.
    """
    given = {field: size for field, size in flags.items() if size is not None}
    if to is None and not given:
        raise UsageError(
            "nothing says how large to grow; give --to PRESET, --to d_model=96,… or flags like --d-model 96"
        )
    sizes = {} if to is None else _read_sizes(to, tuple(field for field in flags if "boundaries" not in field))
    return dataclasses.replace(source, **{**sizes, **given})


def _output_path(args: Grow) -> Path:
    return args.output or args.output_path or default_output_path(args.checkpoint)


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
    return None if record is None or record[1]["examples_path"] is None else open_path(record[1]["examples_path"])


def _next_command(grown: Path, examples_path: Path | None, step: int, *, new_tokenizer: bool) -> str:
    """How to train on: as many updates again, since steps go on being counted."""
    examples = "EXAMPLES" if examples_path is None else shlex.quote(str(examples_path))
    start, run = shlex.quote(str(grown)), shlex.quote(f"{grown}-run")
    steps = f" --train.steps {2 * step}" if step else ""
    command = f"t5pegasus pretrain --start-from {start} --examples-path {examples} --run-path {run}{steps}"
    if not new_tokenizer:
        return command
    return f"{command} --reset-rows, with EXAMPLES built by --tokenizer-path {shlex.quote(str(grown / 'tokenizer'))}"


def _read_sizes(to: str, fields: tuple[str, ...]) -> dict[str, int]:
    if "=" not in to:
        model = preset(to).model
        return {field: getattr(model, field) for field in fields}
    sizes = {}
    for pair in to.split(","):
        field, _, size = (part.strip() for part in pair.partition("="))
        if field == "vocab_size":
            raise UsageError(
                f"--to {to}: 'vocab_size' cannot be grown by a number; name tokens: t5pegasus grow … --add-tokens FILE"
            )
        if field in sizes:
            raise UsageError(f"--to {to}: {field} is given twice; leave one out")
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
