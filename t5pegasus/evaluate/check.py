"""Is this the model it should be? Size, numerics and ids of a model in memory, and its cross-entropy on a text."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from t5pegasus.config import RunConfig
from t5pegasus.convert.imported import Imported
from t5pegasus.corpus.chain import Chain, Kind
from t5pegasus.corpus.pairs import check_pair_paths, read_pairs
from t5pegasus.data.records import Example
from t5pegasus.errors import DataError
from t5pegasus.evaluate.heldout import measure_heldout_loss
from t5pegasus.model.t5 import count_parameters
from t5pegasus.sample import TRAIN_PATH
from t5pegasus.text.read import Document, describe_dropped, read_documents

SCALE_IS_WRONG = 20.0
"""Nats per token that no model reaches by being bad, only by logits of another scale."""


@dataclasses.dataclass(frozen=True)
class Check:
    """What a check found."""

    kind: str
    """What the source is."""
    imported: Imported
    examples: str
    """What they were made of."""
    num_examples: int
    num_tokens: int
    """Target tokens, over which the loss is a mean."""
    unknown_rate: float
    """Share of unknown tokens among all of the examples."""
    loss: float
    """Nats per target token."""

    def to_table(self) -> str:
        """All of it in a few lines, with a verdict on the loss."""
        model, tokenizer = self.imported.model, self.imported.tokenizer
        ids = f"pad {tokenizer.pad_id}, start {tokenizer.start_id}, end {tokenizer.end_id}, unknown {tokenizer.unk_id}"
        rows = {
            "source": self.kind,
            "parameters": f"{count_parameters(model):,}",
            "sizes": f"{model.num_encoder_layers}+{model.num_decoder_layers} layers, d_model {model.d_model}, d_ff "
            f"{model.d_ff}, {model.num_heads} heads of {model.d_kv}, vocabulary {model.vocab_size:,}",
            "numerics": _describe_numerics(self.imported),
            "dtype": f"{self.imported.stored_dtype} stored, float32 computed",
            "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens; {ids}",
            "examples": f"{self.num_examples:,} {self.examples}, {self.num_tokens:,} target tokens, "
            f"{100 * self.unknown_rate:.2f} % unknown",
            "loss": f"{self.loss:.4f} nats per target token",
        }
        return "\n".join([*(f"{name:<12}{value}" for name, value in rows.items()), f"{'':<12}{self.verdict}"])

    @property
    def verdict(self) -> str:
        """What the loss means, in one sentence."""
        guessing = math.log(self.imported.model.vocab_size)
        if not math.isfinite(self.loss):
            return "Not a number: the parameters, or what they compute, are not finite; the source is damaged."
        if self.loss > SCALE_IS_WRONG:
            scaled = self.imported.model.scale_decoder_outputs
            return f"Far above guessing ({guessing:.2f}): the logits have another scale than in training. " + (
                "These numerics scale them by d_model^-0.5, which the weights seem not to be made for."
                if scaled
                else "80 or more is what a port of T5 PEGASUS gives whose logit scale is missing: read its Hugging "
                "Face folder with --numerics bert4keras."
            )
        if self.loss > guessing:
            return (
                f"Worse than guessing ({guessing:.2f}): untrained, not trained on such a task (as mT5 is not), or with "
                "another tokenizer or other numerics than in training."
            )
        return (
            f"Better than guessing ({guessing:.2f}). For comparison: T5 PEGASUS was trained to 2.97 (base) and 3.40 "
            "(small) on pseudo-summaries."
        )


def make_examples(
    imported: Imported, config: RunConfig, text_path: Path | None, max_examples: int
) -> tuple[list[Example], str]:
    """Examples for the model, and what they are.

    Args:
        imported: its tokenizer makes the ids.
        config: its row lengths bound the examples.
        text_path: documents, or pairs of text and summary; None takes the embedded sample.
        max_examples: no more than so many, the first ones.

    Raises:
        UsageError: if the file is missing, or of a kind that cannot be read.
        DataError: if it gives no example.
    """
    reasons: Counter[str] = Counter()
    kind, documents = _read_text(text_path or TRAIN_PATH, reasons)
    of_what = f"{'pairs' if kind == 'pairs' else 'pseudo-summaries'} of {text_path or 'the embedded sample'}"
    chain = Chain(kind, imported.tokenizer, config.data.max_source_tokens, config.data.max_target_tokens)
    examples: list[Example] = []
    for document in documents:
        made = chain.run(document)
        if isinstance(made, str):
            reasons[made] += 1
        else:
            examples += [Example(*(np.array(side, np.int32) for side in example)) for example in made.examples]
        if len(examples) >= max_examples:
            break
    if not examples:
        why = describe_dropped(reasons) or "nothing is in it"
        raise DataError(f"no example can be made of {of_what} ({why}); give longer texts, or pairs {{text, summary}}")
    return examples[:max_examples], of_what


def check_model(
    kind: str, imported: Imported, config: RunConfig, examples: list[Example], of_what: str, batch_size: int
) -> Check:
    """Measure the cross-entropy of a model on examples; see `Check`."""
    config = dataclasses.replace(config, model=imported.model)
    heldout = measure_heldout_loss(config, imported.parameters, examples, batch_size)
    tokens = np.concatenate([side for example in examples for side in example])
    return Check(
        kind=kind,
        imported=imported,
        examples=of_what,
        num_examples=len(examples),
        num_tokens=sum(len(example.target) for example in examples),
        unknown_rate=float(np.mean(tokens == imported.tokenizer.unk_id)),
        loss=heldout["loss"],
    )


def _read_text(path: Path, dropped: Counter[str]) -> tuple[Kind, Iterable[Document]]:
    """Pairs if the file holds any, else documents, of which those that cannot be used are counted."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith((".jsonl", ".tsv")):
        only_pairs = name.endswith(".tsv")
        pairs = read_pairs(check_pair_paths([path]), dropped if only_pairs else Counter())
        first = list(itertools.islice(pairs, 1))
        if first or only_pairs:
            return "pairs", itertools.chain(first, pairs)
    return "pretrain", read_documents([path], dropped)


def _describe_numerics(imported: Imported) -> str:
    model = imported.model
    details = [
        model.feed_forward_proj,
        "tied head" if model.tie_word_embeddings else "own head",
        *(["logits × d_model^-0.5"] if model.scale_decoder_outputs else []),
        *(["relative bias in cross-attention"] if model.cross_attention_bias else []),
    ]
    return f"{model.numerics} ({', '.join(details)})"
