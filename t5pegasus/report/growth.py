"""The receipts: what each growth changed and how far the function moved."""

from collections.abc import Sequence

from t5pegasus.report.markup import Markup, absent, escape, section, show, show_difference, show_short, table
from t5pegasus.report.overview import describe_sizes, heldout_around_growth
from t5pegasus.report.runs import Growth, Run


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
    verdict = Markup(
        f"At step {escape(growth.step)} the model grew from {escape(receipt['source_parameters'])} to "
        f"{escape(receipt['grown_parameters'])} parameters. Its logits moved by at most "
        f"<b>{receipt['max_logit_difference']:.2e}</b>, which is {receipt['floor_ratio']:.2f} times what reordering "
        f"the same sums does in float32, and its loss by "
        f"<b>{show_difference(receipt['nll_difference'])}</b> nats per token."
    )
    changes = table(
        ("What grew", "Before", "After", "How", "Logits", "What sets it in motion"),
        (
            (field["field"], field["source"], field["target"], field["rule"], _promise(field), field["breaker"])
            for field in growth.plan["fields"]
        ),
    )
    facts = [
        ("max |Δlogit|", f"{receipt['max_logit_difference']:.3e}"),
        ("root mean square Δlogit", f"{receipt['rms_logit_difference']:.3e}"),
        (
            f"floor: the largest of {receipt['num_permutations']} permutations of the source itself",
            f"{receipt['floor_max_logit_difference']:.3e}",
        ),
        ("loss of the source, nats per token", f"{receipt['source_nll']:.5f}"),
        ("ΔNLL", show_difference(receipt["nll_difference"])),
        ("compared on", f"{show(receipt['num_target_tokens'])} target tokens of {receipt['evidence']}"),
        ("plan", receipt["plan_hash"]),
        ("checkpoint", growth.path),
    ]
    if run.growths[-1] is growth:
        losses = heldout_around_growth(run)
        shown = " → ".join(f"{loss:.4f} {when}" for when, loss in losses.items())
        facts.append(("held-out loss, nats per token", shown or "not measured"))
    measured = table(("Measured", ""), facts, "facts")
    return Markup(f'<div class="panel"><p class="verdict">{verdict}</p>{changes}{measured}</div>')


def _promise(field: dict) -> str:
    return "bitwise the same" if field["function_class"] == "B" else "the same but for rounding"
