"""The page as a whole: one HTML file that needs nothing beside it."""

import html
from collections.abc import Sequence
from pathlib import Path

from t5pegasus import __version__
from t5pegasus.errors import UsageError
from t5pegasus.report.curves import show_curves
from t5pegasus.report.details import show_config, show_data, show_environment
from t5pegasus.report.growth import show_growths
from t5pegasus.report.markup import join
from t5pegasus.report.overview import show_overview
from t5pegasus.report.runs import Run, load_runs
from t5pegasus.report.samples import show_samples

STYLE = Path(__file__).with_name("style.css")


def write_report(run_paths: Sequence[Path], output_path: Path) -> list[Run]:
    """Write the page about these runs and all runs they came from; returns the runs, ancestors first.

    Args:
        run_paths: run folders; the last one has the headline.
        output_path: the HTML file, written under a temporary name and renamed when whole.

    Raises:
        ArtifactError: if one of them is no run folder.
        UsageError: if a JSON file is damaged, or `output_path` is a folder.
    """
    if output_path.is_dir():
        raise UsageError(
            f"output {output_path} is a folder, a file was wanted; give {output_path / 'report.html'}, say"
        )
    runs = load_runs(run_paths)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    temporary = output_path.with_name(output_path.name + ".tmp")
    temporary.write_text(render_page(runs), encoding="utf-8")
    temporary.replace(output_path)
    return runs


def render_page(runs: Sequence[Run]) -> str:
    """The HTML of the page about these runs, ancestors first."""
    title = " → ".join(run.name for run in runs)
    sections = join(
        show(runs)
        for show in (show_overview, show_curves, show_growths, show_samples, show_data, show_config, show_environment)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} – t5pegasus report</title>\n"
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(runs[-1].name)}</h1><p>t5pegasus {__version__} · training report "
        '<span lang="zh">训练报告</span></p></header>\n'
        f"<main>{sections}</main>\n</body>\n</html>\n"
    )
