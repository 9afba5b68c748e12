"""Which checkpoints of a run stay when a new one is there."""

from pathlib import Path
from typing import NamedTuple

from t5pegasus.checkpoint.folder import (
    PARTS,
    SUPERSEDED,
    UNFINISHED,
    checkpoints_folder,
    list_checkpoints,
    remove_checkpoint,
    remove_superseded,
)
from t5pegasus.storage import remove_tree


class Retention(NamedTuple):
    """What a run keeps."""

    last: int
    """So many, counted back from the newest."""
    every_steps: int = 0
    """And each whose step is a multiple of this, for ever; 0: none."""
    steps: frozenset[int] = frozenset()
    """And these, such as the best one."""

    def keeps_for_ever(self, step: int) -> bool:
        """Whether a checkpoint stays although newer ones are there."""
        return step in self.steps or (self.every_steps > 0 and step % self.every_steps == 0)


def remove_old_checkpoints(run_path: Path, saved: Path, retention: Retention) -> None:
    """Delete checkpoints that a run keeps no longer, and what killed processes left; one process calls it.

    Those of later steps than the one just saved are damaged ones that the run went back behind: they stay, and do not
    count as kept.
    """
    folder = checkpoints_folder(run_path)
    for left in folder.glob(f"*{SUPERSEDED}"):
        remove_superseded(left)
    for ending in (UNFINISHED, PARTS):
        for left in folder.glob(f"*{ending}"):
            remove_tree(left)
    reached = [path for path in list_checkpoints(run_path) if int(path.name) <= int(saved.name)]
    for path in reached[retention.last :]:
        if not retention.keeps_for_ever(int(path.name)):
            remove_checkpoint(path)
