# ruff: noqa: E501 - lines of programs are as long as they are
"""Laws of reading programs: loops multiply, starts and dones are one, groups become mesh axes, bytes are bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5pegasus.config import MeshConfig
from t5pegasus.plan.collectives import find_collectives
from t5pegasus.plan.costs import find_costs
from t5pegasus.plan.hlo import parse_hlo, parse_types
from t5pegasus.sharding import make_mesh

LOOPS = """HloModule loops, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (2, {}, may-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %v = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %permuted = (bf16[8,4], bf16[8,4], u32[], u32[]) collective-permute-start(%v), channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %w = bf16[8,4]{1,0} collective-permute-done(%permuted)
  ROOT %out = (s32[], bf16[8,4]) tuple(%next, %w)
}

%inner_condition (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[], bf16[8,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(9)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer_body (q: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %q = (s32[], bf16[8,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %one = s32[] constant(1)
  %jj = s32[] add(%j, %one)
  %u = bf16[8,4] get-tuple-element(%q), index=1
  %start = s32[] constant(1)
  %init = (s32[], bf16[8,4]) tuple(%start, %u)
  %loop = (s32[], bf16[8,4]) while(%init), condition=%inner_condition, body=%inner_body
  %result = bf16[8,4] get-tuple-element(%loop), index=1
  ROOT %again = (s32[], bf16[8,4]) tuple(%jj, %result)
}

%outer_condition (q: (s32[], bf16[8,4])) -> pred[] {
  %q = (s32[], bf16[8,4]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit.1 = s32[] constant(3)
  ROOT %less.1 = pred[] compare(%j, %limit.1), direction=LT
}

%fused_start (a: f32[4,4]) -> f32[4,16] {
  %a = f32[4,4] parameter(0)
  ROOT %g1 = f32[4,16] all-gather(%a), channel_id=7, replica_groups=[2,4]<=[2,4], dimensions={1}
}

%fused_done (b: f32[4,4]) -> f32[4,16] {
  %b = f32[4,4] parameter(0)
  ROOT %g2 = f32[4,16] all-gather(%b), channel_id=7, replica_groups=[2,4]<=[2,4], dimensions={1}
}

ENTRY %main (x0: bf16[8,4], x1: f32[4,4], x2: f32[100]) -> (bf16[8,4], f32[100]) {
  %x0 = bf16[8,4] parameter(0)
  %x1 = f32[4,4] parameter(1)
  %x2 = f32[100] parameter(2)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,4]) tuple(%zero, %x0)
  %outer = (s32[], bf16[8,4]) while(%t), condition=%outer_condition, body=%outer_body
  %y0 = bf16[8,4] get-tuple-element(%outer), index=1
  %f1 = f32[4,16] fusion(%x1), kind=kCustom, calls=%fused_start
  %f2 = f32[4,16] fusion(%x1), kind=kCustom, calls=%fused_done
  %r = f32[100] all-reduce(%x2), channel_id=9, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %end = (bf16[8,4], f32[100]) tuple(%y0, %r)
}
"""

MESH = {"data": 2, "fsdp": 4, "tensor": 1}


def test_nested_loops_multiply_with_their_own_starts_and_steps():
    module = parse_hlo(LOOPS)
    # from 1 to 9 by 2: four times, within three
    assert module.executions["inner_body"] == 12
    assert module.executions["outer_body"] == 3
    assert module.unknown_loops == []


def test_what_xla_says_of_a_loop_goes_before_its_counter():
    said = LOOPS.replace("body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}')
    assert parse_hlo(said).executions["inner_body"] == 20


def test_a_loop_of_unknown_length_is_named_and_counted_once():
    module = parse_hlo(LOOPS.replace("%limit.1 = s32[] constant(3)", "%limit.1 = s32[] get-tuple-element(%q), index=0"))
    assert module.unknown_loops == ["outer"]
    assert module.executions["outer_body"] == 1


def test_donated_arguments_are_read_from_the_header():
    assert parse_hlo(LOOPS).donated == {0, 2}


def test_collectives_are_counted_once_with_their_axes_and_bytes():
    found = find_collectives(parse_hlo(LOOPS), MESH)
    assert sorted((each.kind, each.axes, each.runs) for each in found) == [
        ("all-gather", ("fsdp",), 1),
        ("all-reduce", ("data",), 1),
        ("collective-permute", ("fsdp",), 12),
    ]
    sent = {each.kind: each.sent_bytes for each in found}
    assert sent == {"all-gather": 3 * 64, "all-reduce": 2 * 0.5 * 400, "collective-permute": 12 * 64}
    assert all(each.network == "ici" for each in found)


def test_groups_that_cross_slices_use_the_network_between_them():
    found = find_collectives(parse_hlo(LOOPS), MESH, num_slices=2)
    assert {each.kind: each.network for each in found} == {
        "all-gather": "ici", "all-reduce": "dcn", "collective-permute": "ici",
    }  # fmt: skip


SCATTERED = """%all-reduce-scatter.1 (in: bf16[32,8]) -> bf16[8,8] {
  %in = bf16[32,8] parameter(0)
  %whole = bf16[32,8] all-reduce(%in), channel_id=11, replica_groups=[2,4]<=[8], to_apply=%add
  %place = s32[] constant(0)
  ROOT %kept = bf16[8,8] dynamic-slice(%whole, %place, %place), dynamic_slice_sizes={8,8}
}

ENTRY"""


def test_an_all_reduce_of_which_a_fusion_keeps_a_slice_is_a_reduce_scatter():
    text = LOOPS.replace("ENTRY", SCATTERED)
    call = "  %x3 = bf16[32,8] broadcast(%zero)\n  %part = bf16[8,8] fusion(%x3), calls=%all-reduce-scatter.1\n  %t ="
    found = find_collectives(parse_hlo(text.replace("  %t =", call)), MESH)
    (scattered,) = [each for each in found if each.kind == "reduce-scatter"]
    assert (scattered.axes, scattered.runs, scattered.sent_bytes) == (("fsdp",), 1, 3 / 4 * 32 * 8 * 2)
    assert [each.axes for each in found if each.kind == "all-reduce"] == [("data",)]


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[2,4]<=[8]", ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups={}", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", ("fsdp",)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", ("data",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)2}", ("data",)),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(2)4}", ("fsdp",)),
    ],
)
def test_every_way_to_write_groups(groups, axes):
    (found,) = [
        each
        for each in find_collectives(parse_hlo(LOOPS.replace("replica_groups={{0,4},{1,5},{2,6},{3,7}}", groups)), MESH)
        if each.kind == "all-reduce"
    ]
    assert found.axes == axes


def test_a_transfer_through_the_host_is_a_collective_between_slices():
    send = (
        "  %s = (f32[100], u32[], token[]) send(%x2, %after), channel_id=3, is_host_transfer=true, frontend_attributes="
        '{_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="REDUCE_SCATTER"}\n'
    )
    at = LOOPS.index("  %r = f32[100]")
    found = find_collectives(parse_hlo(LOOPS[:at] + send + LOOPS[at:]), MESH, num_slices=2)
    (transfer,) = [each for each in found if each.kind == "reduce-scatter"]
    assert (transfer.network, transfer.axes, transfer.sent_bytes) == ("dcn", ("data",), 200)


def test_types_have_sizes_and_memories():
    pred, bf16, u4, tiled = parse_types("(pred[3], bf16[2,3]{1,0}, u4[10], f32[8,128]{1,0:T(8,128)S(1)})")
    assert [each.bytes for each in (pred, bf16, u4, tiled)] == [3, 12, 5, 4096]
    assert (bf16.memory_space, tiled.memory_space) == (0, 1)


CONVOLUTION = """HloModule products
ENTRY %main (a: bf16[4,128,12,64], b: bf16[12,64,48]) -> bf16[4,128,48] {
  %a = bf16[16,128,96]{2,1,0} parameter(0)
  %b = bf16[96,32]{1,0} parameter(1)
  %c = bf16[4,12,512,64]{3,2,1,0:T(8,128)S(1)} parameter(2)
  %d = bf16[4,12,512,64]{3,2,1,0} parameter(3)
  %plain = bf16[16,128,32]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=b0f_0io->b0f
  ROOT %batched = f32[4,12,512,512]{3,2,1,0} convolution(%c, %d), window={size=4x12 stride=3x11 lhs_dilate=4x12}, dim_labels=01bf_01oi->01bf
}
"""


def test_products_that_a_tpu_writes_as_convolutions():
    text = CONVOLUTION.replace("%b = bf16[96,32]", "%b = bf16[1,96,32]")
    plain, batched = find_costs(parse_hlo(text))
    assert plain.flops == 2 * 16 * 128 * 96 * 32
    assert plain.bytes == 2 * (16 * 128 * 96 + 96 * 32 + 16 * 128 * 32)
    assert batched.flops == 2 * 4 * 12 * 512 * 512 * 64
    assert batched.bytes == 2 * 4 * 12 * 512 * 64 + 4 * 4 * 12 * 512 * 512


def test_a_real_program_over_a_mesh():
    mesh = make_mesh(MeshConfig(2, 4, 1))
    weights = jax.ShapeDtypeStruct((5, 64, 64), np.float32, sharding=NamedSharding(mesh, P(None, "fsdp", None)))
    rows = jax.ShapeDtypeStruct((4096, 64), np.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"), None)))

    def objective(weights, rows):
        def layer(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, P(("data", "fsdp"), None))), None

        return jnp.sum(jax.lax.scan(layer, rows, weights)[0])

    def update(weights, rows):
        return weights - jax.grad(objective)(weights, rows)

    sharded = weights.sharding
    with jax.set_mesh(mesh):
        step = jax.jit(update, out_shardings=sharded, donate_argnums=0)
        text = step.lower(weights, rows).compile().as_text()
    module = parse_hlo(text)
    assert module.donated == {0}
    assert module.unknown_loops == []
    assert 5 in module.executions.values()
    found = find_collectives(module, dict(mesh.shape))
    gathers = [each for each in found if each.kind == "all-gather"]
    assert {each.axes for each in gathers} == {("fsdp",)}
    assert sum(each.runs for each in gathers) == 10  # each layer's weights, forward and backward
    assert sum(each.sent_bytes for each in gathers) == 10 * 3 * (64 * 64 * 4 / 4)
    per_device = 3 * 2 * 5 * (4096 / 8) * 64 * 64
    assert sum(cost.flops for cost in find_costs(module)) == pytest.approx(per_device, rel=0.01)
