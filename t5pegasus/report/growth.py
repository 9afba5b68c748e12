"""The receipts: what each growth changed and how far the function moved."""

from collections.abc import Sequence

from t5pegasus.report.markup import Markup, absent, escape, section, show, show_difference, show_short, table
from t5pegasus.report.overview import describe_sizes, heldout_around_growth
from t5pegasus.report.runs import Growth, Json, Run


def show_growths(runs: Sequence[Run]) -> Markup:
    """Plan and receipt of every growth between the runs."""
    parts = [_receipt(run, growth) for run in runs for growth in run.growths]
    parts += [_own_growths(run) for run in runs if run.own_growths]
    return section(
        "Growth receipt",
        "扩展凭据",
        *(parts or [absent("None of these runs began with a grown checkpoint, or grew on its way.")]),
    )


def _own_growths(run: Run) -> Markup:
    """The growths within a run, as its metrics tell them."""
    rows = [
        (
            show(record["step"]),
            ", ".join(describe_sizes(record["source"], record["target"])),
            f"{show_short(record['parameters_before'])} → {show_short(record['parameters_after'])}",
            f"{record['loss_before']:.4f} → {record['loss_after']:.4f}",
            f"{record['source_flops']:.3g}",
            f"{record['seconds']:.1f}",
            record["plan_hash"][:12],
        )
        for record in run.own_growths
    ]
    trained = [record["flops"] for record in run.of_kind("train") if "flops" in record]
    spent = f" Training took {trained[-1]:.3g} FLOPs in all, the smaller models' among them." if trained else ""
    evidence = escape(run.own_growths[-1]["evidence"])
    text = Markup(
        f"<b>{escape(run.name)}</b> grew while it trained. The losses, in nats per token on both sides of the seam, "
        f"are of {evidence}.{spent}"
    )
    head = ("Step", "What grew", "Parameters", "Loss", "FLOPs until then", "Seconds", "Plan")
    return Markup(f'<div class="panel"><p class="verdict">{text}</p>{table(head, rows)}</div>')


def _receipt(run: Run, growth: Growth) -> Markup:
    receipt = growth.receipt
    changes = table(
        ("Axis", "Before", "After", "How", "Logits", "What sets it in motion"),
        (
            (
                each["axis"],
                each["source"],
                each["target"],
                each["operator"],
                _PROMISES[each["promise"]],
                each["breaker"],
            )
            for each in receipt["axes"]
        ),
    )
    facts = [*_function(receipt), *_training(receipt), *_files(receipt, growth.costs)]
    facts += [("plan", receipt["plan_hash"]), ("checkpoint", growth.path)]
    if run.growths[-1] is growth:
        losses = heldout_around_growth(run)
        shown = " → ".join(f"{loss:.4f} {when}" for when, loss in losses.items())
        facts.append(("held-out loss, nats per token", shown or "not measured"))
    measured = table(("Measured", ""), facts, "facts")
    return Markup(f'<div class="panel"><p class="verdict">{_verdict(growth)}</p>{changes}{measured}</div>')


_PROMISES = {
    "B": "bitwise the same",
    "R": "the same but for rounding",
    "M": "the same while new tokens are masked",
    "L": "changed, by as much as is stated",
}


def _verdict(growth: Growth) -> Markup:
    receipt = growth.receipt
    grew = Markup(
        f"At step {escape(growth.step)} the model grew from {escape(receipt['source_parameters'])} to "
        f"{escape(receipt['grown_parameters'])} parameters."
    )
    if "float32" not in receipt["logits"]:
        return Markup(f"{grew} Its arrays were verified; neither model was evaluated.")
    found = receipt["logits"]["float32"]
    floor = found["floor_maximum"]
    ratio = f", which is {found['maximum'] / floor:.2f} times what reordering the same sums does" if floor else ""
    return Markup(
        f"{grew} Its logits moved by at most <b>{found['maximum']:.2e}</b>{ratio} in float32, and its loss by "
        f"<b>{show_difference(receipt['nll_difference'])}</b> nats per token."
    )


def _function(receipt: Json) -> list[tuple[str, str]]:
    """How far the function moved, in each precision of activations."""
    facts = []
    for name, each in receipt["logits"].items():
        largest, root = (f"{each[field]:.3e}" for field in ("maximum", "root_mean_square"))
        floors = [f"{each[field]:.3e}" for field in ("floor_maximum", "floor_root_mean_square")]
        facts.append((f"{name}: max |Δlogit|", largest + (", bitwise equal" if each["bitwise"] else "")))
        facts.append((f"{name}: root mean square Δlogit", root))
        what = f"the largest of {receipt['num_permutations']} permutations of the source itself"
        facts.append((f"{name}: floor, {what}", f"{floors[0]}; root mean square {floors[1]}"))
        if each["rescaled_maximum"] is not None:
            floor = f"{each['rescaled_maximum']:.3e}; root mean square {each['rescaled_root_mean_square']:.3e}"
            facts.append((f"{name}: floor, permutations with weights rounded anew", floor))
    if receipt["source_nll"] is not None:
        facts.append(("loss of the source, nats per token", f"{receipt['source_nll']:.5f}"))
        facts.append(("ΔNLL", show_difference(receipt["nll_difference"])))
        facts.append(("compared on", f"{show(receipt['num_target_tokens'])} target tokens of {receipt['evidence']}"))
    new = receipt["new_tokens"]
    if new is not None:
        bound = "" if new["bound"] is None else f", at most {new['bound']:.3e} by theory"
        taken = "masked: no probability" if new["masked"] else f"take {new['mean_log_added_mass']:.3e} nats{bound}"
        facts.append((f"{show(new['number'])} new tokens", taken))
    return facts


def _training(receipt: Json) -> list[tuple[str, str]]:
    """Whether gradients are mapped as said, and what two updates did."""
    facts = []
    found = receipt["gradients"]
    if found is not None:
        facts.append(("gradients against r·g, entry by entry, float64", f"{found['elementwise']:.1e}"))
        facts.append(("gradients summed over copies against g, float64", f"{found['summed']:.1e}"))
    for axis, each in receipt["liveness"].items():
        parts = []
        if each["created"]:
            parts.append(f"{show(each['alive'])} of {show(each['created'])} new entries have a gradient")
        if each["copied"]:
            parts.append(f"{show(each['parted'])} of {show(each['copied'])} copies have parted")
        facts.append((f"after two updates: {axis}", ", ".join(parts) or "nothing new"))
    return facts


def _files(receipt: Json, costs: Json | None) -> list[tuple[str, str]]:
    arrays = receipt["arrays"]
    error = f"off by {arrays['largest_derived_error']:.1f} half units in the last place at most"
    facts = [
        ("arrays as in a fresh state, and every entry as grown a second time", show(arrays["number"])),
        ("entries derived independently", f"{show(arrays['derived'])}, {error}"),
    ]
    if costs is None:
        return facts
    facts.append(("bytes read, written", f"{show(costs['bytes_read'])}, {show(costs['bytes_written'])}"))
    for what in ("surgery", "receipt"):
        seconds, peak = costs[f"{what}_seconds"], costs[f"{what}_peak_bytes"]
        memory = "" if peak is None else f", {peak / 2**20:,.0f} MiB of memory at most"
        if seconds is not None:
            facts.append((what, f"{seconds:.1f} s{memory}"))
    return facts
