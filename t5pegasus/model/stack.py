"""A stack of layers: attention and feed-forward, each behind its norm and added to the stream, run by `lax.scan`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5pegasus.config import ModelConfig
from t5pegasus.model.attention import Attention, declare_relative_bias
from t5pegasus.model.execution import Execution
from t5pegasus.model.layers import Dropout, FeedForward, declare, rms_norm


class EncoderLayer(nnx.Module):
    """Self-attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, config: ModelConfig, execution: Execution):
        self.epsilon, self.execution = config.layer_norm_epsilon, execution
        self.pre_attention_norm = declare(config, "encoder.layers", "embed", gain=True)
        self.self_attention = Attention(config, "encoder.self", execution)
        self.pre_mlp_norm = declare(config, "encoder.layers", "embed", gain=True)
        self.mlp = FeedForward(config, "encoder")

    def __call__(self, x: jax.Array, mask: jax.Array, bias: jax.Array, dropout: Dropout) -> jax.Array:
        """X [b, s, embed], mask bool [b, s, s], bias [1, heads, s, s] → [b, s, embed]."""
        normed = self.execution.gather(rms_norm(x, self.pre_attention_norm[...], self.epsilon))
        keys, values = self.self_attention.project_keys_values(normed)
        attended = self.self_attention.attend(normed, keys, values, mask, bias, dropout)
        x += dropout(self.execution.scatter(attended), "self_output")
        normed = self.execution.gather(rms_norm(x, self.pre_mlp_norm[...], self.epsilon))
        x += dropout(self.execution.scatter(self.mlp(normed, dropout)), "mlp_output")
        return self.execution.scatter(x)


class DecoderLayer(nnx.Module):
    """Causal self-attention, cross-attention, feed-forward."""

    def __init__(self, config: ModelConfig, execution: Execution):
        self.epsilon, self.execution = config.layer_norm_epsilon, execution
        self.pre_attention_norm = declare(config, "decoder.layers", "embed", gain=True)
        self.self_attention = Attention(config, "decoder.self", execution)
        self.pre_cross_attention_norm = declare(config, "decoder.layers", "embed", gain=True)
        self.cross_attention = Attention(config, "decoder.cross", execution)
        self.pre_mlp_norm = declare(config, "decoder.layers", "embed", gain=True)
        self.mlp = FeedForward(config, "decoder")

    def __call__(
        self,
        x: jax.Array,
        self_keys_values: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
        self_mask: jax.Array,
        bias: jax.Array,
        cross_keys_values: tuple[jax.Array, jax.Array],
        cross_mask: jax.Array,
        cross_bias: jax.Array | None,
        dropout: Dropout,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """X [b, t, embed] → the same, and the self-attention keys and values that were attended to.

        `self_keys_values` turns the keys and values of x into those to attend to: the identity in training, an
        update of the cache in decoding. Masks are bool [b, t, s], biases [1 or b, heads, t, s].
        """
        normed = self.execution.gather(rms_norm(x, self.pre_attention_norm[...], self.epsilon))
        own = self_keys_values(*self.self_attention.project_keys_values(normed))
        attended = self.self_attention.attend(normed, *own, self_mask, bias, dropout)
        x += dropout(self.execution.scatter(attended), "self_output")
        normed = self.execution.gather(rms_norm(x, self.pre_cross_attention_norm[...], self.epsilon))
        crossed = self.cross_attention.attend(normed, *cross_keys_values, cross_mask, cross_bias, dropout)
        x += dropout(self.execution.scatter(crossed), "cross_output")
        normed = self.execution.gather(rms_norm(x, self.pre_mlp_norm[...], self.epsilon))
        x += dropout(self.execution.scatter(self.mlp(normed, dropout)), "mlp_output")
        return self.execution.scatter(x), own


class Stack(nnx.Module):
    """The layers of one side, their relative bias table and the norm after the last."""

    def __init__(self, config: ModelConfig, side: str, execution: Execution):
        self.layers = (EncoderLayer if side == "encoder" else DecoderLayer)(config, execution)
        self.relative_bias = declare_relative_bias(config, side)
        if side == "decoder" and config.tie_word_embeddings:
            self.final_norm = declare(
                config, "embed", gain=True, size_powers=head_scale(config), meets_written=("embed",)
            )
        else:
            self.final_norm = declare(config, "embed", gain=True)


def scan_layers(layers: Any, body: Callable[[Any, jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Run `body(layer, index, x) -> x` over the stacked layers."""
    graph, stacked = nnx.split(layers)
    depth = jax.tree.leaves(stacked)[0].shape[0]
    execution: Execution = layers.execution

    def step(x: jax.Array, inputs: Any) -> tuple[jax.Array, None]:
        index, weights = inputs
        return body(nnx.merge(graph, weights), index, execution.name_input(x)), None

    unroll = min(execution.scan_unroll, depth)
    return jax.lax.scan(execution.checkpoint(step), x, (jnp.arange(depth), stacked), unroll=unroll)[0]


def head_scale(config: ModelConfig) -> tuple[tuple[str, float], ...]:
    """The `size_powers` of what the head reads with."""
    return (("embed", -0.5),) if config.scale_decoder_outputs else ()
