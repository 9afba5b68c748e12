"""What a compiled train step may and may not do, stated once for TPU programs and for those of CPU devices."""

import math

import jax
from origins import Origins

from t5pegasus.config import RunConfig
from t5pegasus.plan.collectives import Collective, find_collectives
from t5pegasus.plan.hlo import COLLECTIVES, Module, parse_hlo
from t5pegasus.train.estimate import abstract_state
from t5pegasus.train.head_loss import choose_chunk


def read_program(text: str, mesh, num_slices: int = 1) -> tuple[Module, list[Collective]]:
    module = parse_hlo(text)
    assert module.unknown_loops == []
    return module, find_collectives(module, dict(mesh.shape), num_slices)


def vocabulary_chunk(config: RunConfig, mesh) -> int:
    """Entries of the vocabulary whose logits one device has at once."""
    train = config.train
    with jax.set_mesh(mesh):
        shape = (train.batch_size // train.accumulation_steps, config.data.max_target_tokens)
        return choose_chunk(config, shape, 4) or config.model.vocab_size // mesh.shape["tensor"]


def gathered_sizes(collectives: list[Collective]) -> list[tuple[str, tuple[int, ...], int, str]]:
    """(dtype, dims of a device's part, devices, origin) of everything that an all-gather puts together."""
    return [
        (each.dtype, each.dims, len(collective.group), collective.op_name)
        for collective in collectives
        if collective.kind == "all-gather"
        for each in collective.operands
    ]


def check_vocabulary_is_never_whole(config: RunConfig, mesh, collectives: list[Collective]) -> None:
    """No device puts together more of the embedding, the head or their gradients than its own part, and one chunk."""
    per_device = config.model.vocab_size // mesh.shape["tensor"]
    chunk = vocabulary_chunk(config, mesh)
    assert chunk < per_device, "the test must be of a configuration with several chunks"
    own = per_device * config.model.d_model // mesh.shape["fsdp"]
    for dtype, dims, count, origin in gathered_sizes(collectives):
        if {config.model.vocab_size, per_device} & set(dims):
            # A sum over slices and data takes a device's own part to pieces, and may put that together again.
            assert math.prod(dims) * count <= own, (dtype, dims, origin)
        if chunk in dims:
            assert math.prod(dims) * count <= chunk * config.model.d_model, (dtype, dims, origin)
    whole = per_device * config.model.d_model
    for collective in collectives:
        for each in collective.operands:
            is_vocabulary = {config.model.vocab_size, per_device} & set(each.dims)
            assert not (is_vocabulary and math.prod(each.dims) >= whole), (collective.kind, each, collective.op_name)


def check_optimizer_state_stays(config: RunConfig, mesh, module: Module) -> None:
    """What devices send each other holds copies of parameters, of no moment and no moving average."""
    leaves = jax.tree.leaves_with_path(abstract_state(config, mesh))
    names = {number: (path[0].name, array.shape) for number, (path, array) in enumerate(leaves)}
    origins = Origins(module)
    sent = set()
    for computation, instructions in module.computations.items():
        for each in instructions.values():
            if each.opcode.removesuffix("-start") in COLLECTIVES or each.opcode == "send":
                for operand in each.operands:
                    sent |= origins.arguments_of(computation, operand)
    groups = {names[number][0] for number in sent if number in names}
    assert groups == {"parameters"}, groups


def check_state_is_donated(config: RunConfig, mesh, module: Module) -> None:
    """Every array of the state is updated in the memory it lies in."""
    leaves = jax.tree.leaves(abstract_state(config, mesh))
    assert module.donated == set(range(len(leaves)))
