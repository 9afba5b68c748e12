"""Matrix-product FLOPs of an encoder-decoder, for MFU (model FLOPs utilisation; Chowdhery et al. 2022, app. B)."""

from t5pegasus.config import ModelConfig


def training_flops_per_row(config: ModelConfig, source_tokens: int, target_tokens: int) -> float:
    """FLOPs of forward and backward for one row of S source and T target positions.

    Two FLOPs per multiply-add, backward twice the forward, recomputation not counted; decoder self-attention
    halved for causality, the encoder dense. T5-base v1.1 at 512/114 and 32,128 tokens: 0.425 TFLOP.
    """
    d, inner = config.d_model, config.num_heads * config.d_kv
    s, t = source_tokens, target_tokens
    projections = 4 * d * inner + (2 if config.feed_forward_proj == "relu" else 3) * d * config.d_ff
    encoder = config.num_encoder_layers * (projections * s + 2 * s * s * inner)
    decoder = config.num_decoder_layers * (projections * t + t * t * inner)
    cross = config.num_decoder_layers * (2 * d * inner * t + 2 * d * inner * s + 2 * s * t * inner)
    head = d * config.vocab_size * t
    return 6.0 * (encoder + decoder + cross + head)
