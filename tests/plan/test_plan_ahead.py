"""Laws of plans: names of hardware, exact state, roofline by hand, searches that keep what fits, honest refusals."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from launch.cli import main
from launch.exit_codes import DOES_NOT_FIT
from t5pegasus.chips import CHIPS, find_chip
from t5pegasus.config import MeshConfig, OptimizerConfig, RunConfig
from t5pegasus.errors import UsageError
from t5pegasus.plan import topology as topologies
from t5pegasus.plan.ahead import Program
from t5pegasus.plan.collectives import Collective
from t5pegasus.plan.costs import Cost
from t5pegasus.plan.hlo import ArrayType
from t5pegasus.plan.memory import state_memory
from t5pegasus.plan.roofline import Rates, positions_along, predict
from t5pegasus.plan.search import describe_changes, find_fitting, search
from t5pegasus.plan.step import described_mesh, estimate_step, resolve_config
from t5pegasus.plan.summary import _size, format_plan, format_search, plan_to_json
from t5pegasus.plan.topology import list_devices, parse_topology
from t5pegasus.presets import preset
from t5pegasus.sharding import make_mesh
from t5pegasus.train.estimate import abstract_state


def configure(name: str, mesh: MeshConfig | None = None, **train) -> RunConfig:
    config = preset(name)
    return dataclasses.replace(config, mesh=mesh or MeshConfig(), train=dataclasses.replace(config.train, **train))


@pytest.mark.parametrize(
    ("text", "slices", "devices", "platform"),
    [
        ("v5e:4x4", 1, 16, "tpu"),
        ("v5e:16x16", 2, 512, "tpu"),
        ("v4:2x2x4", 1, 16, "tpu"),
        ("v5p:8x8x8", 1, 512, "tpu"),
        ("tpu7x:2x2x1", 1, 8, "tpu"),
        ("h100:8", 1, 8, "gpu"),
        ("a100:32", 1, 32, "gpu"),
        ("cpu", 1, 1, "cpu"),
    ],
)
def test_hardware_by_name(text, slices, devices, platform):
    topology = parse_topology(text, slices)
    assert (topology.num_devices, topology.platform) == (devices, platform)


def test_nodes_of_gpus_are_slices():
    assert parse_topology("a100:32").num_slices == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "no chip 'v5'; perhaps 'v5p'"),
        ("v5e:5x5", "nearest: v5e:4x8 or v5e:4x4"),
        ("v4:2x3x3", "v4 has no slice of that shape; nearest: v4:2x2x4"),
        ("v4:4x4", "v4 has no slice of that shape"),
        ("h100:12", "nearest: h100:8 or h100:16"),
        ("v5e:4xa", "'a' is no number of chips"),
        ("h100", "is no number of chips"),
    ],
)
def test_hardware_that_is_not_names_the_nearest(text, message):
    with pytest.raises(UsageError, match=message):
        parse_topology(text)


@pytest.mark.parametrize(
    ("text", "positions", "links"),
    [
        ("v5e:16x16", (16, 16, 1), 4),  # both axes are rings
        ("v5e:4x4", (4, 4, 1), 2),  # neither is
        ("v5e:16x16", (4, 1, 1), 2),
        ("v4:4x4x4", (4, 4, 4), 6),
        ("v4:2x2x1", (2, 1, 1), 1),
    ],
)
def test_links_that_a_group_has(text, positions, links):
    topology = parse_topology(text)
    assert topology.link_bandwidth(positions) == links * topology.chip.link_bandwidth


def test_the_longest_name_of_a_chip_wins():
    assert find_chip("TPU v5 lite") is CHIPS["v5e"]
    assert find_chip("TPU v5p") is CHIPS["v5p"]
    assert find_chip("NVIDIA H200 141GB") is CHIPS["h200"]
    assert find_chip("cpu") is None


def test_the_roofline_by_hand():
    topology = parse_topology("v5e:4x4", 2)
    devices = [types.SimpleNamespace(coords=(n % 4, n // 4 % 4, 0)) for n in range(32)]
    costs = [Cost("fusion", 10.0, 1.0, 1), Cost("fusion", 1.0, 30.0, 1), Cost("fusion", 0.0, 0.0, 1, cycles=40.0)]
    row = Collective("all-gather", (ArrayType("f32", (250,), 0),), (0, 1, 2, 3), ("fsdp",), "ici", 5, "")
    between = Collective("all-reduce", (ArrayType("f32", (250,), 0),), (0, 16), ("data",), "dcn", 1, "")
    rates = Rates(flops=2.0, peak_flops=4.0, memory_bandwidth=10.0, source="", clock=8.0)
    times = predict(costs, [row, between], topology, devices, rates)
    assert (times.products, times.memory, times.compiler) == (5.5, 3.1, 5.0)
    assert times.local == 5.0 + 3.0 + 5.0
    assert times.ici == 5 * 3 * 1000 / topology.chip.link_bandwidth  # along one axis that is no ring
    assert times.dcn == 1000 / topology.chip.network_bandwidth
    assert times.step == times.local
    assert times.without_overlap == times.local + times.ici + times.dcn
    assert positions_along(devices[:4]) == (4, 1, 1)


def test_the_state_is_exact():
    settings = OptimizerConfig(name="adafactor", min_dim_size_to_factor=16, beta1=0.9)
    config = dataclasses.replace(configure("tiny", MeshConfig(2, 4, 1), ema_decay=0.9), optimizer=settings)
    described = abstract_state(config, make_mesh(config.mesh))
    state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding), described)
    planned = state_memory(config, described_mesh(config, parse_topology("cpu:8")))

    def on_one(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert planned["parameters"] == on_one(state.parameters)
    assert planned["average"] == on_one(state.ema)
    assert planned["optimizer"] == on_one(state) - on_one(state.parameters) - on_one(state.ema)


def test_less_is_kept_with_more_recomputation_and_smaller_micro_batches():
    topology = parse_topology("h100:8")
    sizes = [
        estimate_step(configure("base", MeshConfig(1, 8, 1), **train), topology).memory.total
        for train in ({}, {"remat": "dots"}, {"remat": "full"}, {"remat": "full", "accumulation_steps": 4})
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_a_search_gives_the_fastest_that_fits():
    searched = search(configure("large"), parse_topology("a100:8"), num_compiled=5)
    assert searched.best is not None
    assert searched.best.memory.fits
    times = [each.prediction.step for each in searched.tried]
    assert times == sorted(times)
    assert "best: --mesh.data -1 --mesh.fsdp" in format_search(searched, "large")
    over_nodes = search(configure("base"), parse_topology("h100:64"), num_compiled=9)
    rows = [row.split() for row in format_search(over_nodes, "base").splitlines()[2:11]]
    assert {row[1] + row[2] for row in rows} == {"(8slices)"}
    assert {row[5] for row in rows} <= {"none", "dots", "full"}


def test_what_does_not_fit_gets_a_way_out_that_does():
    topology = parse_topology("a100:8")
    plan = estimate_step(configure("xl", batch_size=512), topology)
    assert not plan.memory.fits
    fix = find_fitting(plan)
    assert fix.best is not None
    assert fix.best.memory.fits
    flags = describe_changes(plan, fix.best)
    assert "--mesh.fsdp" in flags or "--train." in flags
    text = format_plan(plan, "xl", fix)
    assert "DOES NOT FIT" in text
    assert f"way out: {flags}" in text
    assert len(text.splitlines()) <= 40


def test_flags_that_make_it_fit_leave_no_other_in_their_way():
    topology = parse_topology("a100:8")
    plan = estimate_step(configure("xl", MeshConfig(8, 1, 1), batch_size=64), topology)
    flags = describe_changes(plan, estimate_step(configure("xl", MeshConfig(1, 8, 1), batch_size=64), topology))
    assert flags == "--mesh.fsdp 8 --mesh.data -1"


def test_a_search_takes_no_tensor_axis_where_it_only_sends_more():
    searched = search(configure("base"), parse_topology("h100:8"), num_compiled=8)
    assert searched.best.mesh["tensor"] == 1
    assert len({(*each.mesh.values(), each.config.train.remat) for each in searched.tried}) == 8
    assert {each.config.train.accumulation_steps for each in searched.tried} == {1}  # more would save, and all fit


def test_what_a_tensor_axis_sends_by_hand():
    config = configure("base", MeshConfig(4, 1, 2), batch_size=64)
    topology = parse_topology("h100:8")
    seconds = estimate_step(config, topology).prediction.ici
    gradients = 2 * 4 * estimate_step(config, topology).num_parameters / 2 * 3 / 4
    of_blocks = 16 * (2 * 12 * 512 + 3 * 12 * 128) * 768 * 2 / 2  # half of the stream of 16 rows, in bfloat16
    sent = gradients + 2 * 2 * of_blocks  # gathered and scattered, forward and backward
    assert seconds * topology.chip.link_bandwidth == pytest.approx(sent)


def refuse_to_fit(monkeypatch, fits):
    """Let compilers find that only those fit of which `fits` says so."""

    def compiled(config, topology):
        plan = estimate_step(config, topology)
        limit = plan.memory.total if fits(plan) else 1
        return dataclasses.replace(plan, memory=dataclasses.replace(plan.memory, limit=limit))

    monkeypatch.setattr("t5pegasus.plan.search.plan_step", compiled)


def test_where_an_estimate_was_wrong_smaller_micro_batches_follow_and_the_leanest_comes_last(monkeypatch):
    refuse_to_fit(monkeypatch, lambda plan: plan.config.train.accumulation_steps == 2)
    searched = search(configure("base"), parse_topology("v5e:4x4"), num_compiled=30)
    followed: dict[tuple, list[int]] = {}
    for each in searched.tried:
        steps = followed.setdefault((*each.mesh.values(), each.config.train.remat), [])
        steps.append(each.config.train.accumulation_steps)
    assert [1, 2] in followed.values()
    assert all(steps in ([1], [1, 2]) for steps in followed.values())
    assert searched.best.config.train.accumulation_steps == 2
    refuse_to_fit(monkeypatch, lambda plan: plan.config.train.remat == "full")
    searched = search(configure("base"), parse_topology("v5e:4x4"), num_compiled=3)
    assert searched.best is searched.tried[-1]


def test_gpus_have_what_jax_takes_of_their_memory_and_keep_no_weights_of_pairs():
    topology = parse_topology("h100:8")
    plain, fused = (
        estimate_step(configure("base", MeshConfig(1, 8, 1), attention=attention), topology)
        for attention in ("plain", "auto")
    )
    assert fused.memory.limit == 0.75 * 80e9
    assert fused.memory.temporaries < 0.7 * plain.memory.temporaries


def test_logits_are_there_by_chunks_unless_they_are_asked_for_whole():
    sizes = [
        estimate_step(configure("base", MeshConfig(8, 1, 1), batch_size=2048, **train), parse_topology("h100:8"))
        for train in ({}, {"vocab_chunk": 50_000})
    ]
    chunked, whole = (each.memory.temporaries for each in sizes)
    assert whole - chunked > 256 * 128 * 40_000 * 6


def test_a_plan_as_json_says_what_the_text_says():
    plan = estimate_step(configure("base", MeshConfig(1, 8, 1)), parse_topology("h200:8"))
    value = json.loads(json.dumps(plan_to_json(plan)))
    assert value["memory"]["total"] == plan.memory.total
    assert value["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    assert value["prediction"]["mfu"] == pytest.approx(plan.mfu)
    assert RunConfig.from_json(value["config"]) == resolve_config(plan.config, plan.topology)


def test_sizes_that_do_not_divide_are_refused_before_anything_is_compiled():
    with pytest.raises(UsageError, match="num_heads=6 does not divide over mesh tensor=4"):
        estimate_step(configure("small", MeshConfig(2, 1, 4)), parse_topology("h100:8"))


def test_without_the_tpu_compiler_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"libtpu, which is not installed.*needs no TPU: pip install '\.\[tpu\]'"):
        list_devices(parse_topology("v5e:4x4"))


def test_the_verb_plans_for_gpus_and_for_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["plan", "base", "--topology", "h100:8", "--mesh.fsdp", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 8
    sizes = "--model.vocab-size 600 --model.d-model 32 --model.num-encoder-layers 1 --model.num-decoder-layers 1"
    rest = "--data.max-source-tokens 16 --data.max-target-tokens 8 --train.batch-size 4"
    command = ["plan", "tiny", "--topology", "cpu", *sizes.split(), *rest.split()]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "on cpu: 1 devices (compiled in" in text
    assert "prediction, a roofline and no measurement" in text
    (kept,) = (tmp_path / "t5pegasus" / "plans").iterdir()
    written = kept.stat().st_mtime_ns
    assert main(command) == 0
    assert kept.stat().st_mtime_ns == written


def test_what_does_not_fit_has_an_exit_code_of_its_own(capsys):
    assert main(["plan", "base", "--topology", "h100:8", "--mesh.fsdp", "8"]) == 0
    assert "collectives: not listed" in capsys.readouterr().out
    assert main(["plan", "xl", "--topology", "h100:1", "--train.batch-size", "8"]) == DOES_NOT_FIT == 43
    assert "DOES NOT FIT" in capsys.readouterr().out
    assert main(["plan", "xl", "--topology", "h100:1", "--train.batch-size", "4096", "--search"]) == DOES_NOT_FIT
    assert "none of these fits" in capsys.readouterr().out


def test_sizes_are_in_a_unit_that_shows_something():
    sizes = {2**30 * 3 // 2: "1.500 GiB", 2**20 * 5: "5.000 MiB", 2**10 // 2: "0.500 KiB"}
    assert {size: _size(size).strip() for size in sizes} == sizes


def test_the_verb_searches_on_this_machine_even_if_nothing_can_be_kept(capsys, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    sizes = "--model.vocab-size 600 --model.d-model 32 --model.num-encoder-layers 1 --model.num-decoder-layers 1"
    rest = "--data.max-source-tokens 16 --data.max-target-tokens 8 --train.batch-size 4 --compile-at-most 1"
    assert main(["plan", "tiny", "--topology", "cpu", "--search", *sizes.split(), *rest.split()]) == 0
    assert "best: --mesh.data -1 --mesh.fsdp 1" in capsys.readouterr().out
    assert "the compiled step cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "--topology", "cpu"], "no preset given"),
        (["plan", "bass", "--topology", "cpu"], "perhaps you meant 'base'"),
        (["plan", "base", "--topology", "v5e:9x9"], "v5e has no slice of that shape"),
        (["plan", "base", "--topology", "h100:8", "--slices", "0"], "--slices=0 must be at least 1"),
        (["plan", "base", "--topology", "h100:8", "--compile-at-most", "0"], "must be at least 1"),
        (["plan", "base", "--topology", "h100:8", "--train.batch-size", "20"], "nearest: 16 or 24"),
        (["plan", "base", "--topology", "h100:16", "--mesh.fsdp", "16"], "mesh data=1 cannot be split over them: h100"),
        (["plan", "base", "--topology", "h100:16", "--mesh.slices", "4"], "mesh slices=4, but h100:16 has 2 nodes"),
        (
            ["plan", "base", "--topology", "v5e:16x16", "--search", "--train.batch-size", "100"],
            "no mesh of the 256 devices of v5e:16x16 divides; the first: batch_size=100 is not a multiple",
        ),
    ],
)
def test_what_the_verb_refuses(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_program_that_does_not_fit_says_what_it_wanted():
    from t5pegasus.plan.ahead import _refusal

    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm"
    assert _refusal(RuntimeError(said), 1.0) == Program(
        "", fits=False, used_bytes=int(20.5 * 2**30), limit_bytes=int(15.75 * 2**30), compile_seconds=1.0
    )
    with pytest.raises(RuntimeError, match="another"):
        _refusal(RuntimeError("another error"), 1.0)
