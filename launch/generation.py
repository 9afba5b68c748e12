"""The flags that say how summaries are written, shared by the verbs that write them."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from t5pegasus.generate.summarize import Summarizer


@dataclasses.dataclass(frozen=True)
class GenerationFlags:
    """How summaries are written."""

    num_beams: int = 1
    """Hypotheses of beam search; 1 takes the likeliest token at each step."""
    finalisation: Literal["exact", "huggingface", "huggingface-early", "huggingface-never", "bert4keras"] = "exact"
    """How beam search ends: exact when nothing can become better any more; or as in transformers with early_stopping
    False (huggingface), True (-early) or "never" (-never); or as in bert4keras, when the best hypothesis ends."""
    length_penalty: float = 1.0
    """Scores are Σ log p / length ** length_penalty; in beam search more gives longer summaries."""
    max_new_tokens: int | None = None
    """Tokens of a summary at most, the prefix not counted; as many as the checkpoint was trained on."""
    min_new_tokens: int = 0
    """Tokens of a summary at least, prefix and end token not counted."""
    no_repeat_ngram_size: int = 0
    """No sequence of so many tokens comes twice in a summary; 0 allows all."""
    prefix: str = ""
    """What every summary begins with."""
    temperature: float = 0.0
    """Above 0, tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that have this probability together."""
    seed: int = 0
    """Of the drawing."""
    num_return: int = 1
    """Summaries of a document: the best of num_beams hypotheses, or as many drawn ones."""
    max_source_tokens: int | None = None
    """Tokens of a document that are read, the rest is cut off; as many as the checkpoint was trained on. More is
    possible (T5 has no longest input), but the model has not learned from such."""
    batch_size: int = 16
    """Texts per batch."""

    def load_summarizer(self, checkpoint: Path) -> "Summarizer":
        """The summarizer of a checkpoint folder that has been verified, which writes as the flags say.

        Raises:
            UsageError: if the flags contradict each other.
        """
        from t5pegasus.checkpoint import load_checkpoint_info
        from t5pegasus.generate.options import GenerationOptions
        from t5pegasus.generate.summarize import load_summarizer

        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(GenerationOptions)}
        if self.max_new_tokens is None:
            chosen["max_new_tokens"] = load_checkpoint_info(checkpoint).config.data.max_target_tokens
        return load_summarizer(
            checkpoint,
            GenerationOptions(**chosen),
            max_source_tokens=self.max_source_tokens,
            batch_size=self.batch_size,
            prefix=self.prefix,
        )


Generation = Annotated[GenerationFlags, tyro.conf.arg(name="")]
"""The type of a verb's field whose flags have no prefix."""
