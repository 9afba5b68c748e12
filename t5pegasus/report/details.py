"""The lower part of the page: the data, the configuration of every run, and the machine."""

from collections.abc import Iterator, Sequence
from typing import Any

from t5pegasus.report.chart import draw_histogram
from t5pegasus.report.markup import Markup, absent, escape, join, section, show, table
from t5pegasus.report.runs import Json, Run


def show_data(runs: Sequence[Run]) -> Markup:
    """Statistics of every set of examples the runs used, each set once."""
    users: dict[str, tuple[Json, list[str]]] = {}
    missing = []
    for run in runs:
        for manifest, use in ((run.examples, "trained"), (run.heldout, "held out")):
            if manifest is not None:
                users.setdefault(manifest["fingerprint"], (manifest, []))[1].append(f"{run.name} ({use})")
        if run.examples is None:
            missing.append(
                absent(f"{run.name}: no manifest at {run.paths['examples_path']}, so its data is not described")
            )
    return section("Data", "数据统计", *(_examples(*entry) for entry in users.values()), *missing)


def _examples(manifest: Json, users: Sequence[str]) -> Markup:
    num = manifest["num_examples"]
    facts = [
        ("examples", num),
        (
            "source tokens",
            f"{show(manifest['num_source_tokens'])} ({manifest['num_source_tokens'] / max(num, 1):.1f} each)",
        ),
        (
            "target tokens",
            f"{show(manifest['num_target_tokens'])} ({manifest['num_target_tokens'] / max(num, 1):.1f} each)",
        ),
        (
            "longest source / target",
            f"{show(manifest['max_source_tokens'])} / {show(manifest['max_target_tokens'])} tokens",
        ),
        ("vocabulary", manifest["vocab_size"]),
        ("shards", len(manifest["shards"])),
        ("fingerprint", manifest["fingerprint"][:16] + "…"),
    ]
    if "num_unknown_tokens" in manifest:
        facts.insert(3, ("unknown tokens", manifest["num_unknown_tokens"]))
    histograms = manifest["length_histograms"]
    figures = [
        draw_histogram(
            f"Examples by length of their {side}", "tokens", histograms[side], histograms["bin_tokens"], color
        )
        for side, color in (("source", 0), ("target", 1))
    ]
    title = Markup(f"<h3>{escape(', '.join(users))}</h3>")
    tables = Markup(
        f'<div class="figures halves">{table(("Examples", ""), facts, "facts")}{_documents(manifest)}</div>'
    )
    return Markup(f'<div class="panel">{title}{tables}<div class="figures halves">{join(figures)}</div></div>')


def _documents(manifest: Json) -> Markup:
    """What was read, kept and dropped; the manifest's own words for everything it counts."""
    rows = []
    for name, value in manifest["documents"].items():
        if isinstance(value, dict):
            rows += [(f"{name}: {reason}", count) for reason, count in value.items()] or [(name, "none")]
        else:
            rows.append((name, value))
    return table(("Documents", ""), rows, "facts") if rows else absent("The manifest counts no documents.")


def show_config(runs: Sequence[Run]) -> Markup:
    """Every field of every run's config, side by side; what differs stands out."""
    flat = [dict(_flatten(run.config)) for run in runs]
    fields = dict.fromkeys(field for config in flat for field in config)
    rows = []
    for field in fields:
        values = [config.get(field) for config in flat]
        same = all(value == values[0] for value in values)
        shown = [escape(value) if same else Markup(f"<mark>{escape(value)}</mark>") for value in values]
        rows.append((field, *shown))
    paths = [(name, *(run.paths[name] for run in runs)) for name in ("examples_path", "heldout_path", "start_from")]
    whole = table(("Field", *(run.name for run in runs)), [*paths, *rows], "config")
    return section(
        "Configuration", "配置", Markup(f"<details><summary>{len(rows)} fields of every run</summary>{whole}</details>")
    )


def show_environment(runs: Sequence[Run]) -> Markup:
    """What each start of a run recorded about devices and precision."""
    told = ("kind", "config", "run_path", "examples_path", "heldout_path", "start_from")
    rows, missing = [], []
    for run in runs:
        starts = run.of_kind("start")
        if not starts:
            missing.append(absent(f"{run.name}: metrics.jsonl has no record of a start"))
        for start in starts:
            facts = (f"{name} {_one_line(value)}" for name, value in start.items() if name not in (*told, "step"))
            rows.append((run.name, start["step"], ", ".join(facts)))
    parts = [table(("Run", "From step", "On"), rows)] if rows else []
    return section("Environment", "运行环境", *parts, *missing)


def _one_line(value: Any) -> str:
    if isinstance(value, dict):
        return " × ".join(f"{name} {show(item)}" for name, item in value.items())
    return show(value)


def _flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict):
            yield from _flatten(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item
