"""Model sizes by name. Parameter counts at 50,000 tokens are the names' exact meaning (and a test)."""

import difflib
from collections.abc import Callable

from t5pegasus.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from t5pegasus.errors import UsageError


def tiny() -> RunConfig:
    """A model for laptops and tests: d_model 64, 2+2 layers; trains on the sample in minutes on a CPU."""
    return RunConfig(
        model=ModelConfig(
            d_model=64, d_kv=8, d_ff=128, num_heads=8, num_encoder_layers=2, num_decoder_layers=2, dropout_rate=0.0
        ),
        data=DataConfig(max_source_tokens=256, max_target_tokens=96),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=50),
        train=TrainConfig(steps=500, batch_size=8, log_every_steps=10, evaluate_every_steps=100, save_every_steps=100),
    )


def small() -> RunConfig:
    """T5 PEGASUS small, 95,262,080 parameters."""
    return RunConfig(
        model=ModelConfig(d_model=512, d_kv=64, d_ff=1024, num_heads=6, num_encoder_layers=8, num_decoder_layers=8)
    )


def base() -> RunConfig:
    """T5 PEGASUS base (mT5-base with a 50,000-token vocabulary), 275,029,248 parameters."""
    return RunConfig(model=ModelConfig())


def large() -> RunConfig:
    """mT5-large's shape, 819,751,936 parameters."""
    return RunConfig(
        model=ModelConfig(d_model=1024, d_ff=2816, num_heads=16, num_encoder_layers=24, num_decoder_layers=24)
    )


def xl() -> RunConfig:
    """mT5-xl's shape, 2,922,960,896 parameters."""
    return RunConfig(
        model=ModelConfig(d_model=2048, d_ff=5120, num_heads=32, num_encoder_layers=24, num_decoder_layers=24)
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"tiny": tiny, "small": small, "base": base, "large": large, "xl": xl}


def preset(name: str) -> RunConfig:
    """The preset of that name.

    Raises:
        UsageError: naming the nearest one, if there is none.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise UsageError(
            f"preset {name!r} does not exist; "
            + (f"perhaps you meant {near[0]!r}" if near else f"choose one of {', '.join(PRESETS)}")
        )
    return PRESETS[name]()
