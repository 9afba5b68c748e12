"""How a run computes its model, from its config and the backend it runs on."""

from typing import Any

import jax

from t5pegasus.config import RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.attention_kernel import cudnn_obstacle
from t5pegasus.model.execution import Execution


def resolve_execution(config: RunConfig, compute_dtype: Any) -> Execution:
    """The run's choices of speed and memory; `auto` takes the best kernel that the backend, types and lengths admit.

    Raises:
        UsageError: if the kernel that was asked for cannot be had.
    """
    train, data = config.train, config.data
    lengths = (data.max_source_tokens, data.max_target_tokens)
    obstacle = cudnn_obstacle(jax.default_backend(), compute_dtype, config.model.d_kv, lengths)
    if train.attention == "cudnn" and obstacle is not None:
        raise UsageError(f"train.attention=cudnn cannot be used: {obstacle}; auto takes what there is")
    return Execution(
        remat=train.remat,
        scan_unroll=train.scan_unroll,
        attention="plain" if train.attention == "plain" or obstacle is not None else "cudnn",
        split_length=train.split_length and not _is_whole(),
    )


def _is_whole() -> bool:
    """Whether there is no mesh whose tensor axis could take parts of a length."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.shape["tensor"] == 1
