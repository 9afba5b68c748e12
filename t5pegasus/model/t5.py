"""The T5 encoder-decoder in the numerics of its families (Raffel et al. 2020; Shazeer 2020; Xue et al. 2021).

Modules declare and own parameters; layers are stacked on a leading axis and run by `lax.scan`, and the relative
bias is computed once per stack outside the scan. The outside world sees flat dicts of dotted names and arrays.
"""

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from t5pegasus.axes import ParamSpec
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.model.attention import relative_bias
from t5pegasus.model.backward import project
from t5pegasus.model.embedding import look_up
from t5pegasus.model.execution import PLAIN, Execution
from t5pegasus.model.layers import Dropout, declare, rms_norm
from t5pegasus.model.stack import DecoderLayer, EncoderLayer, Stack, head_scale, scan_layers
from t5pegasus.sharding import constrain


class T5(nnx.Module):
    """The model. Create it through `bind`; see the functions below for parameters by name."""

    def __init__(self, config: ModelConfig, compute_dtype: Any = jnp.float32, execution: Execution = PLAIN):
        self.config, self.compute_dtype, self.execution = config, compute_dtype, execution
        self.token_embedding = declare(config, "vocab", "embed")
        self.encoder = Stack(config, "encoder", execution)
        self.decoder = Stack(config, "decoder", execution)
        if not config.tie_word_embeddings:
            self.lm_head = declare(config, "embed", "vocab", contracted=("embed",), size_powers=head_scale(config))

    def __call__(self, batch: Batch, dropout_seed: jax.Array | int | None = None) -> jax.Array:
        """Logits of a batch by teacher forcing, float32 [batch, target, vocab]; arguments as of `read`."""
        return self.logits(self.read(batch, dropout_seed), self.head())

    def read(self, batch: Batch, dropout_seed: jax.Array | int | None = None) -> jax.Array:
        """What the head turns into logits, [batch, target, embed], by teacher forcing.

        Args:
            batch: packed rows.
            dropout_seed: switches dropout on; its masks depend on (seed, row id) only.
        """
        rate = self.config.dropout_rate
        off = Dropout(0.0, None)
        dropout = off if dropout_seed is None else Dropout.of_rows(rate, dropout_seed, batch.row_ids)
        encoded = self.encode(batch.encoder_input_tokens, batch.encoder_segment_ids, dropout.fold(0))
        return self.decode_states(
            batch.decoder_input_tokens,
            batch.decoder_segment_ids,
            encoded,
            batch.encoder_segment_ids,
            positions=(batch.decoder_positions, batch.encoder_positions),
            dropout=dropout.fold(1),
        )

    def encode(self, tokens: jax.Array, segment_ids: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Source tokens int32 [b, s] and their segment ids (see `Batch`) → [b, s, embed]."""
        dropout = dropout or Dropout(0.0, None)
        x = self.embed(tokens, dropout)
        positions = jnp.arange(tokens.shape[1])[None]
        bias = relative_bias(self.encoder.relative_bias[...], positions, positions, self.config, bidirectional=True)
        mask = _same_segment(segment_ids, segment_ids)

        def body(layer: EncoderLayer, index: jax.Array, x: jax.Array) -> jax.Array:
            return layer(x, mask, bias, dropout.fold(index))

        x = scan_layers(self.encoder.layers, body, x)
        return self.execution.gather(self._finish(x, self.encoder, dropout))  # once, not in every decoder layer

    def decode(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        *,
        positions: tuple[jax.Array, jax.Array],
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Logits float32 [b, t, vocab]; arguments as of `decode_states`."""
        x = self.decode_states(
            tokens, segment_ids, encoded, encoder_segment_ids, positions=positions, dropout=dropout
        )  # fmt: skip
        return self.logits(x, self.head())

    def decode_states(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array,
        encoded: jax.Array,
        encoder_segment_ids: jax.Array,
        *,
        positions: tuple[jax.Array, jax.Array],
        dropout: Dropout | None = None,
    ) -> jax.Array:
        """Decoder inputs int32 [b, t] and an encoded source [b, s, embed] → what the head reads, [b, t, embed].

        `positions` are those within the segments, of decoder and encoder, int32 [1 or b, t] and [1 or b, s].
        """
        dropout = dropout or Dropout(0.0, None)
        x = self.embed(tokens, dropout)
        indices = jnp.arange(tokens.shape[1])[None]
        bias = relative_bias(self.decoder.relative_bias[...], indices, indices, self.config, bidirectional=False)
        causal = _same_segment(segment_ids, segment_ids) & (indices[:, :, None] >= indices[:, None, :])
        cross_mask = _same_segment(segment_ids, encoder_segment_ids)
        cross_bias = self.cross_bias(*positions)

        def body(layer: DecoderLayer, index: jax.Array, x: jax.Array) -> jax.Array:
            cross = layer.cross_attention.project_keys_values(encoded)
            return layer(x, lambda *own: own, causal, bias, cross, cross_mask, cross_bias, dropout.fold(index))[0]

        return self._finish_decoder(scan_layers(self.decoder.layers, body, x), dropout)

    def embed(self, tokens: jax.Array, dropout: Dropout | None = None) -> jax.Array:
        """Tokens int32 [b, t] → [b, t, embed]."""
        dropout = dropout or Dropout(0.0, None)
        x = look_up(
            self.token_embedding[...], tokens, self.compute_dtype, split_length=self.execution.split_length
        )  # fmt: skip
        return self.execution.scatter(dropout(x, "embedding"))

    def _finish(self, x: jax.Array, stack: Stack, dropout: Dropout) -> jax.Array:
        normed = rms_norm(x, stack.final_norm[...], self.config.layer_norm_epsilon)
        return self.execution.scatter(dropout(normed, "final"))

    def cross_bias(self, positions: jax.Array, encoder_positions: jax.Array) -> jax.Array | None:
        """What bert4keras adds to cross-attention: the decoder's table, of source positions as if they lay behind."""
        if not self.config.cross_attention_bias:
            return None
        table = self.decoder.relative_bias[...]
        return relative_bias(table, positions, encoder_positions, self.config, bidirectional=False)

    def head(self) -> jax.Array:
        """What turns the decoder's output into logits, [embed, vocab], in the type of the parameters."""
        return self.token_embedding[...].T if self.config.tie_word_embeddings else self.lm_head[...]

    def _finish_decoder(self, x: jax.Array, dropout: Dropout) -> jax.Array:
        x = self._finish(x, self.decoder, dropout)
        return x * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else x

    def read_out(self, x: jax.Array, head: jax.Array) -> jax.Array:
        """The last decoder layer's output [b, t, embed], without dropout → float32 logits [b, t, vocab]."""
        return self.logits(self._finish_decoder(x, Dropout(0.0, None)), head)

    def logits(self, x: jax.Array, head: jax.Array) -> jax.Array:
        """What the head reads, [b, t, embed] → logits [b, t, vocab], float32 at least."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        logits = project("btd,dv->btv", x, head, wide)
        logits = constrain(logits, "batch", "length", "vocab")
        if self.config.num_masked_tokens == 0:
            return logits
        # Finite, so that differences of logits are numbers; its exponential is 0, and so is the head's gradient.
        return jnp.where(open_tokens(logits, self.config), logits, jnp.finfo(wide).min / 2)


def open_tokens(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Where logits [..., vocab] are of tokens that can be written (`num_masked_tokens`); bool of the same shape."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) < config.num_open_tokens


def _same_segment(query_ids: jax.Array, key_ids: jax.Array) -> jax.Array:
    """[b, t], [b, s] → bool [b, t, s]: whether the query reads the segment that the key is seen in."""
    return (jnp.abs(query_ids)[:, :, None] == key_ids[:, None, :]) & (key_ids[:, None, :] > 0)


@functools.cache
def _skeleton(
    config: ModelConfig, compute_dtype: Any, execution: Execution = PLAIN
) -> tuple[Any, dict[str, tuple[tuple, nnx.Param]]]:
    """The module graph, and by dotted name the path and the (shape-only) variable of each parameter."""
    graph, state = nnx.split(nnx.eval_shape(lambda: T5(config, compute_dtype, execution)))
    return graph, {".".join(map(str, path)): (path, variable) for path, variable in nnx.to_flat_state(state)}


@functools.cache
def declare_parameters(config: ModelConfig) -> dict[str, ParamSpec]:
    """Every parameter's declaration, by dotted name."""
    return {name: variable.spec for name, (_, variable) in sorted(_skeleton(config, jnp.float32)[1].items())}


def count_parameters(config: ModelConfig) -> int:
    """Number of trained scalars."""
    return sum(math.prod(spec.shape) for spec in declare_parameters(config).values())


def init_parameters(config: ModelConfig, seed: int | jax.Array) -> dict[str, jax.Array]:
    """Fresh float32 parameters: gains one, all else N(0, std of the declaration).

    Each parameter has a key of its own name, so adding one to the model leaves the others' values alone.
    """
    key = jax.random.key(seed)

    def draw(name: str, spec: ParamSpec) -> jax.Array:
        if spec.gain:
            return jnp.ones(spec.shape, jnp.float32)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return spec.init_std * jax.random.normal(own, spec.shape, jnp.float32)

    return {name: draw(name, spec) for name, spec in declare_parameters(config).items()}


def bind(
    config: ModelConfig,
    parameters: Mapping[str, Any],
    compute_dtype: Any = jnp.float32,
    execution: Execution = PLAIN,
) -> T5:
    """A model that computes with these arrays; cheap, meant to be called inside jitted functions.

    Args:
        config: the model's shape.
        parameters: arrays by dotted name.
        compute_dtype: of activations and matrix products; norms, softmax and logits are float32 at least.
        execution: choices of speed and memory.

    Raises:
        ValueError: if the names are not exactly the declared ones.
    """
    graph, variables = _skeleton(config, jnp.dtype(compute_dtype), execution)
    if parameters.keys() != variables.keys():
        different = sorted(parameters.keys() ^ variables.keys())
        raise ValueError(f"parameters do not fit the config; missing or surplus: {', '.join(different[:8])}")
    state = nnx.from_flat_state(
        {path: variable.replace(parameters[name]) for name, (path, variable) in variables.items()}
    )
    return nnx.merge(graph, state)
