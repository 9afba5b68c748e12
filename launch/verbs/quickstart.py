"""`t5pegasus quickstart`: the whole flow on the embedded sample."""

import dataclasses
from pathlib import Path

from launch.command_line import parse_command_line


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Run the whole flow on 160 embedded Chinese documents: a few minutes on two CPU cores, no network.

    For example: t5pegasus quickstart --output-path quickstart

    Shows each command before it runs it, so that every stage can be repeated with other settings. Run again, it
    continues where it was interrupted.
    """

    output_path: Path = Path("quickstart")
    """Folder for all that it makes."""


def main(argv: list[str]) -> None:
    """Parse and run the recipe."""
    args = parse_command_line(Quickstart, prog="t5pegasus quickstart", args=argv)
    from launch.processes import init_distributed

    init_distributed()
    from launch.recipes.quickstart import run_quickstart

    run_quickstart(args.output_path)
