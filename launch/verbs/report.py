"""`t5pegasus report`: one self-contained page about runs and what they came from."""

import dataclasses
from typing import Annotated

import tyro

from launch.command_line import StoragePath, parse_command_line


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about runs: curves, growth receipts, summaries, data, configuration.

    For example: t5pegasus report runs/finetune

    The page also tells of the runs and growths that the given ones came from, on one axis of steps.
    """

    runs: Annotated[tuple[StoragePath, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Run folders, or folders that evaluate wrote; the last one has the headline."""
    output: StoragePath | None = None
    """The file to write; report.html in the last run's folder if not given."""
    examples: int = 5
    """Summaries to show of the best, of the worst, and of those around the median."""


def main(argv: list[str]) -> int:
    """Write the page and print its path."""
    request = parse_command_line(Report, prog="t5pegasus report", args=argv)
    from t5pegasus.errors import UsageError
    from t5pegasus.report import write_report

    if not request.runs:
        raise UsageError("no run folder was given; try: t5pegasus report runs/pretrain")
    if request.examples < 1:
        raise UsageError(f"examples={request.examples} must be at least 1")
    output_path = request.output or request.runs[-1] / "report.html"
    write_report(request.runs, output_path, request.examples)
    print(f"{output_path}\nOpen it in a browser; it needs no network.")
    return 0
