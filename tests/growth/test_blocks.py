"""Any division of an array into blocks, any device and any mesh gives the same bits."""

import itertools
import re

import jax
import numpy as np
import pytest
from small_models import SOURCE, grow, trained_state

from growth import mesh as growth_mesh
from growth.blocks import LeafGrowth, whole
from growth.leaves import GROUPS, begin_statistics, plan_leaf
from growth.mesh import grow_on_mesh, is_local, prepare
from growth.t5 import ModelGrowth
from t5pegasus.config import MeshConfig, ModelConfig
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.sharding import make_mesh, param_shardings
from t5pegasus.train.state import TrainState, state_shardings

MODEL = ModelConfig(**{**SOURCE.to_json(), "d_model": 16, "num_heads": 4, "d_ff": 24, "vocab_size": 40})
CHANGES = {"d_model": 24, "num_heads": 6, "d_ff": 40, "d_kv": 7, "num_encoder_layers": 3}
TAIL = {"operator": "pad", "layout": "tail"}
PLANS = {
    "duplicated": (CHANGES, {"axes": {"*.heads": {"operator": "duplicate", "first_share": 0.3}}}),
    "padded": (CHANGES, {"axes": {"embed": "pad", "*.[hmqv]*": "pad"}}),
    "asymmetric": (CHANGES, {"state": "asymmetric", "noise": 0.0}),
    "padded behind, with new tokens": (
        {**CHANGES, "vocab_size": 44},
        {
            "axes": {
                "embed": TAIL,
                "*.[hmqv]*": TAIL,
                "vocab": {"operator": "add", "rows": [[1], [2, 3], [4], [39, 0, 7]]},
            }
        },
    ),
}


def plan_leaves(growth: ModelGrowth, state: TrainState):
    """Every array of a state with how it grows."""
    for group in GROUPS:
        for name, array in getattr(state, group).items():
            spec = growth.parts[group][0][name]
            gathering = begin_statistics(group, spec, growth.plan)
            if gathering is not None:
                gathering.add(array, whole(array.shape))
            yield (
                group,
                name,
                array,
                plan_leaf(group, name, spec, growth.plan, gathering and gathering.finish(), array.dtype),
            )


def state_in_float32(config: ModelConfig) -> TrainState:
    return jax.tree.map(
        lambda leaf: leaf.astype(np.float32) if leaf.dtype == np.float64 else leaf, trained_state(config)
    )


def divide(size: int, random: np.random.Generator) -> list[slice]:
    ends = [0, *sorted(random.choice(size, min(size, random.integers(1, 4)), replace=False).tolist()), size]
    return [slice(first, last) for first, last in itertools.pairwise(ends) if last > first]


def compute_in_blocks(leaf: LeafGrowth, array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    result = np.full(leaf.shape, np.nan, leaf.dtype)
    parts = [divide(size, random) for size in leaf.shape]
    for index in np.ndindex(*map(len, parts)):
        target = tuple(part[place] for part, place in zip(parts, index))
        block = array[leaf.source_slices(target)]
        block.flags.writeable = False
        result[target] = leaf.compute(block, target)
    return result


@pytest.mark.parametrize("plan", PLANS)
def test_blocks_make_the_whole_bit_for_bit(plan):
    growth, _ = grow(MODEL, *PLANS[plan])
    random = np.random.default_rng(0)
    for group, name, array, leaf in plan_leaves(growth, state_in_float32(MODEL)):
        wanted = leaf.compute(array, whole(leaf.shape))
        assert wanted.dtype == np.float32
        np.testing.assert_array_equal(compute_in_blocks(leaf, array, random), wanted, err_msg=f"{group} {name}")


def count_collectives(program: str) -> int:
    return len(
        re.findall(r"all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter|collective-broadcast", program)
    )


@pytest.mark.parametrize("plan", ["duplicated", "padded"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_every_mesh_grows_the_hosts_bits_without_a_word_between_devices(plan, sizes):
    growth, _ = grow(MODEL, *PLANS[plan])
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    before, after = (param_shardings(declare_parameters(config), mesh) for config in (MODEL, growth.target))
    names = (
        "token_embedding", "encoder.relative_bias", "encoder.layers.mlp.wi_0", "encoder.layers.mlp.wo",
        "encoder.layers.self_attention.query", "decoder.layers.cross_attention.out", "encoder.final_norm", "lm_head",
    )  # fmt: skip
    for group, name, array, leaf in plan_leaves(growth, state_in_float32(MODEL)):
        if name not in names or group == "first_moment":
            continue
        assert is_local(leaf, after[name])
        program, arguments = prepare(jax.device_put(array, before[name]), leaf, after[name])
        compiled = program.lower(*arguments).compile()
        assert count_collectives(compiled.as_text()) == 0, name
        grown = compiled(*arguments)
        assert grown.sharding == after[name]
        np.testing.assert_array_equal(grown, leaf.compute(array, whole(leaf.shape)), err_msg=f"{group} {name}")


@pytest.mark.parametrize("rows", ["mean", [[1], [2, 3], [4], [39, 0, 7]]], ids=str)
def test_maps_that_are_not_local_move_entries_and_say_so(rows, caplog):
    names = ("lm_head", "encoder.layers.mlp.wi_0", "encoder.final_norm")  # compiling takes long
    state = state_in_float32(MODEL)
    state = state._replace(**{
        group: {name: array for name, array in getattr(state, group).items() if name in names} for group in GROUPS
    })  # fmt: skip
    changes, choices = PLANS["padded behind, with new tokens"]
    operators = choices["axes"] | {"vocab": {"operator": "add", "rows": rows}}
    growth, host = grow(MODEL, changes, {"axes": operators}, state)
    mesh = make_mesh(MeshConfig(1, 4, 2))
    shardings = state_shardings(growth.specs, mesh, growth.optimizer)
    placed = {
        group: jax.device_put(arrays, {name: getattr(shardings, group)[name] for name in arrays})
        for group, arrays in ((group, getattr(state, group)) for group in GROUPS)
    }
    on_mesh = grow_on_mesh(state._replace(**placed), growth, mesh)
    (record,) = caplog.records
    assert record.name == growth_mesh.logger.name
    assert "moved entries between devices" in record.message
    assert "layout 'spread'" in record.message
    for group in ("parameters", "first_moment", "second_moment"):
        for name, array in getattr(host, group).items():
            got = np.asarray(getattr(on_mesh, group)[name])
            atol = 3e-6 * np.abs(array).max()  # statistics are summed in the mesh's own order
            np.testing.assert_allclose(got, array, rtol=0, atol=atol, err_msg=f"{group} {name}")
    for axis, entry in host.multipliers.items():
        jax.tree.map(np.testing.assert_array_equal, on_mesh.multipliers[axis], entry)
    leaf = next(leaf for group, name, _, leaf in plan_leaves(growth, state) if name == "lm_head")
    sharding = param_shardings(declare_parameters(growth.target), mesh)["lm_head"]
    array = jax.device_put(state.parameters["lm_head"], shardings.parameters["lm_head"])
    program, arguments = prepare(array, leaf, sharding)
    assert count_collectives(program.lower(*arguments).compile().as_text()) > 0
