"""The top of the page: the way the model came, and its most important numbers."""

from collections.abc import Sequence

from t5pegasus.report.markup import (
    Markup,
    absent,
    escape,
    join,
    section,
    show,
    show_difference,
    show_seconds,
    show_short,
)
from t5pegasus.report.runs import Growth, Json, Run
from t5pegasus.report.scores import read_rouge

GROWN_FIELDS = ("d_model", "d_ff", "num_heads", "d_kv", "num_encoder_layers", "num_decoder_layers")


def show_overview(runs: Sequence[Run]) -> Markup:
    """Headline figures of the last run and the runs before it, and the stages in their order."""
    chain = ancestry(runs[-1])
    tiles = [_parameters(chain), _steps(chain), _heldout(chain), _growth(chain), _rouge(chain)]
    return join([_stages(runs), Markup(f'<div class="tiles">{join(tiles)}</div>')])


def ancestry(run: Run) -> list[Run]:
    """A run and those it came from, the first one first."""
    return [*(ancestry(run.parent) if run.parent else []), run]


def describe_model(model: dict) -> str:
    """The shape of a model in one line."""
    return (
        f"d_model {model['d_model']}, {model['num_encoder_layers']}+{model['num_decoder_layers']} layers, "
        f"{model['num_heads']}×{model['d_kv']} heads, d_ff {model['d_ff']}"
    )


def describe_growth(growth: Growth) -> list[str]:
    """What grew: `d_model 64 → 96`, `d_ff 128 → 256`."""
    return describe_sizes(growth.plan["source"], growth.plan["target"])


def describe_sizes(source: Json, target: Json) -> list[str]:
    """The sizes in which two models differ."""
    return [f"{field} {source[field]} → {target[field]}" for field in GROWN_FIELDS if source[field] != target[field]]


def heldout_around_growth(run: Run) -> dict[str, float]:
    """Held-out losses before the growth a run began with, right after it and at its end: those that were measured."""
    step = run.growths[-1].step
    before = [loss for at, loss in run.parent.curve("heldout", "loss") if at == step] if run.parent else []
    own = run.curve("heldout", "loss")
    after = [loss for at, loss in own if at == step]
    measured = {"before growth": before[-1:], "right after": after[:1]}
    measured |= {f"at step {show(at)}": [loss] for at, loss in [point for point in own if point[0] > step][-1:]}
    return {when: losses[0] for when, losses in measured.items() if losses}


def _tile(label: str, chinese: str, value: str, note: str = "") -> Markup:
    return Markup(
        f'<div class="tile"><h3>{escape(label)} <span lang="zh">{escape(chinese)}</span></h3>'
        f"<b>{escape(value)}</b><p>{escape(note)}</p></div>"
    )


def _parameters(chain: Sequence[Run]) -> Markup:
    sizes: list[str] = []
    for run in chain:
        counts = [start["num_parameters"] for start in run.of_kind("start") if "num_parameters" in start][-1:]
        if run.own_growths:
            counts = [run.own_growths[0]["parameters_before"]]
            counts += [record["parameters_after"] for record in run.own_growths]
        for size in map(show_short, counts):
            if not sizes or sizes[-1] != size:
                sizes.append(size)
    return _tile("Parameters", "参数量", " → ".join(sizes) or "not recorded", describe_model(chain[-1].models[-1]))


def _steps(chain: Sequence[Run]) -> Markup:
    steps = sum(run.last_step - run.first_step for run in chain)
    trained = [record for run in chain for record in run.of_kind("train")]
    seconds = sum(record["seconds"] for record in trained)
    tokens = sum(record["seconds"] * record["tokens_per_second"] for record in trained)
    note = f"{show_short(tokens)} tokens in {show_seconds(seconds)} of training" if trained else "no training recorded"
    return _tile("Updates", "训练步数", show(steps), note)


def _heldout(chain: Sequence[Run]) -> Markup:
    grown = next((run for run in reversed(chain) if run.growths), None)
    if grown is not None:
        losses = heldout_around_growth(grown)
        note = " → ".join(losses)
    else:
        ends = chain[-1].curve("heldout", "loss")
        losses = {"first": ends[0][1], "last": ends[-1][1]} if ends else {}
        note = "first → last measurement"
    if not losses:
        return _tile("Held-out loss", "留出集损失", "not measured", "no held-out examples were given")
    return _tile("Held-out loss", "留出集损失", " → ".join(f"{loss:.3f}" for loss in losses.values()), note)


def _growth(chain: Sequence[Run]) -> Markup:
    growths = [growth for run in chain for growth in run.growths]
    own = [record for run in chain for record in run.own_growths]
    if own and (not growths or own[-1]["step"] >= growths[-1].step):
        difference = own[-1]["loss_after"] - own[-1]["loss_before"]
        note = f"loss right behind the last growth minus before, nats per token; growths in the run: {len(own)}"
        return _tile("Growth", "模型扩展", show_difference(difference), note)
    if not growths:
        return _tile("Growth", "模型扩展", "none", "this model has not been grown")
    receipt = growths[-1].receipt
    found = receipt["logits"].get("float32")
    if found is None:
        return _tile("Growth", "模型扩展", "arrays verified", "neither model was evaluated")
    floor = found["floor_maximum"]
    ratio = f", {found['maximum'] / floor:.2f} × the permutation floor" if floor else ""
    note = f"max |Δlogit|{ratio}; ΔNLL {show_difference(receipt['nll_difference'])}"
    return _tile("Growth", "模型扩展", f"{found['maximum']:.1e}", note)


def _rouge(chain: Sequence[Run]) -> Markup:
    rouge = read_rouge(chain[-1].evaluation.scores)
    if rouge is None:
        return _tile("ROUGE-1 / 2 / L", "评测", "not evaluated", "t5pegasus evaluate writes scores.json")
    return _tile("ROUGE-1 / 2 / L", "评测", rouge.evaluated, f"F1 in percent; lead baseline {rouge.lead}")


def _stages(runs: Sequence[Run]) -> Markup:
    """The stages as a strip: run → growth → run, and so on."""
    parts = []
    for run in runs:
        if run.paths["start_from"] and run.parent is None and not run.growths:
            parts.append(absent(f"{run.name} started from {run.paths['start_from']}, whose run is not here"))
        parts += [
            Markup(
                f'<li class="seam"><b>grow</b> <span>at step {show(growth.step)}</span>'
                f"<small>{escape(', '.join(describe_growth(growth)))}</small></li>"
            )
            for growth in run.growths
        ]
        span = f"steps {show(run.first_step)} – {show(run.last_step)}" if run.records else "no metrics.jsonl"
        parts.append(
            Markup(
                f"<li><b>{escape(run.name)}</b> <span>{span}</span>"
                f"<small>{escape(describe_model(run.models[-1]))}</small></li>"
            )
        )
        parts += [
            Markup(
                f'<li class="seam"><b>grown in {escape(run.name)}</b> <span>at step {show(record["step"])}</span>'
                f"<small>{escape(', '.join(describe_sizes(record['source'], record['target'])))}</small></li>"
            )
            for record in run.own_growths
        ]
    return section("Stages", "训练阶段", Markup(f'<ol class="stages">{join(parts)}</ol>'))
