"""How near summaries are to their references: scores of every system, by length, and how they are spread."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from t5pegasus.report.chart import draw_histogram
from t5pegasus.report.markup import Markup, absent, escape, join, show, table
from t5pegasus.report.runs import Evaluation, Json

_DEFINITIONS = (
    ("Standard definitions", ("rouge-1", "rouge-2", "rouge-l", "bleu")),
    (
        "As T5 PEGASUS published",
        ("t5-pegasus-rouge-1", "t5-pegasus-rouge-2", "t5-pegasus-rouge-l", "t5-pegasus-bleu"),
    ),
)
_TABLES = ("systems", "reference", "difference_from_lead", "lengths", "definitions")
"""Parts of scores.json that are shown as tables of their own; the others are facts in its own words."""
_BIN_POINTS = 5


class Rouge(NamedTuple):
    """ROUGE-1 / 2 / L in one line each."""

    evaluated: str
    lead: str


def read_rouge(scores: Json | None) -> Rouge | None:
    """The standard ROUGE figures of a scores.json, None if there are none that this version can read."""
    if scores is None or "systems" not in scores:
        return None
    lines = {
        system: " / ".join(f"{found['scores'][name]['value']:.1f}" for name in _DEFINITIONS[0][1][:3])
        for system, found in scores["systems"].items()
    }
    return Rouge(next(iter(lines.values())), lines["lead"])


def show_scores(evaluation: Evaluation) -> Markup:
    """One panel: a table per definition, scores by length, and whatever else the evaluation says."""
    scores = evaluation.scores
    if scores is None:
        return Markup("")
    if "systems" not in scores:
        return absent(
            f"{evaluation.name}: scores.json was written by an earlier version, with other figures; "
            "run t5pegasus evaluate again"
        )
    first = next(iter(scores["systems"]))
    tables = [_systems(scores, first, title, names, place == 0) for place, (title, names) in enumerate(_DEFINITIONS)]
    lengths = [_lengths(side, bins) for side, bins in scores["lengths"].items()]
    values = [record["scores"]["rouge-l"] for record in evaluation.summaries if "scores" in record]
    counts = [0] * (100 // _BIN_POINTS if values else 0)
    for value in values:
        counts[min(int(value / _BIN_POINTS), len(counts) - 1)] += 1
    spread = draw_histogram(f"Pairs by the ROUGE-L of {first}", "points", counts, _BIN_POINTS, 0)
    facts = [(name, _one_line(value)) for name, value in scores.items() if name not in (*_TABLES, "schema")]
    facts += list(scores["definitions"].items())
    about = Markup(f"<details><summary>about these figures</summary>{table(('', ''), facts, 'facts')}</details>")
    return Markup(
        f'<div class="panel"><h3>{escape(evaluation.name)}</h3><p>{escape(_in_short(scores))}</p>{join(tables)}'
        f'<div class="figures">{join([*lengths, spread])}</div>{about}</div>'
    )


def _in_short(scores: Json) -> str:
    """What was scored, and what stands between the figures and all pairs of the file."""
    parts = [f"{show(scores['num_pairs'])} pairs of {scores['pairs_path']}"]
    parts += [f"left out {show(count)}: {reason}" for reason, count in scores["dropped"].items()]
    if scores["num_truncated"]:
        parts.append(f"{show(scores['num_truncated'])} texts longer than what the model reads")
    parts += [
        f"{show(found['num_empty'])} empty outputs of {system}"
        for system, found in scores["systems"].items()
        if found["num_empty"]
    ]
    if scores["heldout_loss"] is not None:
        parts.append(f"held-out loss {scores['heldout_loss']:.4f} nats per target token")
    return "; ".join(parts)


def _systems(scores: Json, first: str, title: str, names: Sequence[str], with_outputs: bool) -> Markup:
    """Systems by the scores of one definition; what the outputs are like stands beside the first one only."""
    headings = [name.removeprefix("t5-pegasus-").upper() for name in names]
    rows = [
        (system, *(_figure(found["scores"][name]) for name in names), *_outputs(found, with_outputs))
        for system, found in scores["systems"].items()
    ]
    if first != "lead":
        difference = scores["difference_from_lead"]
        rows.append((f"{first} minus lead", *(_figure(difference[name], sign="+") for name in names), "", ""))
    if with_outputs:
        rows.append(("reference", *(Markup("") for _ in names), *_outputs(scores["reference"], with_outputs)))
    outputs = ("Characters", "Copied") if with_outputs else ("", "")
    return table((title, *headings, *outputs), rows, "systems")


def _figure(interval: Mapping[str, float], sign: str = "") -> Markup:
    """A value and its interval, small."""
    value, low, high = (
        f"{interval[name]:{sign}.{digits}f}" for name, digits in (("value", 2), ("low", 1), ("high", 1))
    )
    return Markup(f"{value} <small>{low} … {high}</small>".replace("-", "−"))


def _outputs(found: Json, shown: bool) -> tuple[str, str]:
    if not shown:
        return "", ""
    return f"{found['mean_characters']:.1f}", f"{found['copied_percent']:.0f} %"


def _lengths(side: str, bins: Sequence[Json]) -> Markup:
    systems = list(bins[0]["scores"])
    rows = [
        (
            show(found["low"]) if found["low"] == found["high"] else f"{show(found['low'])} – {show(found['high'])}",
            found["num_pairs"],
            *(f"{found['scores'][system]['rouge-l']:.1f}" for system in systems),
        )
        for found in bins
    ]
    caption = f"ROUGE-L by characters of the {side}"
    head = ("Characters", "Pairs", *systems)
    return Markup(f"<figure><figcaption>{escape(caption)}</figcaption>{table(head, rows, 'scores')}</figure>")


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(item)}" for name, item in value.items()) or "none"
    return show(value)
