"""The encoder-decoder: layers, attention, T5 and its FLOPs."""
