"""`t5pegasus checkpoint verify|list|diff`: look into checkpoints without changing them."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from launch.command_line import StoragePath, parse_command_line
from t5pegasus.errors import ArtifactError
from t5pegasus.progress import format_seconds

if TYPE_CHECKING:
    from t5pegasus.checkpoint.compare import ArrayDifference, Comparison


@dataclasses.dataclass(frozen=True)
class Verify:
    """Read every byte, compare it with the manifest, and name each file that is damaged; exit code 2 if one is.

    For example: t5pegasus checkpoint verify runs/title
    """

    path: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A checkpoint, or a run, of which all are verified."""
    json: bool = False
    """One JSON object instead of text."""


@dataclasses.dataclass(frozen=True)
class List:
    """Show a run's checkpoints: step, size, age, held-out loss, which is the best, what is damaged or unfinished.

    For example: t5pegasus checkpoint list runs/title

    Of the arrays only the sizes of the files are compared; `verify` reads them. Of a single checkpoint the arrays are
    shown.
    """

    path: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A run, or one checkpoint."""
    json: bool = False
    """One JSON object instead of text."""


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compare two checkpoints: config, position, origin, and every array, bit for bit.

    For example: t5pegasus checkpoint diff runs/title/checkpoints/1000 runs/title/checkpoints/2000
    """

    first: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    """A checkpoint, or a run (its best or last good checkpoint is meant)."""
    second: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    """Another one."""
    json: bool = False
    """One JSON object instead of text."""


def main(argv: list[str]) -> int:
    """Parse the command and run it."""
    args = parse_command_line(
        Annotated[Verify, tyro.conf.subcommand("verify")]
        | Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Diff, tyro.conf.subcommand("diff")],
        prog="t5pegasus checkpoint",
        description="Verify, list and compare checkpoints.",
        args=argv,
    )
    match args:
        case Verify():
            return _verify(args)
        case List():
            return _list(args)
        case _:
            return _diff(args)


def _verify(args: Verify) -> int:
    from t5pegasus.checkpoint.survey import list_problems, survey_run

    found = {}
    for entry in survey_run(args.path, contents=lambda name: False):
        path = entry.path
        problems = [] if entry.state == "unfinished" else list(list_problems(path))
        if problems and not path.exists():  # the run has deleted it while it was read
            continue
        found[str(path)] = {**entry.to_json(), "state": "damaged" if problems else entry.state, "problems": problems}
        if not args.json:
            state = "damaged" if problems else "unfinished, not verified" if entry.state == "unfinished" else "good"
            print(f"{path}: {state}, {_format_bytes(entry.bytes)}")
            for problem in problems:
                print(f"  {problem}")
    if args.json:
        _print_json({"checkpoints": found})
    return ArtifactError.exit_code if any(each["problems"] for each in found.values()) else 0


def _list(args: List) -> int:
    from t5pegasus.checkpoint.survey import survey_run
    from t5pegasus.manifest import MANIFEST

    entries = survey_run(args.path)
    arrays = _describe_arrays(args.path) if (args.path / MANIFEST).is_file() else None
    if args.json:
        listed: dict[str, Any] = {"checkpoints": [entry.to_json() for entry in entries]}
        _print_json(listed if arrays is None else {**listed, "arrays": arrays})
        return 0
    rows = [("step", "size", "age", "held-out loss", "state")]
    for entry in entries:
        rows.append(
            (
                "?" if entry.step is None else str(entry.step),
                _format_bytes(entry.bytes),
                "" if entry.age_seconds is None else format_seconds(max(0.0, entry.age_seconds)),
                "" if entry.loss is None else f"{entry.loss:.4f}",
                entry.state + (", best" if entry.best else "") + (f": {entry.problem}" if entry.problem else ""),
            )
        )
    _print_table(rows)
    if arrays is not None:
        print()
        _print_table(
            [("array", "type", "size"), *((n, a["type"], _format_bytes(a["bytes"])) for n, a in arrays.items())]
        )
    return 0


def _describe_arrays(path: Path) -> dict[str, Any]:
    from t5pegasus.arrays import open_arrays

    return {
        name: {"type": f"{array.dtype.name}{list(array.shape)}", "bytes": array.nbytes}
        for name, array in open_arrays(path).items()
    }


def _diff(args: Diff) -> int:
    from t5pegasus.arrays import open_arrays
    from t5pegasus.checkpoint import find_checkpoint
    from t5pegasus.checkpoint.compare import compare_checkpoints
    from t5pegasus.progress import Progress
    from t5pegasus.storage import fetch

    found = [find_checkpoint(path) for path in (args.first, args.second)]
    first, second = map(fetch, found)
    total = sum(array.nbytes for array in open_arrays(first).values())
    with Progress("compare", total=total, unit="B") as progress:
        comparison = compare_checkpoints(first, second, progress.advance)
    if args.json:
        _print_json({"first": str(found[0]), "second": str(found[1]), **comparison.to_json()})
    else:
        _print_comparison(comparison)
    return 0


def _print_comparison(comparison: "Comparison") -> None:
    for name, (first, second) in comparison.fields.items():
        print("\n".join(_describe_change(name, first, second)))
    if comparison.arrays:
        rows = [("array", "type", "largest difference", "different entries")]
        _print_table([*rows, *(_describe_difference(each) for each in comparison.arrays)])
    num = comparison.num_equal_arrays
    print(f"{num} arrays are equal bit for bit, {len(comparison.arrays)} are not")


def _describe_difference(each: "ArrayDifference") -> tuple[str, str, str, str]:
    if each.first is None or each.second is None:
        return each.name, str(each.first or each.second), "", f"only in the {'first' if each.first else 'second'}"
    if each.max_abs_difference is None:
        return each.name, f"{each.first} → {each.second}", "", "all"
    return each.name, each.first, f"{each.max_abs_difference:.3g}", f"{each.num_different:,} of {each.num_entries:,}"


def _describe_change(name: str, first: Any, second: Any) -> Iterator[str]:
    """What differs between two values, in objects field by field, in lists up to the first entry that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                yield from _describe_change(f"{name}.{key}", first.get(key), second.get(key))
    elif isinstance(first, list | tuple) and isinstance(second, list | tuple) and max(len(first), len(second)) > 1:
        same = sum(itertools.takewhile(bool, (a == b for a, b in zip(first, second))))
        yield f"{name}: {len(first)} → {len(second)} entries, of which the first {same} are equal"
        if same < min(len(first), len(second)):
            yield from _describe_change(f"{name}[{same}]", first[same], second[same])
        else:
            longer = "first" if len(first) > len(second) else "second"
            yield f"{name}[-1], only in the {longer}: {_shorten(max(first, second, key=len)[-1])}"
    else:
        yield f"{name}: {_shorten(first)} → {_shorten(second)}"


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _format_bytes(number: int) -> str:
    for divisor, unit in ((1e9, "GB"), (1e6, "MB")):
        if number >= divisor:
            return f"{number / divisor:.2f} {unit}"
    return f"{number / 1e3:.2f} kB"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False, indent=1))
