"""Greedy and beam search of Hugging Face transformers 4.44.2 (Flax) on a published T5.1.1 checkpoint."""

import numpy as np
import pytest

from t5pegasus.config import ModelConfig
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate

CONFIG = ModelConfig(
    vocab_size=32128, d_model=8, d_kv=3, d_ff=16, num_heads=4, num_encoder_layers=2, num_decoder_layers=2,
    dropout_rate=0.0, decoder_start_token_id=0, eos_token_id=1,
)  # fmt: skip
ATTENTION = {"encoder": {"attention": "self_attention"}, "decoder": {
    "self_attention": "self_attention", "encoder_decoder_attention": "cross_attention"}}  # fmt: skip
NORM = {
    "pre_attention_layer_norm": "pre_attention_norm",
    "pre_self_attention_layer_norm": "pre_attention_norm",
    "pre_cross_attention_layer_norm": "pre_cross_attention_norm",
    "pre_mlp_layer_norm": "pre_mlp_norm",
}


@pytest.fixture(scope="module")
def reference(shared_data):
    return np.load(shared_data / "refs" / "t5_tiny_hf_ref.npz")


@pytest.fixture(scope="module")
def parameters(shared_data):
    stored = np.load(shared_data / "checkpoints" / "t5x_tiny_params.npz")

    def stack(side, name):
        return np.stack([stored[f"{side}/layers_{layer}/{name}"] for layer in range(2)])

    found = {"token_embedding": stored["token_embedder/embedding"], "lm_head": stored["decoder/logits_dense/kernel"]}
    for side, attentions in ATTENTION.items():
        found[f"{side}.final_norm"] = stored[f"{side}/{side}_norm/scale"]
        found[f"{side}.relative_bias"] = stored[f"{side}/relpos_bias/rel_embedding"].T
        for theirs, ours in attentions.items():
            for name in ("query", "key", "value", "out"):
                kernel = stack(side, f"{theirs}/{name}/kernel")
                shape = (2, 4, 3, 8) if name == "out" else (2, 8, 4, 3)
                found[f"{side}.layers.{ours}.{name}"] = kernel.reshape(shape)
        for name in ("wi_0", "wi_1", "wo"):
            found[f"{side}.layers.mlp.{name}"] = stack(side, f"mlp/{name}/kernel")
        for theirs, ours in NORM.items():
            if f"{side}/layers_0/{theirs}/scale" in stored:
                found[f"{side}.layers.{ours}"] = stack(side, f"{theirs}/scale")
    return found


@pytest.mark.parametrize(("num_beams", "name"), [(1, "greedy"), (4, "beam4")])
def test_outputs_equal_those_of_transformers(parameters, reference, num_beams, name):
    tokens, segments = reference["input_ids"], reference["attention_mask"]
    options = GenerationOptions(max_new_tokens=19, num_beams=num_beams, length_penalty=1.0)
    generated = generate(CONFIG, parameters, tokens, segments, np.arange(4, dtype=np.uint32), options)
    assert np.array_equal(generated.tokens[:, 0], reference[name][:, 1:])
