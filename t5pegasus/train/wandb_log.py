"""Weights & Biases beside the run's own files: the same numbers, if its package is there and a project is named."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5pegasus.errors import UsageError


class WandbLog:
    """A run of Weights & Biases that attempts at the same run folder continue; WANDB_MODE=offline works, too."""

    def __init__(self, project: str, run_path: Path, folder: Path, config: Mapping[str, Any]):
        """Begin or continue it.

        Args:
            project: its project.
            run_path: of our run; name and identity follow from it.
            folder: a local one, where its files go.
            config: what our run is made of.

        Raises:
            UsageError: if the package is not installed.
        """
        try:
            import wandb  # pyright: ignore[reportMissingImports] - of the extra `wandb`
        except ImportError as error:
            raise UsageError(
                f"train.wandb_project={project!r} needs the package wandb: pip install 't5pegasus[wandb]'; or leave "
                "the flag out, the run's metrics.jsonl and tensorboard/ have the same numbers"
            ) from error
        identity = hashlib.blake2b(str(run_path.absolute()).encode(), digest_size=8).hexdigest()
        self._run = wandb.init(project=project, dir=str(folder), id=identity, name=run_path.name, resume="allow")
        self._run.config.update(dict(config), allow_val_change=True)
        self._run.define_metric("*", step_metric="step")  # steps come twice where a run went back

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write numbers by tag."""
        self._run.log({"step": step, **numbers})

    def close(self) -> None:
        """Hand everything over."""
        self._run.finish()
