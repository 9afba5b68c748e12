"""T5's forward in NumPy, float64, matrix by matrix: the oracle that shares no code with the model.

Written from Raffel et al. 2020 (T5), Shazeer 2020 (gated units), and the published code of bert4keras for what T5
PEGASUS does differently. Weights go by Hugging Face's names, kernels are [out, in].
"""

import math

import numpy as np

from t5pegasus.config import ModelConfig


def bucket_by_cases(
    distance: int, *, bidirectional: bool, num_buckets: int, max_distance: int, boundaries: tuple[int, ...] = ()
) -> int:
    """The bucket of key position − query position; the logarithm in float32, as every implementation has it.

    Where a distance has reached boundaries, its bucket is that of the last one: behind the formula's, in the encoder
    first the one that looks back, then the one that looks ahead.
    """
    first = 0
    reached = [boundary for boundary in boundaries if boundary <= (abs(distance) if bidirectional else -distance)]
    if reached and bidirectional:
        return num_buckets + 2 * (len(reached) - 1) + (1 if distance > 0 else 0)
    if reached:
        return num_buckets + len(reached) - 1
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        back = abs(distance)
    else:
        back = max(-distance, 0)
    exact = num_buckets // 2
    if back < exact:
        return first + back
    ratio = np.log(np.float32(back) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    return first + min(exact + int(ratio * np.float32(num_buckets - exact)), num_buckets - 1)


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def forward(weights, config: ModelConfig, source, source_mask, decoder_input) -> np.ndarray:
    """Logits [target, vocab] of one example.

    Args:
        weights: tensors by Hugging Face's names; a tied model has no `lm_head.weight`.
        config: sizes and numerics.
        source: ids [source].
        source_mask: bool [source], False on padding.
        decoder_input: ids [target].
    """
    return Forward(weights, config).logits(np.asarray(source), np.asarray(source_mask, bool), np.asarray(decoder_input))


class Forward:
    def __init__(self, weights, config: ModelConfig):
        self.weights = {name: np.asarray(tensor, np.float64) for name, tensor in weights.items()}
        self.config = config

    def logits(self, source, source_mask, decoder_input):
        config = self.config
        hidden = np.where(source_mask, 0.0, -np.inf)[None, None, :]
        x = self.weights["shared.weight"][source]
        bias = self.bias("encoder", len(source), len(source), bidirectional=True) + hidden
        for layer in range(config.num_encoder_layers):
            block = f"encoder.block.{layer}.layer"
            normed = self.norm(x, f"{block}.0.layer_norm")
            x = x + self.attention(normed, normed, f"{block}.0.SelfAttention", bias)
            x = x + self.feed_forward(self.norm(x, f"{block}.1.layer_norm"), f"{block}.1.DenseReluDense")
        encoded = self.norm(x, "encoder.final_layer_norm")

        x = self.weights["shared.weight"][decoder_input]
        num_targets = len(decoder_input)
        causal = np.where(np.tri(num_targets, dtype=bool), 0.0, -np.inf)
        bias = self.bias("decoder", num_targets, num_targets, bidirectional=False) + causal
        cross_bias = hidden
        if config.cross_attention_bias:
            cross_bias = hidden + self.bias("decoder", num_targets, len(source), bidirectional=False)
        for layer in range(config.num_decoder_layers):
            block = f"decoder.block.{layer}.layer"
            normed = self.norm(x, f"{block}.0.layer_norm")
            x = x + self.attention(normed, normed, f"{block}.0.SelfAttention", bias)
            normed = self.norm(x, f"{block}.1.layer_norm")
            x = x + self.attention(normed, encoded, f"{block}.1.EncDecAttention", cross_bias)
            x = x + self.feed_forward(self.norm(x, f"{block}.2.layer_norm"), f"{block}.2.DenseReluDense")
        x = self.norm(x, "decoder.final_layer_norm")
        if config.scale_decoder_outputs:
            x = x / math.sqrt(config.d_model)
        logits = x @ self.weights["shared.weight" if config.tie_word_embeddings else "lm_head.weight"].T
        logits[:, len(logits[0]) - config.num_masked_tokens :] = -np.inf
        return logits

    def norm(self, x, name):
        mean_square = (x**2).mean(-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config.layer_norm_epsilon) * self.weights[f"{name}.weight"]

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T

    def attention(self, x, memory, name, bias):
        heads, size = self.config.num_heads, self.config.d_kv
        query, key, value = (
            self.linear(y, f"{name}.{letter}").reshape(len(y), heads, size).transpose(1, 0, 2)
            for y, letter in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        scores = query @ key.transpose(0, 2, 1) + bias
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        return self.linear(mixed.transpose(1, 0, 2).reshape(len(x), heads * size), f"{name}.o")

    def feed_forward(self, x, name):
        if self.config.feed_forward_proj == "relu":
            return self.linear(np.maximum(self.linear(x, f"{name}.wi"), 0), f"{name}.wo")
        gelu = {"gated-gelu": tanh_gelu, "gated-gelu-erf": exact_gelu}[self.config.feed_forward_proj]
        return self.linear(gelu(self.linear(x, f"{name}.wi_0")) * self.linear(x, f"{name}.wi_1"), f"{name}.wo")

    def bias(self, stack, num_queries, num_keys, *, bidirectional):
        """[heads, queries, keys] of a stack's table."""
        of_pair = [
            [
                bucket_by_cases(
                    key - query,
                    bidirectional=bidirectional,
                    num_buckets=self.config.relative_attention_num_buckets,
                    max_distance=self.config.relative_attention_max_distance,
                    boundaries=self.config.relative_attention_boundaries,
                )
                for key in range(num_keys)
            ]
            for query in range(num_queries)
        ]
        table = self.weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        return table[np.array(of_pair)].transpose(2, 0, 1)
