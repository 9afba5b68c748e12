"""Grow a model that is none of this project's: a decoder-only one with rotary positions and grouped queries.

It is plain JAX. All that growth is told of it is a declaration of each parameter's axes, and a table that says of what
kind these axes are. Run it with `python examples/decoder_only.py`; `--tied` makes the embedding the head, too.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from growth.choices import Choices
from growth.expand import along
from growth.leaves import grow_arrays
from growth.lint import check_plan
from growth.plan import GrowthPlan, plan_axes
from t5pegasus.axes import ParamSpec, dual_multipliers
from t5pegasus.errors import UsageError

KINDS = {
    "embed": "stream", "layers": "layers", "mlp": "units", "groups": "units", "members": "units", "value": "units",
    "vocab": "rows",
}  # fmt: skip
"""Each group of query heads shares a key and a value: groups, and members of a group, are units. `rotary`, the entries
of queries and keys, is of no kind: position turns entry i by an angle that depends on i and the size, so it must stay.
"""
SIZES = {"vocab": 96, "layers": 2, "embed": 32, "groups": 2, "members": 2, "rotary": 8, "value": 8, "mlp": 48}
TARGET = SIZES | {"layers": 3, "embed": 44, "groups": 3, "members": 4, "value": 12, "mlp": 80}
EPSILON = 1e-6
NUM_PERMUTATIONS = 8
Arrays = Mapping[str, Any]


def declare(sizes: Mapping[str, int], *, tied: bool) -> dict[str, ParamSpec]:
    """The axes of every parameter, and which of them the model sums over."""

    def spec(axes: str, reads: str = "", *, gain: bool = False, **further: Any) -> ParamSpec:
        names = tuple(axes.split())
        return ParamSpec(names, tuple(reads.split()), gain, tuple(sizes[axis] for axis in names), **further)

    specs = {
        "embedding": spec("vocab embed"),
        "attention_norm": spec("layers embed", gain=True),
        # Scores are divided by √rotary. Growth would make up for that in the queries, if the axis could grow.
        "query": spec("layers embed groups members rotary", "embed rotary", size_powers=(("rotary", -0.5),)),
        "key": spec("layers embed groups rotary", "embed"),
        "value": spec("layers embed groups value", "embed"),
        "out": spec("layers groups members value embed", "groups members value"),
        "mlp_norm": spec("layers embed", gain=True),
        "gate": spec("layers embed mlp", "embed"),
        "up": spec("layers embed mlp", "embed"),
        "down": spec("layers mlp embed", "mlp"),
    }
    if tied:  # what the last norm gives meets the embedding, which writes the stream and does not read it
        return specs | {"final_norm": spec("embed", gain=True, meets_written=("embed",))}
    return specs | {"final_norm": spec("embed", gain=True), "head": spec("embed vocab", "embed")}


def compute_logits(parameters: Arrays, tokens: jax.Array) -> jax.Array:
    """Tokens int32 [batch, length] → logits [batch, length, vocab]."""
    x = parameters["embedding"][tokens]
    causal = jnp.tril(jnp.ones((tokens.shape[1], tokens.shape[1]), bool))[None, None, None]
    for layer in range(len(parameters["query"])):
        p = {
            name: array[layer] for name, array in parameters.items() if name not in ("embedding", "final_norm", "head")
        }
        y = rms_norm(x, p["attention_norm"])
        query = rotate(jnp.einsum("btd,dgmr->btgmr", y, p["query"]))
        key = rotate(jnp.einsum("bsd,dgr->bsgr", y, p["key"])[:, :, :, None])[:, :, :, 0]
        scores = jnp.einsum("btgmr,bsgr->bgmts", query, key) * query.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        values = jnp.einsum("bsd,dgv->bsgv", y, p["value"])
        x += jnp.einsum("bgmts,bsgv,gmvd->btd", weights, values, p["out"])
        y = rms_norm(x, p["mlp_norm"])
        x += (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
    head = parameters["head"] if "head" in parameters else parameters["embedding"].T
    return rms_norm(x, parameters["final_norm"]) @ head


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019)."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + EPSILON) * gain.reshape(1, 1, -1)


def rotate(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021) of [batch, length, groups, members, rotary]."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * (1e4 ** (-jnp.arange(half) / half))[None]
    cos, sin = (turn(angles)[None, :, None, None].astype(x.dtype) for turn in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.jit
def compute_gradients(parameters: Arrays, tokens: jax.Array) -> tuple[Arrays, jax.Array]:
    """Gradients of the mean loss of predicting each next token, and the logits."""

    def loss(parameters: Arrays) -> tuple[jax.Array, jax.Array]:
        logits = compute_logits(parameters, tokens)
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1)
        return -log_likelihood.mean(), logits

    return jax.grad(loss, has_aux=True)(parameters)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """What was measured on random tokens; deviations are in units of the largest logit, or gradient of a parameter."""

    logits: float
    permutation_floor: float
    """The largest deviation of permutations of the source, which only change the order of sums."""
    gradients: float
    """Deviation from the source's gradients times r; only plans without random numbers promise it."""


def grow(plan: GrowthPlan, specs: Mapping[str, ParamSpec], parameters: Arrays) -> tuple[dict[str, np.ndarray], Receipt]:
    """The grown parameters, and how exact they are."""
    check_plan(plan, specs, None)
    grown = grow_arrays("parameters", parameters, specs, plan, KINDS)
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab"], (4, 24))
    gradients, logits = compute_gradients(parameters, tokens)
    grown_gradients, grown_logits = compute_gradients(grown, tokens)
    floors = [
        deviation(compute_gradients(permute(parameters, specs, seed), tokens)[1], logits)
        for seed in range(NUM_PERMUTATIONS)
    ]
    bent = 0.0
    for name, spec in specs.items():
        wanted = np.asarray(gradients[name])
        for place, (axis, entry) in enumerate((axis, plan.maps.get(axis)) for axis in spec.axes):
            if entry is not None:
                r = dual_multipliers(axis, spec, entry)[1]
                wanted = np.take(wanted, entry.sources, axis=place) * along(r, place, wanted.ndim)
        bent = max(bent, deviation(grown_gradients[name], wanted))
    return grown, Receipt(deviation(grown_logits, logits), max(floors), bent)


def permute(parameters: Arrays, specs: Mapping[str, ParamSpec], seed: int) -> dict[str, np.ndarray]:
    """The same model with the entries of stream and units in another order."""
    random = np.random.default_rng(seed)
    orders = {axis: random.permutation(SIZES[axis]) for axis, kind in KINDS.items() if kind in ("stream", "units")}
    permuted = dict(parameters)
    for name, spec in specs.items():
        for place, axis in enumerate(spec.axes):
            if axis in orders:
                permuted[name] = np.take(permuted[name], orders[axis], axis=place)
    return permuted


def deviation(got: Any, wanted: Any) -> float:
    """The largest difference, in units of the largest wanted entry."""
    return float(np.max(np.abs(np.asarray(got) - np.asarray(wanted))) / np.max(np.abs(np.asarray(wanted))))


def main(arguments: list[str] | None = None, dtype: Any = np.float32) -> dict[str, Receipt]:
    """Grow it twice, with new capacity and in silence, and try what cannot be; print and return the receipts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tied", action="store_true", help="the embedding is the head, too")
    specs = declare(SIZES, tied=parser.parse_args(arguments).tied)
    random = np.random.default_rng(0)
    parameters = {
        name: (1 + 0.1 * random.standard_normal(spec.shape) if spec.gain
               else spec.init_std * random.standard_normal(spec.shape)).astype(dtype)
        for name, spec in specs.items()
    }  # fmt: skip
    receipts = {}
    for name, targets, choices in (
        ("all axes, copies parted by noise", TARGET, {"axes": {"mlp": "pad"}}),
        ("widths, in silence", TARGET | {"layers": SIZES["layers"]}, {"dynamics": "exact"}),
    ):
        plan = plan_axes(SIZES, targets, Choices.from_json(choices), kinds=KINDS)
        _, receipt = grow(plan, specs, parameters)
        receipts[name] = receipt
        print(f"{name} (promise {plan.promise}, plan {plan.hash[:12]})")
        for each in plan.axes:
            print(f"  {each.axis:8s} {each.source:3d} → {each.target:3d}  {each.describe()}")
        silent = plan.choices.dynamics == "exact"
        print(f"  logits {receipt.logits:.1e}, {receipt.logits / receipt.permutation_floor:.2f} × the permutation floor"
              + (f"; gradients within {receipt.gradients:.1e} of r times the source's" if silent else ""))  # fmt: skip
    try:
        plan_axes(SIZES, SIZES | {"rotary": 16}, Choices(), kinds=KINDS)
    except UsageError as refusal:
        print(f"refused: {refusal}")
    return receipts


if __name__ == "__main__":
    main()
