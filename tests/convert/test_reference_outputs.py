"""Models of other programs, loaded by us, give what those programs computed with them."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t5pegasus.batch import Batch
from t5pegasus.config import ModelConfig
from t5pegasus.convert.foreign import Foreign
from t5pegasus.convert.sources import is_foreign, open_source
from t5pegasus.convert.t5x import read_t5x
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate
from t5pegasus.model.t5 import bind

SETS = ("", "edge_", "long_")
CROSS_BIAS = {"": True, "_nocrossbias": False}


@pytest.fixture(scope="module")
def t5_tiny(shared_data: Path) -> Foreign:
    return read_t5x(shared_data / "checkpoints" / "t5x_test_t5_tiny.checkpoint_0")


@pytest.fixture(scope="module")
def t5_tiny_reference(shared_data: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared_data / "refs" / "t5_tiny_hf_ref.npz"))


@pytest.fixture(scope="module")
def b4k_reference(shared_data: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared_data / "refs" / "b4k_tiny" / "b4k_tiny_ref.npz"))


@functools.partial(jax.jit, static_argnames="config")
def encode_and_decode(config: ModelConfig, parameters, batch: Batch):
    model = bind(config, parameters)
    return model.encode(batch.encoder_input_tokens, batch.encoder_segment_ids), model(batch)


def run(foreign: Foreign, source, source_segments, decoder_input, decoder_segments) -> tuple[np.ndarray, np.ndarray]:
    """The encoder's output and the logits."""
    source, source_segments, decoder_input, decoder_segments = (
        np.asarray(array, np.int32) for array in (source, source_segments, decoder_input, decoder_segments)
    )
    positions = [np.arange(array.shape[1], dtype=np.int32)[None] for array in (source, decoder_input)]
    batch = Batch(
        encoder_input_tokens=source, encoder_segment_ids=source_segments,
        encoder_positions=np.broadcast_to(positions[0], source.shape),
        decoder_input_tokens=decoder_input, decoder_target_tokens=decoder_input,
        decoder_loss_weights=np.ones(decoder_input.shape, np.float32), decoder_segment_ids=decoder_segments,
        decoder_positions=np.broadcast_to(positions[1], decoder_input.shape),
        row_ids=np.arange(len(source), dtype=np.uint32),
    )  # fmt: skip
    encoded, logits = encode_and_decode(foreign.model, foreign.parameters, batch)
    return np.asarray(encoded), np.asarray(logits)


def log_normaliser(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(-1)
    return largest + np.log(np.exp(logits - largest[..., None]).sum(-1))


def token_losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return log_normaliser(logits) - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_three_copies_of_one_model_are_read_alike(shared_data: Path, t5_tiny: Foreign):
    """The T5X file, the same weights by T5X's names, and Hugging Face's Flax folder: bit for bit."""
    checkpoints = shared_data / "checkpoints"
    by_name = np.load(checkpoints / "t5x_tiny_params.npz")
    query = by_name["decoder/layers_1/encoder_decoder_attention/query/kernel"]
    ours = t5_tiny.parameters["decoder.layers.cross_attention.query"][1]
    np.testing.assert_array_equal(ours, query.reshape(ours.shape))
    np.testing.assert_array_equal(
        t5_tiny.parameters["encoder.relative_bias"], by_name["encoder/relpos_bias/rel_embedding"].T
    )
    assert sum(array.size for array in t5_tiny.parameters.values()) == sum(by_name[name].size for name in by_name.files)

    assert is_foreign(checkpoints / "hf_flax_t5_tiny")
    hf, _ = open_source(checkpoints / "hf_flax_t5_tiny")
    assert dataclasses.replace(hf.model, dropout_rate=t5_tiny.model.dropout_rate) == t5_tiny.model
    assert hf.parameters.keys() == t5_tiny.parameters.keys()
    for name, array in hf.parameters.items():
        np.testing.assert_array_equal(t5_tiny.parameters[name], array)


def test_t5x_checkpoint_gives_logits_and_loss_of_transformers(t5_tiny: Foreign, t5_tiny_reference, shared_data: Path):
    ref = t5_tiny_reference
    ones = np.ones_like(ref["decoder_input_ids"])
    encoded, logits = run(t5_tiny, ref["input_ids"], ref["attention_mask"], ref["decoder_input_ids"], ones)
    real = ref["attention_mask"] == 1
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)
    close(encoded[real], ref["encoder_last_hidden_state"][real])
    close(logits[..., :512], ref["logits_first512"])
    close(log_normaliser(logits), ref["logits_lse"])
    np.testing.assert_array_equal(logits.argmax(-1), ref["logits_argmax"])
    losses = token_losses(logits, ref["labels"])
    close(losses, ref["token_nll"])
    stated = json.loads((shared_data / "refs" / "t5_tiny_hf_ref.json").read_text(encoding="utf-8"))
    close(losses.mean(), stated["nll_mean"])


@pytest.mark.parametrize(("key", "num_beams"), [("greedy", 1), ("beam4", 4)])
def test_t5x_checkpoint_writes_what_transformers_writes(t5_tiny: Foreign, t5_tiny_reference, key: str, num_beams: int):
    wanted = t5_tiny_reference[key]
    written = generate(
        t5_tiny.model,
        t5_tiny.parameters,
        jnp.asarray(t5_tiny_reference["input_ids"]),
        jnp.asarray(t5_tiny_reference["attention_mask"]),
        jnp.arange(len(wanted), dtype=jnp.uint32),
        GenerationOptions(max_new_tokens=wanted.shape[1] - 1, num_beams=num_beams),
    )
    assert (wanted[:, 0] == t5_tiny.model.decoder_start_token_id).all()
    np.testing.assert_array_equal(np.asarray(written.tokens)[:, 0], wanted[:, 1:])


@pytest.fixture(scope="module", params=CROSS_BIAS)
def b4k_tiny(request, shared_data: Path, tmp_path_factory) -> tuple[Foreign, str]:
    """The folder as bert4keras wrote it, or with its config asking for no bias in cross-attention."""
    folder = tmp_path_factory.mktemp("b4k") / "model"
    shutil.copytree(shared_data / "refs" / "b4k_tiny", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    if not CROSS_BIAS[request.param]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(config | {"cross_position_bias": False}), encoding="utf-8")
    foreign, _ = open_source(folder)
    return foreign, request.param


def test_b4k_variables_are_those_that_tensorflow_wrote(b4k_tiny, b4k_reference):
    foreign, suffix = b4k_tiny
    parameters, model = foreign.parameters, foreign.model
    assert (model.numerics == "bert4keras") is CROSS_BIAS[suffix]
    assert (model.pad_token_id, model.decoder_start_token_id, model.eos_token_id) == (0, 101, 102)
    assert sum(array.size for array in parameters.values()) == 206_128
    variables = {name: array for name, array in b4k_reference.items() if "/" in name}
    assert len(variables) == 75
    np.testing.assert_array_equal(parameters["lm_head"], variables["decoder/logits/kernel"])
    for layer in range(3):
        prefix = f"decoder/block_{layer:03}/layer_001/EncDecAttention"
        out = parameters["decoder.layers.cross_attention.out"][layer]
        np.testing.assert_array_equal(out.reshape(64, 48), variables[f"{prefix}/o"])


def segments(ids: np.ndarray) -> np.ndarray:
    """bert4keras hides keys of id 0 other than the first, and computes such queries all the same."""
    return np.where((ids != 0) | (np.arange(ids.shape[1]) == 0), 1, -1)


def stack_rows(arrays: list[np.ndarray]) -> np.ndarray:
    """Under each other, padded with zeros to the longest: one program computes all sets."""
    longest = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for array in arrays])


@pytest.fixture(scope="module")
def b4k_outputs(b4k_tiny, b4k_reference) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The encoder's output and the logits of each set."""
    sources, decoder_inputs = (
        [b4k_reference[f"{inputs}{side}_input_ids"] for inputs in SETS] for side in ("encoder", "decoder")
    )
    encoded, logits = run(
        b4k_tiny[0],
        *(stack_rows(arrays) for arrays in (sources, list(map(segments, sources)))),
        *(stack_rows(arrays) for arrays in (decoder_inputs, list(map(segments, decoder_inputs)))),
    )
    ends = np.cumsum([len(array) for array in sources])
    return {
        inputs: (
            encoded[end - len(source) : end, : source.shape[1]],
            logits[end - len(source) : end, : target.shape[1]],
        )
        for inputs, end, source, target in zip(SETS, ends, sources, decoder_inputs)
    }


@pytest.mark.parametrize("inputs", SETS)
def test_b4k_folder_gives_logits_and_loss_of_bert4keras(b4k_tiny, b4k_outputs, b4k_reference, inputs: str):
    """At every position, padding included, of all three sets, with and without the bias in cross-attention."""
    suffix, (encoded, logits) = b4k_tiny[1], b4k_outputs[inputs]
    np.testing.assert_allclose(encoded, b4k_reference[f"{inputs}encoder_output"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, b4k_reference[f"{inputs}logits{suffix}"], rtol=0, atol=1e-4)

    targets = b4k_reference[f"{inputs}decoder_input_ids"][:, 1:]
    weights = (targets != 0).astype(np.float64)
    losses = token_losses(logits[:, :-1], targets) * weights
    np.testing.assert_allclose(losses, b4k_reference[f"{inputs}token_cross_entropy{suffix}"], rtol=0, atol=1e-4)
    mean = losses.sum() / weights.sum()
    np.testing.assert_allclose(mean, b4k_reference[f"{inputs}cross_entropy{suffix}"], rtol=0, atol=1e-5)
    correct = ((logits[:, :-1].argmax(-1) == targets) * weights).sum() / weights.sum()
    np.testing.assert_allclose(correct, b4k_reference[f"{inputs}accuracy{suffix}"], rtol=0, atol=1e-6)
