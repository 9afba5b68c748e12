"""The type of activations and matrix products."""

from typing import Any

import jax
import jax.numpy as jnp

from t5pegasus.config import RunConfig


def resolve_compute_dtype(config: RunConfig) -> Any:
    """`auto` is bfloat16 on TPU and GPU, float32 on CPU (whose bfloat16 is the slower one)."""
    name = config.train.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)
