"""Jitted functions that know their mesh."""

from typing import Any

import jax
from jax.sharding import Mesh


class OnMesh:
    """A jitted function with the mesh in context, so that activations can be constrained by axis names."""

    def __init__(self, mesh: Mesh, jitted: Any):
        self.mesh, self.jitted = mesh, jitted

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        with jax.set_mesh(self.mesh):
            return self.jitted(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """The program for arguments of these shapes, types and shardings, to be called instead."""
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(*args).compile()


def compiler_options(mesh: Mesh) -> dict[str, bool] | None:
    """How XLA shall compile a train step for these devices, where its defaults are not the best.

    On TPUs it would gather the weights of a layer piece by piece, between products with each piece (Wang et al. 2023,
    windowed einsum). Pieces of a matrix that is split over `fsdp` are too narrow for the matrix unit: of products with
    768 × 2,048 over 16 v5e chips its own cost model expects 3.6 times the cycles. Over `tensor` it may.
    """
    if mesh.devices.flat[0].platform != "tpu" or mesh.shape["tensor"] > 1:
        return None
    return dict.fromkeys(
        ("xla_tpu_enable_windowed_einsum_for_all_gather", "xla_tpu_enable_windowed_einsum_for_reduce_scatter"), False
    )
