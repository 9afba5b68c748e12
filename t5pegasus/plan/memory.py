"""Memory of a step per device: the state exactly, from shapes and shardings; activations as compiled, or estimated.

The estimate is for hardware that nothing can be compiled for here, and for sorting candidates before they are compiled.
It counts what the backward pass keeps of each layer under a remat policy, the logits that are there at once, the
gradients, and the weights gathered for one layer.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.config import RunConfig
from t5pegasus.model.attention_kernel import cudnn_obstacle
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import param_shardings
from t5pegasus.train.estimate import abstract_batch, abstract_state, bytes_per_device
from t5pegasus.train.head_loss import choose_chunk


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    parameters: int
    optimizer: int
    average: int
    """The moving average of the parameters."""
    batch: int
    temporaries: int
    """Activations, gradients, gathered weights, code."""
    limit: int | None
    """What the device has, or what its compiler may use of that."""
    is_estimate: bool

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.average + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device has so much."""
        return self.limit is None or self.total <= self.limit


def state_memory(config: RunConfig, mesh: Any) -> dict[str, int]:
    """Bytes per device of `parameters`, `optimizer` (with growth's record), `average` and `batch`: exact.

    Args:
        config: of the run.
        mesh: of devices, or described only (`AbstractMesh`).
    """
    # What does not change shapes is made the same, so that a search counts each mesh once.
    train = dataclasses.replace(config.train, remat="none", accumulation_steps=1)
    return dict(_state_memory(dataclasses.replace(config, train=train), mesh))


@functools.lru_cache(maxsize=256)
def _state_memory(config: RunConfig, mesh: Any) -> dict[str, int]:
    state = abstract_state(config, mesh)

    def total(tree: Any) -> int:
        return sum(bytes_per_device(leaf) for leaf in jax.tree.leaves(tree))

    parameters, average = total(state.parameters), total(state.ema)
    return {
        "parameters": parameters,
        "optimizer": total(state) - parameters - average,
        "average": average,
        "batch": total(abstract_batch(config, mesh)),
    }


def estimate_temporaries(config: RunConfig, mesh: Any, platform: str) -> int:
    """Bytes per device of activations, gradients and gathered weights, without compiling anything.

    Args:
        config: with a `compute_dtype` that is not auto.
        mesh: described only (`AbstractMesh`).
        platform: `tpu`, `gpu` or `cpu`; on GPUs fused attention keeps no weights of pairs of positions.
    """
    model, data, train = config.model, config.data, config.train
    tensor = mesh.shape["tensor"]
    rows = train.batch_size / train.accumulation_steps / (mesh.shape["data"] * mesh.shape["fsdp"])
    wide = 4 if train.compute_dtype == "float32" else 2
    s, t = data.max_source_tokens, data.max_target_tokens
    d, heads, inner = model.d_model, model.num_heads / tensor, model.num_heads * model.d_kv / tensor
    hidden = model.d_ff / tensor
    drops = model.dropout_rate > 0
    stream = d * (wide + 4 / (tensor if train.split_length else 1))
    # Of one layer: what products with weights give (kept by `dots`), and what else the backward pass reads.
    products = wide * (4 * inner + 3 * hidden + 2 * d)
    rest = stream * 2 + wide * 2 * hidden + (drops * (hidden + 2 * d))
    lengths = (s, t)
    fused = train.attention != "plain" and not cudnn_obstacle(
        platform, jnp.dtype(train.compute_dtype), model.d_kv, lengths
    )
    scores = 0.0 if fused else heads * (wide + 4 + drops)
    # The bias and its mask, and their gradient, which fused attention has once for all layers.
    biases = heads * (s * s + t * t + s * t) * (wide + 4) if fused else 0.0

    def layer(length: int, pairs: float, blocks: float) -> float:
        kept = {
            "none": length * (blocks * (products + rest)) + pairs * scores,
            "dots": length * (blocks * products + stream),
            "full": length * stream,
            "offload": 0.0,
        }
        return kept[train.remat]

    encoder, decoder = layer(s, s * s, 1.0), layer(t, t * t + s * t, 1.5)
    decoder += {"none": s * wide * 2 * inner, "dots": s * wide * 2 * inner}.get(train.remat, 0.0)
    recomputed = 0.0 if train.remat == "none" else s * (products + rest) + s * s * scores
    kept = model.num_encoder_layers * encoder + model.num_decoder_layers * decoder
    with jax.sharding.use_abstract_mesh(mesh):
        chosen = choose_chunk(config, (train.batch_size // train.accumulation_steps, t), 4)
    chunk = min(chosen or model.vocab_size, model.vocab_size / tensor)
    logits = t * chunk * (4 + wide)
    specs = declare_parameters(model)
    gathered = sum(math.prod(spec.shape[1:]) for spec in specs.values() if "layers" in spec.axes[0]) / tensor * wide * 2
    head = chunk * d * (wide + 4)
    shards = param_shardings(specs, mesh)
    gradients = 4 * sum(math.prod(shards[name].shard_shape(spec.shape)) for name, spec in specs.items())
    return int(rows * (kept + recomputed + logits + biases) + gathered + head + gradients)
