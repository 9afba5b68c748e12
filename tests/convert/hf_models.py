"""Small models in every profile of numerics, and how tests convert and compute them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import load_arrays
from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.hf import read_hf
from t5pegasus.convert.imported import Imported, import_foreign, save_imported
from t5pegasus.model.t5 import bind, declare_parameters

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"]
MODEL = ModelConfig(
    vocab_size=len(WORDS), d_model=12, d_kv=3, d_ff=20, num_heads=5, num_encoder_layers=3, num_decoder_layers=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.05, layer_norm_epsilon=1e-5,
    pad_token_id=0, decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip
MODELS = {
    **{name: dataclasses.replace(MODEL, **fields) for name, fields in NUMERICS.items()},
    "untied relu": dataclasses.replace(MODEL, feed_forward_proj="relu"),
    "tied, not scaled": dataclasses.replace(MODEL, tie_word_embeddings=True),
    "folded": dataclasses.replace(MODEL, feed_forward_proj="gated-gelu-erf"),
}
"""The named numerics, and other ones that Hugging Face can express."""
LOSSLESS = [name for name in MODELS if name != "bert4keras"]


def draw_parameters(config: ModelConfig, seed: int = 3) -> dict[str, np.ndarray]:
    """Random ones, gains included."""
    generator = np.random.default_rng(seed)
    return {
        name: (
            generator.uniform(0.5, 1.5, spec.shape) if spec.gain else spec.init_std * generator.normal(size=spec.shape)
        ).astype(np.float32)
        for name, spec in declare_parameters(config).items()
    }


def our_logits(config: ModelConfig, parameters, source, source_mask, decoder_input) -> np.ndarray:
    source, source_mask, decoder_input = (np.asarray(array, np.int32) for array in (source, source_mask, decoder_input))
    batch = Batch(
        encoder_input_tokens=source, encoder_segment_ids=source_mask,
        encoder_positions=np.arange(source.shape[1])[None],
        decoder_input_tokens=decoder_input, decoder_target_tokens=decoder_input,
        decoder_loss_weights=np.ones(decoder_input.shape, np.float32), decoder_segment_ids=np.ones_like(decoder_input),
        decoder_positions=np.arange(decoder_input.shape[1])[None], row_ids=np.arange(len(source), dtype=np.uint32),
    )  # fmt: skip
    return np.asarray(jax.jit(lambda values, batch: bind(config, values)(batch))(parameters, batch))


def draw_inputs(vocab_size: int, num_source: int = 30, num_target: int = 26, seed: int = 0):
    """Ids [2, …] without specials; the second source is shorter than the first."""
    generator = np.random.default_rng(seed)
    source, decoder_input = (generator.integers(4, vocab_size, (2, size)) for size in (num_source, num_target))
    return source, np.arange(num_source)[None, :] < np.array([[num_source], [num_source // 2 + 2]]), decoder_input


def import_hf(folder: Path, output: Path, numerics: str | None = None) -> Imported:
    """What the verb does with a Hugging Face folder."""
    foreign = read_hf(folder, numerics)
    imported = import_foreign(foreign, folder / "config.json", ids_of_tokenizer=numerics is not None)
    save_imported(imported, output)
    return imported


def load_parameters(checkpoint: Path) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("parameters."): array for name, array in load_arrays(checkpoint, ("parameters.",)).items()
    }


def copy_with(hf_folder: Path, target: Path, change) -> Path:
    """The folder with its config and tensors as `change(config, tensors)` leaves them."""
    target.mkdir()
    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(hf_folder / "model.safetensors")
    change(config, tensors)
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, target / "model.safetensors")
    (target / "vocab.txt").write_bytes((hf_folder / "vocab.txt").read_bytes())
    return target
