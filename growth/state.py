"""Growth of a training state in the host's memory, as a pure function."""

import numpy as np

from growth.leaves import grow_arrays
from growth.moments import grow_records
from growth.t5 import ModelGrowth
from t5pegasus.axes import AxisMultiplier
from t5pegasus.errors import UsageError
from t5pegasus.train.state import TrainState


def grow_state(state: TrainState, growth: ModelGrowth) -> TrainState:
    """The state of the grown model, in the host's memory.

    Args:
        state: of the source model; moments, records and average may be empty, as in a converted checkpoint.
        growth: where to; its seed decides every random number, together with the parameter's name.

    Returns:
        NumPy arrays in the precision of the given ones: parameters, moments, records of axes and moving average (by the
        operators and random numbers of the parameters) of the target's sizes; step and data position as they were.

    Raises:
        UsageError: if the plan has learned maps, which take batches.
    """
    plan = growth.plan
    if plan.choices.learned is not None:
        raise UsageError(
            "the plan has learned maps, which are trained on batches: growth.learned.learn_growth takes them"
        )
    grown = {}
    for group, arrays in growth.split_state(state._asdict()).items():
        specs, power = growth.parts[group]
        grown[group] = grow_arrays(group, arrays, specs, plan, power=power)
    records = {axis: AxisMultiplier(*map(np.asarray, each)) for axis, each in state.multipliers.items()}
    return state._replace(**grown, multipliers=grow_records(records, plan.maps, plan.born))
