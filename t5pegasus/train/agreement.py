"""One answer for all processes: what any of them was asked for, all do at the same step.

A request reaches one process at some moment, the others at another or not at all. Each process therefore sends what it
knows along with every update, and reads one update later what all of them knew: the same number everywhere, without
waiting for the device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5pegasus.train.control import Control, Request


class Agreement:
    """The union over all processes of what each of them was asked for."""

    def __init__(self, mesh: Mesh):
        self._union: Callable[[jax.Array], jax.Array] | None = None
        if len({device.process_index for device in mesh.devices.flat}) == 1:
            return
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._shape = (mesh.size, len(Request))
        self._union = jax.jit(lambda each: jnp.max(each, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def ask(self, requests: Request) -> "jax.Array | Request":
        """Send this process's requests; every process calls it at the same place. Does not wait."""
        if self._union is None:
            return requests
        bits = np.array([[flag in requests for flag in Request]], np.int32)
        own = jax.make_array_from_callback(self._shape, self._sharding, lambda index: bits)
        return self._union(own)

    def read(self, asked: "jax.Array | Request") -> Request:
        """What all processes together asked for in that call of `ask`; waits until the device has it."""
        if isinstance(asked, Request):
            return asked
        union = Request(0)
        for flag, bit in zip(Request, np.asarray(asked.addressable_data(0))):
            union |= flag if bit else Request(0)
        return union


class StopAgreedError(Exception):
    """All processes know at this place that the run is to stop."""


Check = Callable[[], None]
"""Called between two portions of longer work, by all processes alike; raises StopAgreedError if the run is to stop."""


def make_check(agreement: Agreement, control: Control) -> Check:
    """A check for one piece of work; of several processes it learns of a request one call late, as the loop does."""
    known = agreement.ask(control.requests)

    def check() -> None:
        nonlocal known
        asked, known = known, agreement.ask(control.requests)
        if isinstance(known, Request):  # of a process alone
            asked = known
        if Request.STOP in agreement.read(asked):
            raise StopAgreedError

    return check


def no_check() -> None:
    """The check of work that is not to be stopped."""
