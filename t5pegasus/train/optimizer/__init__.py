"""One update by the chosen optimizer, the same for grown and for plain models (docs/growth.md, dynamics).

With a weight multiplied by s and its gradient by r, each optimizer finds the direction that the model before growth
would have taken; the entry then moves by s times that, so that training after growth is the image of the source's.
"""

from t5pegasus.train.optimizer.accumulation import accumulate_gradients, apply_accumulated
from t5pegasus.train.optimizer.moments import Moments, declare_moments, init_moments
from t5pegasus.train.optimizer.multipliers import init_multipliers, leaf_multipliers, weighted_norm
from t5pegasus.train.optimizer.schedule import make_schedule, rewarm_factor
from t5pegasus.train.optimizer.update import apply_optimizer, keep_frozen

__all__ = [
    "Moments", "accumulate_gradients", "apply_accumulated", "apply_optimizer", "declare_moments", "init_moments",
    "init_multipliers", "keep_frozen", "leaf_multipliers", "make_schedule", "rewarm_factor", "weighted_norm",
]  # fmt: skip
