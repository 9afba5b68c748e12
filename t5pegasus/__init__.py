"""Pretrain Chinese T5/PEGASUS in JAX, and grow a trained checkpoint into a larger one without changing what it computes."""  # noqa: E501 - one sentence, shown as it is

__version__ = "0.1.0"
