"""Small models as training would leave them, grown, and computed by an oracle that shares no code with growth."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy_t5 import Forward

from growth.grow import grow_state
from growth.t5 import ModelGrowth, plan_growth
from t5pegasus.axes import AxisMultiplier, ParamSpec
from t5pegasus.config import ModelConfig, OptimizerConfig
from t5pegasus.convert.hf_tensors import list_hf_tensors
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.train.optimizer import declare_moments
from t5pegasus.train.state import TrainState

SOURCE = ModelConfig(
    vocab_size=41, d_model=12, d_kv=5, d_ff=14, num_heads=3, num_encoder_layers=2, num_decoder_layers=1,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.0,
    decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
WIDTHS = {"d_model": 19, "d_kv": 7, "d_ff": 23, "num_heads": 5}
ALL = {**WIDTHS, "num_encoder_layers": 5, "num_decoder_layers": 2}
STEP = 11
Lengths = tuple[tuple[int, int], ...]
LENGTHS = ((13, 6), (8, 4))
"""Source and target tokens of the examples."""


@functools.cache
def trained_state(config: ModelConfig, optimizer: OptimizerConfig | None = None) -> TrainState:
    """Float64: gains off one, biases that matter, moments of the size of gradients, a position in the data."""
    random, specs = np.random.default_rng(7), declare_parameters(config)

    def draw(name: str, spec: ParamSpec) -> np.ndarray:
        values = random.standard_normal(spec.shape)
        return 1 + 0.1 * values if spec.gain else (3 if "relative_bias" in name else 1) * spec.init_std * values

    moments: dict[str, dict[str, np.ndarray]] = {}
    for kind, group in declare_moments(optimizer or OptimizerConfig(), specs).items():
        signed = kind == "first_moment"
        moments[kind] = {
            name: 1e-2 * random.standard_normal(moment.spec.shape)
            if signed
            else 1e-4 * random.random(moment.spec.shape)
            for name, moment in group.items()
        }
    return TrainState(
        step=np.int32(STEP),
        rows=np.uint32(88),
        parameters={name: draw(name, spec) for name, spec in specs.items()},
        **moments,
        multipliers=fresh_records(specs),
    )


def fresh_records(specs: Mapping[str, ParamSpec]) -> dict[str, AxisMultiplier]:
    """The record of a model that never grew, in float64."""
    sizes = {axis: size for spec in specs.values() for axis, size in zip(spec.axes, spec.shape)}
    return {
        axis: AxisMultiplier(*(np.ones(size) for _ in range(4)), born=np.full(size, -1, np.int32))
        for axis, size in sorted(sizes.items())
    }


def grow(
    source: ModelConfig, changes: Mapping[str, Any], choices: Mapping[str, Any] | None = None,
    state: TrainState | None = None,
) -> tuple[ModelGrowth, TrainState]:  # fmt: skip
    """A growth from a config by changed fields, and the grown state."""
    growth = plan_growth(source, dataclasses.replace(source, **changes), choices, step=STEP)
    return growth, grow_state(trained_state(source) if state is None else state, growth)


def hf_weights(config: ModelConfig, parameters: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By Hugging Face's names, kernels as [out, in], in the precision there is."""
    weights = {}
    for tensor in list_hf_tensors(config):
        part = np.asarray(parameters[tensor.parameter])[tensor.index]
        is_kernel = part.ndim > 1 and tensor.axes[0].rpartition(".")[2] not in ("vocab", "relpos_buckets")
        weights[tensor.name] = part.reshape(tensor.shape[::-1]).T if is_kernel else part
    return weights


def oracle_logits(
    config: ModelConfig, parameters: Mapping[str, np.ndarray], num_tokens: int, lengths: Lengths = LENGTHS
) -> np.ndarray:
    """Logits [positions, vocab] of examples of the first `num_tokens` tokens, with two padded positions each."""
    model = Forward(hf_weights(config, parameters), config)
    random = np.random.default_rng(1)
    logits = []
    for num_source, num_target in lengths:
        source, target = (random.integers(num_tokens, size=length) for length in (num_source, num_target))
        logits.append(model.logits(source, np.arange(num_source) < num_source - 2, np.concatenate([[1], target[1:]])))
    return np.concatenate(logits)


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.max(np.abs(got - wanted)) / np.max(np.abs(wanted)))


def logit_error(
    source: ModelConfig, growth: ModelGrowth, grown: TrainState, state: TrainState | None = None,
    lengths: Lengths = LENGTHS,
) -> float:  # fmt: skip
    """How far a growth moved the logits, in units of their largest; masked tokens do not count."""
    num_tokens = source.vocab_size - source.num_masked_tokens
    before = trained_state(source) if state is None else state
    wanted, got = (
        oracle_logits(config, parameters, num_tokens, lengths)[:, :num_tokens]
        for config, parameters in ((source, before.parameters), (growth.target, grown.parameters))
    )
    return relative_error(got, wanted)
