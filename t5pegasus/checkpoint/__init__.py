"""Checkpoints: arrays by dotted name, what they are, and a manifest whose presence alone commits them.

A checkpoint folder holds `arrays/` (zarr3, one folder per array), `checkpoint.json`, a copy of the `tokenizer/`,
whatever its writer adds, and, written last, `manifest.json` with the size and SHA-256 of every file. What holds when
processes are killed, disks fill up and files are damaged: docs/checkpoints.md.
"""

from t5pegasus.arrays import list_arrays, load_arrays
from t5pegasus.checkpoint.find import find_best, find_checkpoint, find_last_good
from t5pegasus.checkpoint.folder import (
    commit_checkpoint,
    finish_saves,
    has_ema,
    has_optimizer_state,
    list_checkpoints,
    synchronise,
    verify_checkpoint,
    verify_structure,
)
from t5pegasus.checkpoint.info import CheckpointInfo, best_steps, load_checkpoint_info
from t5pegasus.checkpoint.load import find_together, load_matching, load_parameters, load_together, verify_together
from t5pegasus.checkpoint.retention import Retention, remove_old_checkpoints
from t5pegasus.checkpoint.save import save_arrays, save_checkpoint
from t5pegasus.checkpoint.writer import CheckpointWriter, Stall
from t5pegasus.manifest import MANIFEST, DamagedError

__all__ = [
    "MANIFEST",
    "CheckpointInfo",
    "CheckpointWriter",
    "DamagedError",
    "Retention",
    "Stall",
    "best_steps",
    "commit_checkpoint",
    "find_best",
    "find_checkpoint",
    "find_last_good",
    "find_together",
    "finish_saves",
    "has_ema",
    "has_optimizer_state",
    "list_arrays",
    "list_checkpoints",
    "load_arrays",
    "load_checkpoint_info",
    "load_matching",
    "load_parameters",
    "load_together",
    "remove_old_checkpoints",
    "save_arrays",
    "save_checkpoint",
    "synchronise",
    "verify_checkpoint",
    "verify_structure",
    "verify_together",
]
