"""The receipts: what each growth changed and how far the function moved."""

from collections.abc import Sequence

from t5pegasus.report.markup import Markup, absent, escape, section, show, show_difference, table
from t5pegasus.report.overview import heldout_around_growth
from t5pegasus.report.runs import Growth, Run


def show_growths(runs: Sequence[Run]) -> Markup:
    """Plan and receipt of every growth between the runs."""
    parts = [_receipt(run, growth) for run in runs for growth in run.growths]
    return section(
        "Growth receipt", "扩展凭据", *(parts or [absent("None of these runs began with a grown checkpoint.")])
    )


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
