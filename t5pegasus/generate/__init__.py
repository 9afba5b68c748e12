"""Writing text with a trained model: greedy, sampling and beam search with a key-value cache, and summaries."""
