"""How many entries each axis has in a model of a given config."""

from t5pegasus.axes import LOGICAL_AXES, logical_axis
from t5pegasus.config import ModelConfig


def axis_size(axis: str, config: ModelConfig) -> int:
    """Number of entries along an axis of that name in a model of that config."""
    match logical_axis(axis):
        case "layers":
            return config.num_encoder_layers if axis.startswith("encoder.") else config.num_decoder_layers
        case "embed":
            return config.d_model
        case "heads":
            return config.num_heads
        case "qk" | "vo":
            return config.d_kv
        case "mlp":
            return config.d_ff
        case "vocab":
            return config.vocab_size
        case "relpos_buckets":
            directions = 2 if axis.startswith("encoder.") else 1
            return config.relative_attention_num_buckets + directions * len(config.relative_attention_boundaries)
        case other:
            raise ValueError(f"axis {axis!r} ends in {other!r}, which is none of {', '.join(LOGICAL_AXES)}")
