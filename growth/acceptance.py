"""What of a receipt decides whether a growth keeps the promise of its plan."""

import math

from growth.receipt import LARGEST_ERROR, LARGEST_FLOOR_RATIO, Receipt, StoredArrays
from t5pegasus.errors import ArtifactError

LARGEST_DERIVED_ERROR = 16.0
"""Of stored entries against their derivation, in units of half the distance between neighbouring numbers."""


def check_receipt(receipt: Receipt) -> None:
    """Refuse a growth that does not keep what its plan promises.

    Raises:
        ArtifactError: naming every check that failed, with what was got and what was wanted.
    """
    if receipt.source_nll is not None and not math.isfinite(receipt.source_nll):
        raise ArtifactError(
            f"the source's loss on {receipt.evidence} is {receipt.source_nll}, a finite one was wanted; "
            "grow an earlier checkpoint of the run"
        )
    failures = find_failures(receipt)
    if failures:
        raise ArtifactError(
            f"the grown model is not what its plan promises ({receipt.promise}): {'; '.join(failures)}. No checkpoint "
            "was made. Growth is at fault, not the source: please report plan "
            f"{receipt.plan_hash[:12]}"
        )


def find_failures(receipt: Receipt) -> list[str]:
    """What speaks against a receipt, each as `name of the check: got and wanted`."""
    return [*_check_arrays(receipt.arrays), *_check_function(receipt), *_check_training(receipt)]


def _check_arrays(arrays: StoredArrays) -> list[str]:
    failures = [f"structure: {difference}" for difference in arrays.structure]
    for check, error, where in (
        ("arrays", arrays.largest_error, arrays.worst_array),
        ("derivation", arrays.largest_derived_error, arrays.worst_derived),
    ):
        if not error <= LARGEST_DERIVED_ERROR:
            failures.append(
                f"{check}: {where} is off by {error:.3g} half units in the last place, at most "
                f"{LARGEST_DERIVED_ERROR:g} was wanted"
            )
    return failures


def _check_function(receipt: Receipt) -> list[str]:
    failures = []
    for name, each in receipt.logits.items():
        if receipt.keeps_logits and not each.is_rounding:
            failures.append(
                f"logits in {name}: max |Δlogit| is {each.maximum:.2e} and their root mean square "
                f"{each.root_mean_square:.2e}, at most {LARGEST_FLOOR_RATIO:g} × the permutation floor = "
                f"{each.allowed_maximum:.2e} and {each.allowed_root_mean_square:.2e} was wanted"
            )
        elif not math.isfinite(each.maximum):
            failures.append(f"logits in {name}: max |Δlogit| is {each.maximum}, a finite one was wanted")
    new = receipt.new_tokens
    if new is not None and new.masked and new.largest_probability_ratio != 0:
        failures.append(f"new tokens: their probability is {new.largest_probability_ratio:.2e}, 0 was wanted")
    if new is not None and not new.masked and receipt.keeps_logits and receipt.nll_difference is not None:
        slack = 2 * receipt.logits["float32"].maximum + 1e-9
        if not abs(receipt.nll_difference - new.mean_log_added_mass) <= slack:
            failures.append(
                f"new tokens: ΔNLL is {receipt.nll_difference:.6e}, the {new.mean_log_added_mass:.6e} of their share "
                "of the probability was wanted"
            )
        if new.bound is not None and not new.mean_log_added_mass <= new.bound + slack:
            failures.append(
                f"new tokens: they take {new.mean_log_added_mass:.3e} nats, at most {new.bound:.3e} was wanted"
            )
    return failures


def _check_training(receipt: Receipt) -> list[str]:
    failures = []
    found = receipt.gradients
    if found is not None:
        limit = max(LARGEST_ERROR, LARGEST_FLOOR_RATIO * found.floor)
        for check, error, name in (
            ("gradients, entry by entry", found.elementwise, found.elementwise_parameter),
            ("gradients, summed over copies", found.summed, found.summed_parameter),
        ):
            if not error <= limit:
                failures.append(f"{check}: {name} is off by {error:.2e} of its largest, at most {limit:.1e} was wanted")
    if receipt.exact_dynamics:
        return failures
    for axis, each in receipt.liveness.items():
        if each.silent_parameters:
            failures.append(
                f"liveness: after two updates no gradient has reached the new entries of axis {axis} in "
                f"{', '.join(each.silent_parameters[:3])}"
            )
        elif 2 * each.alive < each.created:
            failures.append(f"liveness: after two updates {each.alive} of {each.created} new {axis} have a gradient")
        if 2 * each.parted < each.copied:
            failures.append(
                f"liveness: after two updates {each.parted} of {each.copied} copies along axis {axis} have parted"
            )
    return failures
