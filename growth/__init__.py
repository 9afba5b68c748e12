"""Grow a trained model into a larger one that computes the same (docs/growth.md).

    from growth import grow_checkpoint, grow_state, plan_growth

    grow_checkpoint(Path("runs/small"), dataclasses.replace(config, d_model=768), Path("grown"))  # on disk, out of core

    growth = plan_growth(config, dataclasses.replace(config, d_model=768, num_encoder_layers=12), {"seed": 1})
    state = grow_state(state, growth)  # in memory

For other models than this project's: `growth.plan.plan_axes` and `growth.leaves.grow_arrays`, which take declarations
of axes (examples/decoder_only.py).
"""

import importlib
from typing import Any

_HOMES = {
    "Choices": "growth.choices",
    "LearningRatePolicy": "growth.choices",
    "ModelGrowth": "growth.t5",
    "plan_growth": "growth.t5",
    "grow_state": "growth.state",
    "learn_growth": "growth.learned",
    "grow_checkpoint": "growth.grow",
    "grow_on_mesh": "growth.mesh",
    "plan_axes": "growth.plan",
    "grow_arrays": "growth.leaves",
}


def __getattr__(name: str) -> Any:
    # Found when asked for, so that the core can be imported without the model and the training code.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
