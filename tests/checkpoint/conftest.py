"""Small checkpoints: a few arrays on eight devices, and what belongs to them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from t5pegasus.checkpoint import CheckpointInfo, save_checkpoint
from t5pegasus.config import RunConfig
from t5pegasus.presets import tiny

SHAPES = {
    "parameters.table": (48, 8), "parameters.layers": (3, 8, 16), "parameters.gain": (16,), "first_moment.gain": (16,),
    "step": (),
}  # fmt: skip
SPECS = {3: ("data", "fsdp", "tensor"), 2: ("fsdp", "tensor"), 1: ("tensor",), 0: ()}
INFO = CheckpointInfo(RunConfig(model=tiny().model), 0, 0, "float32", "f" * 64)


def draw_arrays(seed: int) -> dict[str, np.ndarray]:
    """Of these names and shapes, other values for every seed."""
    random = np.random.default_rng(seed)
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return arrays | {"step": np.asarray(seed, np.int32)}


def make_shardings(sizes: tuple[int, int, int]) -> dict[str, jax.sharding.NamedSharding]:
    """Each array's, on a mesh of these sizes of the first devices; layers and sizes 1 are never split."""
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), devices=devices)

    def spec(shape: tuple[int, ...]) -> jax.P:
        axes = SPECS[len(shape)]
        return jax.P(*(None if axis == "data" else axis for axis in axes))

    return {name: jax.sharding.NamedSharding(mesh, spec(shape)) for name, shape in SHAPES.items()}


def place(arrays: dict[str, np.ndarray], sizes: tuple[int, int, int]) -> dict[str, jax.Array]:
    """The arrays on a mesh of these sizes."""
    shardings = make_shardings(sizes)
    return {name: jax.device_put(array, shardings[name]) for name, array in arrays.items()}


def info_of(step: int) -> CheckpointInfo:
    """What a checkpoint of this step is."""
    return dataclasses.replace(INFO, step=step, rows=8 * step)


def write_tokenizer(run_path: Path) -> Path:
    """A folder that stands for a tokenizer."""
    (run_path / "tokenizer").mkdir(parents=True, exist_ok=True)
    (run_path / "tokenizer" / "vocab.txt").write_text("一\n二\n", encoding="utf-8")
    return run_path / "tokenizer"


def save_step(run_path: Path, step: int) -> Path:
    """Save a checkpoint of NumPy arrays, and wait for it."""
    path = run_path / "checkpoints" / str(step)
    save_checkpoint(path, draw_arrays(step), info_of(step), write_tokenizer(run_path))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
