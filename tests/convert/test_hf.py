"""Laws of conversion: an independent forward of Hugging Face's semantics agrees, and there and back is the identity."""

import hashlib
import json
from pathlib import Path

import jax
import msgpack
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t5pegasus.batch import Batch
from t5pegasus.checkpoint import has_optimizer_state, load_arrays, load_checkpoint_info
from t5pegasus.config import ModelConfig
from t5pegasus.convert.hf import export_hf, import_hf, is_hf_folder, model_from_hf_config, model_to_hf_config
from t5pegasus.convert.hf_tensors import parameters_from_hf, parameters_to_hf
from t5pegasus.errors import ArtifactError, T5PegasusError, UsageError
from t5pegasus.model.t5 import bind, declare_parameters

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往"]
MODEL = ModelConfig(
    vocab_size=len(WORDS), d_model=12, d_kv=3, d_ff=20, num_heads=5, num_encoder_layers=3, num_decoder_layers=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, dropout_rate=0.05, layer_norm_epsilon=1e-5,
    pad_token_id=0, decoder_start_token_id=2, eos_token_id=3,
)  # fmt: skip


def buckets_by_cases(distance: int, *, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        back = abs(distance)
    else:
        back = max(-distance, 0)
    exact = num_buckets // 2
    if back < exact:
        return first + back
    ratio = np.log(np.float32(back) / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    return first + min(exact + int(ratio * np.float32(num_buckets - exact)), num_buckets - 1)


def hf_forward(tensors, config: dict, source, source_mask, decoder_input) -> np.ndarray:
    """Logits of one example by Hugging Face's definition of MT5, matrix by matrix, float64."""
    weights = {name: np.asarray(tensor, np.float64) for name, tensor in tensors.items()}
    heads, size = config["num_heads"], config["d_kv"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config["layer_norm_epsilon"]) * weights[f"{name}.weight"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T

    def attention(x, memory, name, bias):
        query, key, value = (
            linear(y, f"{name}.{letter}").reshape(len(y), heads, size).transpose(1, 0, 2)
            for y, letter in ((x, "q"), (memory, "k"), (memory, "v"))
        )
        scores = query @ key.transpose(0, 2, 1) + bias
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ value
        return linear(mixed.transpose(1, 0, 2).reshape(len(x), heads * size), f"{name}.o")

    def feed_forward(x, name):
        gate = linear(x, f"{name}.wi_0")
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        return linear(gate * linear(x, f"{name}.wi_1"), f"{name}.wo")

    def bias_of(stack, length, *, bidirectional):
        table = weights[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        shape = {
            "num_buckets": config["relative_attention_num_buckets"],
            "max_distance": config["relative_attention_max_distance"],
        }
        of_pair = [
            [buckets_by_cases(key - query, bidirectional=bidirectional, **shape) for key in range(length)]
            for query in range(length)
        ]
        return table[np.array(of_pair)].transpose(2, 0, 1)

    hidden = np.where(source_mask, 0.0, -np.inf)[None, None, :]
    x = weights["shared.weight"][source]
    bias = bias_of("encoder", len(source), bidirectional=True) + hidden
    for block in (f"encoder.block.{layer}" for layer in range(config["num_layers"])):
        normed = norm(x, f"{block}.layer.0.layer_norm")
        x = x + attention(normed, normed, f"{block}.layer.0.SelfAttention", bias)
        x = x + feed_forward(norm(x, f"{block}.layer.1.layer_norm"), f"{block}.layer.1.DenseReluDense")
    encoded = norm(x, "encoder.final_layer_norm")

    x = weights["shared.weight"][decoder_input]
    causal = np.where(np.tri(len(decoder_input), dtype=bool), 0.0, -np.inf)
    bias = bias_of("decoder", len(decoder_input), bidirectional=False) + causal
    for block in (f"decoder.block.{layer}" for layer in range(config["num_decoder_layers"])):
        normed = norm(x, f"{block}.layer.0.layer_norm")
        x = x + attention(normed, normed, f"{block}.layer.0.SelfAttention", bias)
        normed = norm(x, f"{block}.layer.1.layer_norm")
        x = x + attention(normed, encoded, f"{block}.layer.1.EncDecAttention", hidden)
        x = x + feed_forward(norm(x, f"{block}.layer.2.layer_norm"), f"{block}.layer.2.DenseReluDense")
    return linear(norm(x, "decoder.final_layer_norm"), "lm_head")


def draw_parameters(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
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


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder written by hand from random parameters, with the names spelled by the mapping."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(model_to_hf_config(MODEL)), encoding="utf-8")
    tensors = parameters_to_hf(draw_parameters(MODEL, 3), MODEL)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(hf_folder: Path) -> Path:
    return import_hf(hf_folder, hf_folder.parent / "checkpoint").path


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


def load_parameters(checkpoint: Path) -> dict[str, np.ndarray]:
    return {
        name.removeprefix("parameters."): array for name, array in load_arrays(checkpoint, ("parameters.",)).items()
    }


def test_independent_forward_gives_our_logits(hf_folder: Path, checkpoint: Path):
    tensors = load_file(hf_folder / "model.safetensors")
    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(0)
    source, decoder_input = generator.integers(4, len(WORDS), (2, 30)), generator.integers(4, len(WORDS), (2, 26))
    mask = np.arange(30)[None, :] < np.array([[30], [17]])
    ours = our_logits(MODEL, load_parameters(checkpoint), source, mask, decoder_input)
    for row in range(2):
        theirs = hf_forward(tensors, config, source[row], mask[row], decoder_input[row])
        np.testing.assert_allclose(ours[row], theirs, rtol=0, atol=1e-5)


def test_export_after_import_is_the_identity(hf_folder: Path, checkpoint: Path, tmp_path: Path):
    exported = export_hf(checkpoint, tmp_path / "exported")
    before, after = (load_file(folder / "model.safetensors") for folder in (hf_folder, exported))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])
    for name in ("config.json", "vocab.txt"):
        first, second = ((folder / name).read_text(encoding="utf-8") for folder in (hf_folder, exported))
        assert (json.loads(first) == json.loads(second)) if name == "config.json" else first == second


def test_import_after_export_is_the_identity(checkpoint: Path, tmp_path: Path):
    again = import_hf(export_hf(checkpoint, tmp_path / "exported"), tmp_path / "again").path
    assert load_checkpoint_info(again) == load_checkpoint_info(checkpoint)
    before, after = load_arrays(checkpoint), load_arrays(again)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    assert not has_optimizer_state(again)


def test_export_is_complete_and_reproducible(checkpoint: Path, tmp_path: Path):
    first, second = (export_hf(checkpoint, tmp_path / name) for name in ("first", "second"))
    assert is_hf_folder(first)
    sums = dict(
        reversed(line.split("  ")) for line in (first / "SHA256SUMS").read_text(encoding="utf-8").split("\n")[:-1]
    )
    assert sums.keys() == {"config.json", "generation_config.json", "model.safetensors", "vocab.txt"}
    for name, digest in sums.items():
        assert hashlib.sha256((first / name).read_bytes()).hexdigest() == digest
    assert (second / "SHA256SUMS").read_bytes() == (first / "SHA256SUMS").read_bytes()
    tensors = load_file(first / "model.safetensors")
    assert "shared.weight" in tensors
    assert "lm_head.weight" in tensors
    assert not [name for name in tensors if "embed_tokens" in name]
    assert json.loads((first / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"] is False


def test_bfloat16_and_repeated_embeddings_are_read(hf_folder: Path, tmp_path: Path):
    def change(config, tensors):
        import ml_dtypes

        for name in tensors:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]

    imported = import_hf(copy_with(hf_folder, tmp_path / "narrow", change), tmp_path / "out")
    wide = load_file(hf_folder / "model.safetensors")["shared.weight"]
    np.testing.assert_allclose(load_parameters(imported.path)["token_embedding"], wide, rtol=2**-8)


def test_padding_rows_of_the_vocabulary_are_left_out(hf_folder: Path, checkpoint: Path, tmp_path: Path):
    def change(config, tensors):
        config["vocab_size"] += 5
        for name in ("shared.weight", "lm_head.weight"):
            tensors[name] = np.concatenate([tensors[name], np.full((5, MODEL.d_model), 7, np.float32)])

    imported = import_hf(copy_with(hf_folder, tmp_path / "padded", change), tmp_path / "out")
    assert imported.num_padding_rows == 5
    assert load_checkpoint_info(imported.path) == load_checkpoint_info(checkpoint)
    for name, array in load_parameters(checkpoint).items():
        np.testing.assert_array_equal(load_parameters(imported.path)[name], array)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("model_type", "bart", "mt5 or t5"),
        ("feed_forward_proj", "relu", "gated-gelu"),
        ("dense_act_fn", "gelu", "gelu_new"),
        ("tie_word_embeddings", True, "false"),
        ("scale_decoder_outputs", True, "false"),
        ("d_model", None, "number"),
        ("decoder_start_token_id", 0, "2"),
        ("eos_token_id", 1, "3"),
        ("vocab_size", 9, str(len(WORDS))),
        ("vocab_size", 999, str(len(WORDS))),
    ],
)
def test_foreign_config_is_refused_by_name(hf_folder: Path, tmp_path: Path, field: str, value, wanted: str):
    folder = copy_with(hf_folder, tmp_path / "changed", lambda config, _: config.update({field: value}))
    with pytest.raises(UsageError, match=rf"config\.json: {field} is {value!r}.*{wanted}"):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda _, t: t.pop("decoder.block.1.layer.1.EncDecAttention.k.weight"), "EncDecAttention.k.weight is missing"),
        (lambda _, t: t.update({"encoder.block.9.extra": np.ones(2)}), "encoder.block.9.extra has no place"),
        (
            lambda _, t: t.update({"encoder.embed_tokens.weight": 1 + t["shared.weight"]}),
            "embed_tokens.weight has no place",
        ),
        (lambda c, _: c.update(d_ff=21), r"has shape \(20, 12\), config.json asks for \(21, 12\)"),
        (lambda _, t: t.update({"lm_head.weight": t["lm_head.weight"].astype(np.int8)}), "int8"),
    ],
)
def test_foreign_tensors_are_refused_by_name(hf_folder: Path, tmp_path: Path, change, message: str):
    folder = copy_with(hf_folder, tmp_path / "changed", change)
    with pytest.raises(ArtifactError, match=message):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_or_cut_files_are_refused(hf_folder: Path, checkpoint: Path, tmp_path: Path):
    folder = copy_with(hf_folder, tmp_path / "cut", lambda *_: None)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        import_hf(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="does not exist"):
        import_hf(folder, tmp_path / "out")
    (folder / "vocab.txt").unlink()
    with pytest.raises(UsageError, match="--tokenizer-path"):
        import_hf(folder, tmp_path / "out")
    for convert, source in ((import_hf, hf_folder), (export_hf, checkpoint)):
        with pytest.raises(UsageError, match="exists already"):
            convert(source, tmp_path)
    with pytest.raises(T5PegasusError):
        export_hf(tmp_path, tmp_path / "out")


def test_logits_of_transformers_are_ours(shared_data: Path):
    """A real T5.1.1 model, computed by transformers' Flax code, through the same name map."""
    folder = shared_data / "checkpoints" / "hf_flax_t5_tiny"
    reference = np.load(shared_data / "refs" / "t5_tiny_hf_ref.npz")
    config = model_from_hf_config(
        json.loads((folder / "config.json").read_text(encoding="utf-8")), folder / "config.json"
    )

    def read_array(code: int, data: bytes) -> np.ndarray:
        assert code == 1
        shape, dtype, content = msgpack.unpackb(data)
        return np.frombuffer(content, dtype).reshape(shape)

    def flatten(tree, prefix: str = ""):
        for name, value in tree.items():
            if isinstance(value, dict):
                yield from flatten(value, f"{prefix}{name}.")
            elif name == "kernel":  # Flax's [in, out] is torch's transposed
                yield f"{prefix}weight", value.T
            else:
                yield f"{prefix}weight", value

    tree = msgpack.unpackb((folder / "flax_model.msgpack").read_bytes(), ext_hook=read_array)
    parameters = parameters_from_hf(dict(flatten(tree)), config)
    logits = our_logits(
        config, parameters, reference["input_ids"], reference["attention_mask"], reference["decoder_input_ids"]
    )
    np.testing.assert_allclose(logits[..., :512], reference["logits_first512"], rtol=0, atol=1e-5)
    largest = logits.max(-1)
    normalizer = largest + np.log(np.exp(logits - largest[..., None]).sum(-1))
    np.testing.assert_allclose(normalizer, reference["logits_lse"], rtol=0, atol=1e-5)
