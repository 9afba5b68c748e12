"""The page as a whole: one HTML file that needs nothing beside it."""

import html
from collections.abc import Sequence
from pathlib import Path

from t5pegasus import __version__
from t5pegasus.errors import UsageError, reading
from t5pegasus.report.course import show_course
from t5pegasus.report.curves import show_curves
from t5pegasus.report.details import show_config, show_data, show_environment
from t5pegasus.report.growth import show_growths
from t5pegasus.report.markup import Markup, join
from t5pegasus.report.overview import show_overview
from t5pegasus.report.runs import Evaluation, Run, load_evaluation, load_runs
from t5pegasus.report.samples import show_samples
from t5pegasus.storage import write_bytes

STYLE = Path(__file__).with_name("style.css")


NUM_EXAMPLES = 5
"""Of the best summaries, of the worst, and of those around the median."""


def write_report(paths: Sequence[Path], output_path: Path, num_examples: int = NUM_EXAMPLES) -> list[Run]:
    """Write the page about these runs and all runs they came from; returns the runs, ancestors first.

    Args:
        paths: run folders; the last one has the headline. Also folders with a scores.json alone, as evaluate writes
            them for a checkpoint or for summaries outside a run.
        output_path: the HTML file, written under a temporary name and renamed when whole.
        num_examples: summaries of each kind to show.

    Raises:
        ArtifactError: if one of them is neither, or holds what no run does.
        UsageError: if a JSON file is damaged, or `output_path` is a folder.
    """
    if output_path.is_dir():
        raise UsageError(
            f"output {output_path} is a folder, a file was wanted; give {output_path / 'report.html'}, say"
        )
    lone = [path for path in paths if not (path / "config.json").is_file() and (path / "scores.json").is_file()]
    with reading(paths[-1]):
        runs = load_runs(path for path in paths if path not in lone)
        page = render_page(runs, [load_evaluation(path) for path in lone], num_examples)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(output_path, page.encode())
    return runs


def render_page(runs: Sequence[Run], lone: Sequence[Evaluation] = (), num_examples: int = NUM_EXAMPLES) -> str:
    """The HTML of the page about these runs, ancestors first, and about evaluations that belong to none of them."""
    names = [run.name for run in runs]
    title = ", ".join([" → ".join(names)] * bool(names) + [evaluation.name for evaluation in lone])
    samples = show_samples([*(run.evaluation for run in runs), *lone], num_examples)
    if runs:
        before, after = (
            (show_overview, show_curves, show_growths, show_course),
            (show_data, show_config, show_environment),
        )
        sections = join([*(show(runs) for show in before), samples, *(show(runs) for show in after)])
        headline, kind = names[-1], Markup('training report <span lang="zh">训练报告</span>')
    else:
        sections, headline, kind = samples, lone[-1].name, Markup('evaluation <span lang="zh">评测报告</span>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)} – t5pegasus report</title>\n"
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(headline)}</h1><p>t5pegasus {__version__} · {kind}</p></header>\n"
        f"<main>{sections}</main>\n</body>\n</html>\n"
    )
