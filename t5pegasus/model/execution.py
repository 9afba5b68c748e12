"""How a model is computed: choices of speed and memory that change no result by more than rounding."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from t5pegasus.model.backward import PRODUCT
from t5pegasus.sharding import constrain

LAYER_INPUT = "layer_input"
"""The name of what a layer reads from the stream, for remat policies."""

Remat = Literal["none", "dots", "full", "offload"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How the layers run. The default is the plainest way, which every backend and every shape has."""

    remat: Remat = "none"
    """What the backward pass computes anew: nothing; all but the products with weights (dots); all but the layers'
    inputs (full); the same with these inputs in the host's memory (offload). Chen et al. 2016."""
    scan_unroll: int = 1
    """Layers per iteration of the scan."""
    attention: Literal["plain", "cudnn"] = "plain"
    """Which kernel computes attention (`model.attention_kernel`)."""
    split_length: bool = False
    """Between its blocks the stream is split over the tensor axis by length, so that norms, dropout and sums are
    shared out, too (sequence parallelism, Korthikanti et al. 2022)."""

    split_width: bool = False
    """The stream is split over the fsdp axis by its width as the weights are, not by rows, and so comes to the weights
    instead of these to it: for decoding, where it is the smaller one by far (Pope et al. 2022, weight-stationary)."""

    def scatter(self, x: jax.Array) -> jax.Array:
        """What is added to the stream, [b, t, embed], in the part of each device."""
        if self.split_width:
            return constrain(x, "replica_batch", "length", "embed")
        return constrain(x, "batch", "stream_length" if self.split_length else "length", "hidden")

    def gather(self, x: jax.Array) -> jax.Array:
        """What a block reads, [b, t, embed], at all positions."""
        if self.split_width:
            return constrain(x, "replica_batch", "length", "embed")
        return constrain(x, "batch", "length", "hidden") if self.split_length else x

    def checkpoint(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """One iteration of a scan over layers, keeping for the backward pass what `remat` says."""
        policies = jax.checkpoint_policies
        match self.remat:
            case "none":
                return step
            case "dots":
                policy = policies.save_only_these_names(PRODUCT)
            case "full":
                policy = policies.nothing_saveable
            case "offload":
                policy = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=[LAYER_INPUT],
                    offload_src="device",
                    offload_dst="pinned_host",
                )
        return jax.checkpoint(step, policy=policy, prevent_cse=self.scan_unroll > 1)

    def name_input(self, x: jax.Array) -> jax.Array:
        """The stream as a layer reads it, named for the policy that looks for it."""
        return checkpoint_name(x, LAYER_INPUT) if self.remat == "offload" else x


PLAIN = Execution()
