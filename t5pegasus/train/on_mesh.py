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
