"""In float32 and bfloat16: bitwise where that is promised, and else no further off than a permutation of the source."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SOURCE, grow, relative_error, trained_state

from t5pegasus.axes import logical_axis
from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.model.t5 import bind, declare_parameters
from t5pegasus.train.state import TrainState

# Sizes at which kernels sum as they do in real models.
MODEL = dataclasses.replace(
    SOURCE, d_model=256, d_kv=64, num_heads=4, d_ff=512, num_encoder_layers=2, num_decoder_layers=2, vocab_size=512,
    relative_attention_num_buckets=32, relative_attention_max_distance=128,
)  # fmt: skip
TAIL = {"operator": "pad", "layout": "tail"}
WIDER = {"d_model": 384, "d_ff": 1024, "num_heads": 6, "d_kv": 96}
BITWISE = {
    "units and layers": (
        {"d_ff": 896, "num_heads": 7, "num_encoder_layers": 3, "num_decoder_layers": 4},
        {"axes": {"*.mlp": TAIL, "*.heads": TAIL}},
    ),
    "four times the stream, and buckets": (
        {"d_model": 1024, "relative_attention_boundaries": (128, 200)}, {"axes": {"embed": TAIL}},
    ),
}  # fmt: skip
ROUNDED = {
    "duplicated": (WIDER, None),
    "padded": (WIDER, {"axes": {"embed": "pad", "*.[hmqv]*": "pad"}}),
    "gains scaled, uneven": (
        WIDER,
        {"axes": {
            "embed": {"operator": "duplicate", "scale_gains": True},
            "*.[hm]*": {"operator": "duplicate", "first_share": 0.7},
        }},
    ),
}  # fmt: skip
DTYPES = [jnp.float32, jnp.bfloat16]


@functools.cache
def state() -> TrainState:
    parameters = {name: array.astype(np.float32) for name, array in trained_state(MODEL).parameters.items()}
    return trained_state(MODEL)._replace(parameters=parameters)


@functools.cache
def batch() -> Batch:
    random, rows, source, target = np.random.default_rng(5), 4, 48, 24
    inputs, targets = (random.integers(3, 512, (rows, length), np.int32) for length in (source, target))
    positions = [np.tile(np.arange(length, dtype=np.int32), (rows, 1)) for length in (source, target)]
    return Batch(
        encoder_input_tokens=inputs,
        encoder_segment_ids=np.ones_like(inputs),
        encoder_positions=positions[0],
        decoder_input_tokens=np.concatenate([np.ones((rows, 1), np.int32), targets[:, :-1]], axis=1),
        decoder_target_tokens=targets,
        decoder_loss_weights=np.ones(targets.shape, np.float32),
        decoder_segment_ids=np.ones_like(targets),
        decoder_positions=positions[1],
        row_ids=np.arange(rows, dtype=np.uint32),
    )


@functools.cache
def compiled(config: ModelConfig, dtype):
    # XLA may else keep float32 between operations that are fused, here and not there.
    options = {"xla_allow_excess_precision": False}
    return jax.jit(lambda parameters: bind(config, parameters, dtype)(batch()), compiler_options=options)


def compute_logits(config: ModelConfig, parameters, dtype) -> np.ndarray:
    return np.asarray(compiled(config, dtype)(parameters), np.float64)


@functools.cache
def source_logits(dtype) -> np.ndarray:
    return compute_logits(MODEL, state().parameters, dtype)


@functools.cache
def floor(dtype) -> float:
    """The largest move of eight permutations, which change nothing but the order of sums."""
    specs, moves = declare_parameters(MODEL), []
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    for seed in range(8):
        random, permuted = np.random.default_rng(seed), dict(state().parameters)
        orders = {axis: random.permutation(size) for axis, size in sorted(sizes.items())}
        for name, spec in specs.items():
            for place, axis in enumerate(spec.axes):
                if logical_axis(axis) in ("embed", "mlp", "heads", "qk", "vo"):
                    permuted[name] = np.take(permuted[name], orders[axis], axis=place)
        moves.append(relative_error(compute_logits(MODEL, permuted, dtype), source_logits(dtype)))
    return max(moves)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", BITWISE)
def test_what_is_promised_bitwise_is(case, dtype):
    growth, grown = grow(MODEL, *BITWISE[case], state=state())
    assert growth.plan.promise == "B"
    np.testing.assert_array_equal(compute_logits(growth.target, grown.parameters, dtype), source_logits(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("case", ROUNDED)
def test_what_is_promised_but_for_rounding_moves_at_most_twice_as_far_as_a_permutation(case, dtype):
    growth, grown = grow(MODEL, *ROUNDED[case], state=state())
    assert growth.plan.promise == "R"
    moved = relative_error(compute_logits(growth.target, grown.parameters, dtype), source_logits(dtype))
    assert 0 < moved <= 2 * floor(dtype)
