"""The model card of an export: what the model is, how to load it, and by which checksum to know it."""

from pathlib import Path
from typing import Any

from t5pegasus.checkpoint import CheckpointInfo
from t5pegasus.config import ModelConfig
from t5pegasus.model.t5 import count_parameters
from t5pegasus.text.tokenizer import Tokenizer

_NUMERICS = {
    "hf-mt5": "mT5 / T5.1.1: gated tanh-GELU, output head of its own, no scale",
    "bert4keras": "T5 PEGASUS as in bert4keras: gated exact GELU, output head of its own, logits times d_model^-0.5, "
    "relative bias in cross-attention",
    "t5-1.0": "T5 1.0: ReLU without a gate, embedding as output head, logits times d_model^-0.5",
    "custom": "none of the named families",
}


def write_model_card(
    output_path: Path,
    info: CheckpointInfo,
    tokenizer: Tokenizer,
    *,
    tokenizer_loader: str,
    losses: tuple[str, ...],
    weights_sha256: str,
) -> None:
    """Write README.md into an export.

    Args:
        output_path: the export.
        info: of the checkpoint it was made of.
        tokenizer: its tokenizer.
        tokenizer_loader: the Python expression that loads it.
        losses: what the export could not keep, one clause each.
        weights_sha256: of model.safetensors.
    """
    model = info.config.model
    sections = [
        "---\nlanguage: zh\npipeline_tag: summarization\nlibrary_name: transformers\ntags:\n- t5\n- t5-pegasus\n"
        "- summarization\n---",
        f"# Chinese T5 with {count_parameters(model) / 1e6:,.1f} million parameters",
        "A T5 encoder-decoder for Chinese summarization, exported from a checkpoint of t5pegasus.",
        *(["**Not the same model any more:** " + "; ".join(losses) + "."] if losses else []),
        _table(info, tokenizer),
        _describe_numerics(model),
        *(["## Lineage", _describe_lineage(info)] if info.lineage else []),
        "## Use",
        _usage(info, tokenizer, tokenizer_loader),
        "## Checksums",
        f"`model.safetensors` has SHA-256 `{weights_sha256}`; `sha256sum --check SHA256SUMS` checks every file.",
    ]
    (output_path / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _table(info: CheckpointInfo, tokenizer: Tokenizer) -> str:
    model = info.config.model
    rows = {
        "parameters": f"{count_parameters(model):,}",
        "layers": f"{model.num_encoder_layers} encoder, {model.num_decoder_layers} decoder",
        "width": f"d_model {model.d_model}, d_ff {model.d_ff}, {model.num_heads} heads of {model.d_kv}",
        "numerics": model.numerics,
        "dtype": "float32",
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
        "ids": f"pad {model.pad_token_id}, decoder start {model.decoder_start_token_id}, end {model.eos_token_id}, "
        f"unknown {tokenizer.unk_id}",
        "lengths in training": f"{info.config.data.max_source_tokens} source tokens, "
        f"{info.config.data.max_target_tokens} target tokens",
        "training steps": f"{info.step:,}" if info.step else "0 (imported, not trained by t5pegasus)",
    }
    if info.history:
        rows["last held-out loss"] = (
            f"{info.history[-1]['loss']:.4f} nats per token (step {info.history[-1]['step']:,})"
        )
    return "| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows.items())


def _describe_numerics(model: ModelConfig) -> str:
    lines = [f"Numerics of the checkpoint: {_NUMERICS[model.numerics]}."]
    if model.scale_decoder_outputs and not model.tie_word_embeddings:
        lines.append("The scale of the logits is folded into `lm_head.weight` here.")
    if not model.inner_dropout:
        lines.append("It was trained without dropout of attention weights and feed-forward units; transformers has it.")
    return " ".join(lines)


def _describe_lineage(info: CheckpointInfo) -> str:
    return "\n".join(f"- {_describe_ancestor(entry)}" for entry in info.lineage)


def _describe_ancestor(entry: dict[str, Any]) -> str:
    plan = entry["plan"]
    grown = (
        f"{name} {size} → {plan['target'][name]}"
        for name, size in plan["source"].items()
        if plan["target"][name] != size
    )
    return f"grown at step {entry['step']:,} from checkpoint {entry['source_fingerprint'][:12]}…: {', '.join(grown)}"


def _usage(info: CheckpointInfo, tokenizer: Tokenizer, tokenizer_loader: str) -> str:
    architecture = (
        "T5ForConditionalGeneration" if info.config.model.tie_word_embeddings else "MT5ForConditionalGeneration"
    )
    if tokenizer_loader.startswith("AutoTokenizer"):
        imports = f"from transformers import AutoTokenizer, {architecture}"
        ids = 'tokenizer(text, truncation=True, return_tensors="pt").input_ids'
        decode = "tokenizer.decode(written, skip_special_tokens=True)"
    else:
        imports = f"import sentencepiece\nimport torch\nfrom transformers import {architecture}"
        ids = f"torch.tensor([[*tokenizer.encode(text), {tokenizer.end_id}]])"
        decode = "tokenizer.decode(written[1:].tolist())"
    note = (
        "The tokenizer is code in this folder (`tokenization_t5_pegasus.py`, needs `pip install rjieba`), which is why "
        "transformers asks for `trust_remote_code`. Sources are `[CLS] text [SEP]`; labels (`text_target=`) are "
        "`text [SEP]`.\n\n"
        if "trust_remote_code" in tokenizer_loader
        else ""
    )
    return (
        f"{note}With transformers 5:\n\n```python\n{imports}\n\n"
        f"tokenizer = {tokenizer_loader}\nmodel = {architecture}.from_pretrained(folder)\n"
        f'ids = {ids}\nwritten = model.generate(ids, num_beams=4, early_stopping="never")[0]\nprint({decode})\n```'
    )
