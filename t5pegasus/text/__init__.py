"""Strings: reading, cleaning, sentences, pseudo-summaries, tokenizers. Never imports JAX, so workers start fast."""
