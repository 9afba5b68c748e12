"""What every block of the model is made of: declared parameters, RMS norm, gated feed-forward, dropout by row."""

import jax
import jax.numpy as jnp
from flax import nnx

from t5pegasus.axes import ParamSpec
from t5pegasus.config import ModelConfig
from t5pegasus.model.backward import gated_gelu, project
from t5pegasus.model.sizes import axis_size
from t5pegasus.sharding import constrain

# Single letters in einsum strings, here and in the other model files:
# b batch · t target (query) position · s source (key) position · d embed · h heads · k qk or vo · f mlp · v vocab
# · r bucket


def declare(
    config: ModelConfig,
    *axes: str,
    contracted: tuple[str, ...] = (),
    gain: bool = False,
    std: float | None = None,
    size_powers: tuple[tuple[str, float], ...] = (),
    meets_written: tuple[str, ...] = (),
) -> nnx.Param:
    """A parameter with the full name of each axis; everything else about it follows from this line (`ParamSpec`).

    The value is zeros and only its shape is meant: `init_parameters` draws real ones from the declaration.
    """
    shape = tuple(axis_size(axis, config) for axis in axes)
    return nnx.Param(
        jnp.zeros(shape, jnp.float32), spec=ParamSpec(axes, contracted, gain, shape, std, size_powers, meets_written)
    )


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32 at least (Zhang & Sennrich 2019); no mean, no bias."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + epsilon) * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


class FeedForward(nnx.Module):
    """wo(gelu(x·wi_0) ⊙ x·wi_1), GELU in tanh or exact form (Shazeer 2020, GEGLU); or wo(relu(x·wi)), T5's first."""

    def __init__(self, config: ModelConfig, stack: str):
        self.activation = config.feed_forward_proj
        self.drops = config.inner_dropout
        mlp = f"{stack}.mlp"
        if self.activation == "relu":
            self.wi = declare(config, f"{stack}.layers", "embed", mlp, contracted=("embed",))
        else:
            self.wi_0 = declare(config, f"{stack}.layers", "embed", mlp, contracted=("embed",))
            self.wi_1 = declare(config, f"{stack}.layers", "embed", mlp, contracted=("embed",))
        self.wo = declare(config, f"{stack}.layers", mlp, "embed", contracted=(mlp,))

    def __call__(self, x: jax.Array, dropout: "Dropout") -> jax.Array:
        """[batch, length, embed] → the same shape."""
        if self.activation == "relu":
            hidden = jax.nn.relu(project("btd,df->btf", x, self.wi[...]))
        else:
            gate = project("btd,df->btf", x, self.wi_0[...])
            up = project("btd,df->btf", x, self.wi_1[...])
            hidden = gated_gelu(gate, up, self.activation == "gated-gelu")
        hidden = constrain(hidden, "batch", "length", "mlp")
        if self.drops:
            hidden = dropout(hidden, "mlp")
        return project("btf,fd->btd", hidden, self.wo[...])


class Dropout:
    """Dropout keyed by (seed, row, place): a row draws the same masks in whatever batch or micro-batch it stands.

    Args:
        rate: probability of zero; 0 switches it off, as does `row_keys=None`.
        row_keys: one PRNG key per row of the batch, [batch].
    """

    PLACES = (
        "embedding",
        "self_weights",
        "self_output",
        "cross_weights",
        "cross_output",
        "mlp",
        "mlp_output",
        "final",
    )

    def __init__(self, rate: float, row_keys: jax.Array | None):
        self.rate = rate
        self.row_keys = row_keys if rate > 0 else None

    @classmethod
    def of_rows(cls, rate: float, seed: jax.Array | int, row_ids: jax.Array) -> "Dropout":
        """The dropout of these rows (uint32 [batch]) under this seed."""
        return cls(rate, jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_ids))

    def fold(self, number: jax.Array | int) -> "Dropout":
        """An independent one for a layer or a stack."""
        if self.row_keys is None:
            return self
        return Dropout(self.rate, jax.vmap(jax.random.fold_in, (0, None))(self.row_keys, number))

    def __call__(self, x: jax.Array, place: str, shared_axis: int | None = None) -> jax.Array:
        """Drop entries of x, [batch, …]; along `shared_axis` all entries share one mask."""
        if self.row_keys is None:
            return x
        shape = tuple(1 if axis == shared_axis else size for axis, size in enumerate(x.shape))[1:]
        kept = self.fold(self.PLACES.index(place))._draw(shape)
        return jnp.where(kept, x / (1.0 - self.rate), 0).astype(x.dtype)

    def _draw(self, shape: tuple[int, ...]) -> jax.Array:
        """Bool [batch, *shape], True with probability 1 − rate, for which 16 random bits are enough.

        The two halves of a number are two neighbours in the first dimension of `shape`, so that entries which are
        next to one another in memory take theirs from numbers which are, too, and no device needs another's.
        """
        length, *rest = shape
        numbers = jax.vmap(lambda key: jax.random.bits(key, (-(-length // 2), *rest)))(self.row_keys)
        limit = round((1.0 - self.rate) * 2**16)
        kept = jnp.stack([numbers & 0xFFFF < limit, numbers >> 16 < limit], axis=2)
        return kept.reshape(len(kept), -1, *rest)[:, :length]
