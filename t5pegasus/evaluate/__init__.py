"""How good summaries are: scores with their intervals, baselines, the oracle of n candidates, held-out loss.

scores (of pairs and corpora; no JAX) is what others need, such as the choice of a checkpoint while fine-tuning.
"""

from t5pegasus.evaluate.scores import DEFINITIONS, score_pairs

__all__ = ["DEFINITIONS", "score_pairs"]
