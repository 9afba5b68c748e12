"""An update here is the update of Hugging Face's model by torch's AdamW: in float64, where rounding hides nothing."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from t5pegasus.batch import Batch
from t5pegasus.config import NUMERICS, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.convert.hf_config import model_to_hf_config
from t5pegasus.convert.hf_tensors import parameters_to_hf
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.train.state import start_state
from t5pegasus.train.step import pure_train_step

pytestmark = pytest.mark.peers

MODEL = ModelConfig(
    vocab_size=41, d_model=16, d_kv=3, d_ff=20, num_heads=4, num_encoder_layers=2, num_decoder_layers=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
    pad_token_id=0, decoder_start_token_id=1, eos_token_id=2,
)  # fmt: skip
# A warm-up and what follows it, and a decay that counts.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    beta1=0.8,
    beta2=0.95,
    weight_decay=0.1,
)
PLAIN = TrainConfig(steps=8, batch_size=4, z_loss=0.0)


@pytest.fixture
def _one_thread():
    """More only wait for each other where the tensors are as small as here."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_batches(count: int) -> list[Batch]:
    """Rows of one example each, of different lengths, padded at the end."""
    random = np.random.default_rng(5)

    def tokens(width: int) -> tuple[np.ndarray, np.ndarray]:
        inside = np.arange(width) < random.integers(2, width + 1, (4, 1))
        return np.where(inside, random.integers(3, MODEL.vocab_size, (4, width)), 0).astype(np.int32), inside

    batches = []
    for _ in range(count):
        (source, in_source), (target, in_target) = tokens(14), tokens(7)
        ones, places = np.ones((4, 1), np.int32), np.arange(14, dtype=np.int32)[None].repeat(4, 0)
        batch = Batch(
            source, in_source.astype(np.int32), places, np.concatenate([ones, target[:, :-1]], axis=1), target,
            in_target.astype(np.float32), in_target.astype(np.int32), places[:, :7], np.arange(4, dtype=np.uint32),
        )  # fmt: skip
        batches.append(batch)
    return batches


def our_updates(config: RunConfig, parameters: dict, batches: list[Batch]):
    """Metrics of each update, and Hugging Face's tensors after the last."""
    with jax.enable_x64(True):
        specs = declare_parameters(config.model)
        state = start_state({name: jnp.array(value, jnp.float64) for name, value in parameters.items()}, specs)
        quick = {"xla_backend_optimization_level": 0}  # compiling is most of the time
        train_step = jax.jit(pure_train_step(config, specs, jnp.float64), compiler_options=quick)
        metrics = []
        for batch in batches:
            state, values = train_step(state, batch)
            metrics.append({name: float(value) for name, value in values.items() if value.ndim == 0})
    after = {name: np.asarray(value) for name, value in state.parameters.items()}
    # The conversion rounds to float32, so the digits beyond go through it by themselves.
    beyond = {name: value - value.astype(np.float32) for name, value in after.items()}
    high, low = (parameters_to_hf(part, config.model) for part in (after, beyond))
    return metrics, {name: high[name].astype(np.float64) + low[name] for name in high}


def their_updates(config: RunConfig, parameters: dict, batches: list[Batch], learning_rates: list[float], folder: Path):
    """(loss, norm of the gradients) of each update, and the tensors after the last."""
    import torch
    from torch.nn.functional import cross_entropy
    from torch.overrides import TorchFunctionMode
    from transformers import AutoModelForSeq2SeqLM

    class KeepFloat64(TorchFunctionMode):
        """Hugging Face takes the variance of its norms in float32 even in a float64 model; here in float64, then."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.Tensor.to and args[0].dtype == torch.float64 and args[1:] == (torch.float32,):
                return args[0]
            return function(*args, **(kwargs or {}))

    (folder / "config.json").write_text(json.dumps(model_to_hf_config(config.model)), encoding="utf-8")
    save_file(parameters_to_hf(parameters, config.model), folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, local_files_only=True).double().train()
    leaves = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [leaf for leaf in leaves.values() if leaf.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
            {"params": [leaf for leaf in leaves.values() if leaf.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.epsilon,
    )
    values = []
    for batch, learning_rate in zip(batches, learning_rates):
        labels = torch.tensor(np.where(batch.decoder_loss_weights > 0, batch.decoder_target_tokens, -100)).long()
        with KeepFloat64():
            output = model(
                input_ids=torch.tensor(batch.encoder_input_tokens),
                attention_mask=torch.tensor(batch.encoder_segment_ids),
                decoder_input_ids=torch.tensor(batch.decoder_input_tokens),
                labels=labels,
            )
        smoothed = cross_entropy(
            output.logits.flatten(0, 1), labels.flatten(), label_smoothing=config.train.label_smoothing
        )
        z = torch.logsumexp(output.logits, -1)[labels >= 0].square().mean()
        optimizer.zero_grad()
        (smoothed + config.train.z_loss * z).backward()
        norm = torch.nn.utils.get_total_norm([leaf.grad for leaf in leaves.values()])
        for leaf in leaves.values():  # clip_grad_norm_ would add 1e-6 to the norm where we add 1e-9
            leaf.grad.mul_(torch.clamp(config.optimizer.max_grad_norm / (norm + 1e-9), max=1.0))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        values.append((output.loss.item(), norm.item()))
    return values, {name: leaf.detach().numpy() for name, leaf in leaves.items()}


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize(
    ("numerics", "max_grad_norm", "train"),
    [
        ("hf-mt5", 2.5, PLAIN),
        ("t5-1.0", 1.7, PLAIN),
        ("hf-mt5", 2.3, dataclasses.replace(PLAIN, label_smoothing=0.1, z_loss=1e-2, accumulation_steps=2)),
    ],
    ids=["hf-mt5", "t5-1.0", "smoothed labels, z-loss, micro-batches"],
)
def test_updates_are_torchs_of_hugging_faces_model(numerics, max_grad_norm, train, tmp_path):
    model = dataclasses.replace(MODEL, **NUMERICS[numerics])
    optimizer = dataclasses.replace(OPTIMIZER, max_grad_norm=max_grad_norm)
    config = RunConfig(model=model, optimizer=optimizer, train=train)
    parameters = {name: np.asarray(value) for name, value in init_parameters(model, 3).items()}
    batches = draw_batches(5)
    metrics, ours = our_updates(config, parameters, batches)
    learning_rates = [step["learning_rate"] for step in metrics]
    values, theirs = their_updates(config, parameters, batches, learning_rates, tmp_path)
    np.testing.assert_allclose([(step["loss"], step["grad_norm"]) for step in metrics], values, rtol=1e-10)
    norms = [norm for _, norm in values]
    assert min(norms) < max_grad_norm < max(norms), "some updates are clipped, some are not"
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, theirs[name], rtol=0, atol=1e-10, err_msg=name)
