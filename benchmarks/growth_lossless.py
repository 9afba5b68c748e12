"""What growth costs in loss on held-out text, beside the two usual ways to begin a larger model from a smaller one.

- ours: `growth.grow_state`;
- overlap: the larger model freshly initialised, the smaller one's entries written into the overlapping block (what
  loading a checkpoint with mismatched sizes does where it does anything);
- stack: layers repeated whole (StackBERT; G_stack, Du et al. 2024), depth only, so it has a row of its own.

    python benchmarks/growth_lossless.py runs/small --examples-path examples --to d_model=192,d_ff=512
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from growth.grow import grow_state
from growth.plan import plan_growth
from launch.verbs.grow import choose_target, growing_fields
from t5pegasus.checkpoint import find_checkpoint, load_arrays, load_checkpoint_info
from t5pegasus.config import MeshConfig, ModelConfig, RunConfig
from t5pegasus.data.loader import PackedRows, load_epoch
from t5pegasus.model.t5 import declare_parameters, init_parameters
from t5pegasus.sharding import make_mesh
from t5pegasus.train.state import arrays_to_state
from t5pegasus.train.step import make_heldout_loss


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--examples-path", type=Path, required=True)
    parser.add_argument("--to", required=True)
    args = parser.parse_args()
    path = find_checkpoint(args.checkpoint)
    config = load_checkpoint_info(path).config
    state = arrays_to_state(load_arrays(path))
    target = choose_target(config.model, args.to, dict.fromkeys(growing_fields()))
    deeper = dataclasses.replace(
        config.model,
        num_encoder_layers=2 * config.model.num_encoder_layers,
        num_decoder_layers=2 * config.model.num_decoder_layers,
    )

    def grow(model: ModelConfig) -> dict:
        return grow_state(state, declare_parameters(config.model), plan_growth(config.model, model, seed=0)).parameters

    source_nll = held_out(config, config.model, state.parameters, args.examples_path)
    print(f"source: {source_nll:.6f} nats per target token")
    for label, model, peer_name, peer in (
        (args.to, target, "overlap", overlap(target, state.parameters)),
        ("twice the layers", deeper, "stack", stack(state.parameters)),
    ):
        ours = held_out(config, model, grow(model), args.examples_path) - source_nll
        theirs = held_out(config, model, peer, args.examples_path) - source_nll
        resolution = float(np.finfo(np.float32).eps) * source_nll  # float32 sums cannot tell smaller differences
        ratio = f"ratio {'at least ' if abs(ours) < resolution else ''}{abs(theirs) / max(abs(ours), resolution):.0e}"
        print(f"{label}\n  ours {ours:+.1e}, {peer_name} {theirs:+.3f} nats per target token: {ratio}")


def held_out(config: RunConfig, model: ModelConfig, parameters: dict, examples_path: Path) -> float:
    """Mean loss on the held-out examples, float32, one device."""
    run = dataclasses.replace(config, model=model)
    loss = make_heldout_loss(run, make_mesh(MeshConfig(data=1), jax.devices()[:1]))
    with PackedRows(examples_path / "heldout", run.data, model.pad_token_id, model.decoder_start_token_id) as rows:
        return loss(parameters, load_epoch(rows, 8))["loss"]


def overlap(model: ModelConfig, source: dict) -> dict:
    """A fresh model with the source's entries in the overlapping block of every array."""
    parameters = {name: np.array(value) for name, value in jax.jit(lambda: init_parameters(model, 0))().items()}
    for name, array in parameters.items():
        array[tuple(slice(size) for size in source[name].shape)] = source[name]
    return parameters


def stack(source: dict) -> dict:
    """Every layer twice, the whole stack behind itself."""
    return {name: np.concatenate([array, array]) if ".layers." in name else array for name, array in source.items()}


if __name__ == "__main__":
    main()
