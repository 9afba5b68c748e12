"""Choices of speed and memory change no update by more than rounding, and save what they are there to save."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import DataConfig, MeshConfig, ModelConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError
from t5pegasus.model.attention_kernel import cudnn_obstacle, fused_attention, plain_attention
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.sharding import make_mesh
from t5pegasus.train.execution import resolve_execution
from t5pegasus.train.gradients import pure_gradients
from t5pegasus.train.on_mesh import OnMesh

MODEL = ModelConfig(
    vocab_size=62, d_model=16, d_kv=8, d_ff=24, num_heads=2, num_encoder_layers=4, num_decoder_layers=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.1,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
CONFIG = RunConfig(MODEL, DataConfig(24, 8), train=TrainConfig(batch_size=4, label_smoothing=0.1))


def draw_batch(num_rows: int = 4, source: int = 24, target: int = 8) -> Batch:
    """Rows of two examples and padding."""
    random = np.random.default_rng(0)

    def side(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        first, second = width // 2 - 1, width - 2
        segments = np.repeat([1, 2, 0], (first, second - first, 2)).astype(np.int32)
        positions = np.concatenate([np.arange(first), np.arange(second - first), [0, 0]]).astype(np.int32)
        tokens = np.where(segments > 0, random.integers(3, 61, (num_rows, width)), 0).astype(np.int32)
        return tokens, np.tile(segments, (num_rows, 1)), np.tile(positions, (num_rows, 1))

    encoder, (targets, segments, positions) = side(source), side(target)
    inputs = np.where(positions == 0, 1, np.roll(targets, 1, axis=1)).astype(np.int32)
    weights = (segments > 0).astype(np.float32)
    rows = np.arange(num_rows, dtype=np.uint32)
    return Batch(*encoder, inputs, targets, weights, segments, positions, row_ids=rows)


def change(**fields) -> RunConfig:
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **fields))


def gradients(config: RunConfig):
    """Sums of the loss and gradients in float64, where rounding hides nothing."""
    with jax.enable_x64(True):
        parameters = {name: jnp.asarray(x, jnp.float64) for name, x in init_parameters(config.model, 3).items()}
        quick = {"xla_backend_optimization_level": 0}  # compiling is most of the time
        run = jax.jit(pure_gradients(config, jnp.float64), compiler_options=quick)
        found, sums = run(parameters, parameters, draw_batch())
        return {name: np.asarray(x) for name, x in found.items()} | {"sums": np.array(jax.tree.leaves(sums))}


@pytest.fixture(scope="module")
def wanted():
    return gradients(CONFIG)


@pytest.mark.parametrize(
    "fields",
    [{"remat": "dots"}, {"remat": "full"}, {"scan_unroll": 3, "remat": "full"}, {"vocab_chunk": 20}],
    ids=str,
)
def test_no_choice_changes_the_loss_or_its_gradients(wanted, fields):
    got = gradients(change(**fields))
    for name, array in wanted.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-11, atol=1e-13 * np.abs(array).max(), err_msg=name)


def planned_bytes(remat: str) -> int:
    """Temporary memory of loss and gradients, as XLA planned it."""
    model = dataclasses.replace(MODEL, num_encoder_layers=12, num_decoder_layers=12, d_model=32, d_ff=64)
    config = dataclasses.replace(change(remat=remat), model=model)
    specs = declare_parameters(model)
    parameters = {name: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for name, spec in specs.items()}
    batch = draw_batch(8, 128, 64)
    quick = {"xla_backend_optimization_level": 0}
    compiled = jax.jit(pure_gradients(config, jnp.float32)).lower(parameters, parameters, batch).compile(quick)
    return compiled.memory_analysis().temp_size_in_bytes


def test_what_is_computed_anew_takes_no_memory():
    none, dots, full = map(planned_bytes, ("none", "dots", "full"))
    assert full < 0.5 * dots < 0.5 * none


@pytest.mark.slow
def test_offloaded_inputs_of_layers_go_to_the_hosts_memory():
    config = dataclasses.replace(change(remat="offload"))
    parameters = init_parameters(MODEL, 3)
    traced = jax.make_jaxpr(pure_gradients(config, jnp.float32))(parameters, parameters, draw_batch())
    assert "<host>[4,4,24,16]" in str(traced)  # of all four encoder layers


@pytest.mark.parametrize("rows", ["packed", "without bias"])
def test_the_fused_kernels_arguments_are_those_of_the_plain_one(rows):
    random = np.random.default_rng(1)
    batch, heads, targets, sources, size = 2, 3, 6, 10, 8
    query, keys, values = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((batch, targets, heads, size), (batch, heads, size, sources), (batch, heads, sources, size))
    )
    mask = np.asarray(random.random((batch, targets, sources)) < 0.5)
    mask[..., 0] = True
    bias = (
        None if rows == "without bias" else jnp.asarray(random.normal(size=(1, heads, targets, sources)), jnp.float32)
    )

    def run(kernel, *parts):
        found, transpose = jax.vjp(
            lambda *parts: kernel(*parts[:3], jnp.asarray(mask), *(parts[3:] or (None,))), *parts
        )
        return [found, *transpose(jnp.cos(found))]

    parts = (query, keys, values) if bias is None else (query, keys, values, bias)
    fused = functools.partial(fused_attention, implementation="xla")
    for one, other in zip(run(fused, *parts), run(plain_attention, *parts)):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_with_cudnn_the_step_calls_its_kernels_and_stacks_no_weights(monkeypatch):
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    parameters = init_parameters(MODEL, 3)
    texts = {}
    for attention in ("auto", "plain"):
        run = jax.jit(pure_gradients(change(attention=attention), jnp.bfloat16))
        lowered = run.trace(parameters, parameters, draw_batch()).lower(lowering_platforms=("cuda",))
        texts[attention] = lowered.as_text()
    for kernel in ("__cudnn$fmhaScaleBiasSoftmax(", "__cudnn$fmhaScaleBiasSoftmaxBackward("):
        assert texts["auto"].count(f"@{kernel}") == 3  # self-attention twice and cross-attention
        assert kernel not in texts["plain"]
    of_all_layers = "4x4x2x24x24x"  # layers, rows, heads, positions
    assert of_all_layers in texts["plain"]
    assert of_all_layers not in texts["auto"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cpu", jnp.bfloat16, 64, (512, 128)), "needs a CUDA GPU, the backend is cpu"),
        (("gpu", jnp.float32, 64, (512, 128)), "needs bfloat16, train.compute_dtype is float32"),
        (("gpu", jnp.bfloat16, 60, (512, 128)), "multiple of 8 up to 128, got 60"),
        (("gpu", jnp.bfloat16, 64, (512, 113)), "rows of even length, got 113"),
    ],
)
def test_what_keeps_cudnn_away_is_named(arguments, reason):
    assert reason in (cudnn_obstacle(*arguments) or "")
    assert cudnn_obstacle("gpu", jnp.bfloat16, 64, (512, 114)) is None


def test_a_kernel_that_cannot_be_had_is_refused():
    with pytest.raises(UsageError, match=r"train.attention=cudnn cannot be used: it needs a CUDA GPU.*auto takes"):
        resolve_execution(change(attention="cudnn"), jnp.bfloat16)
    assert resolve_execution(CONFIG, jnp.float32).attention == "plain"


@pytest.mark.parametrize("split_length", [True, False])
def test_the_stream_is_split_by_length_where_it_is_asked_for(split_length):
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    config, parameters = change(split_length=split_length), init_parameters(MODEL, 3)
    run = OnMesh(mesh, jax.jit(pure_gradients(config, jnp.float32)))
    with jax.set_mesh(mesh):
        text = run.jitted.lower(parameters, parameters, draw_batch()).as_text()
    of_stream = re.findall(r"sharding_constraint .*<@mesh, (.*)> : tensor<4x24x16xf32>", text)
    assert of_stream
    assert ('[{"data", "fsdp"}, {"tensor"}, {}]' in of_stream) == split_length
