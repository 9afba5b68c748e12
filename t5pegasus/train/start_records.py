"""The first records of a run that begins or continues: what it is made of, and what it went back behind."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from t5pegasus.config import RunConfig
from t5pegasus.model.t5 import count_parameters
from t5pegasus.train.compute_dtype import resolve_compute_dtype
from t5pegasus.train.course import Course
from t5pegasus.train.estimate import MemoryEstimate
from t5pegasus.train.metrics import MetricsWriter, describe_hardware
from t5pegasus.train.origin import Origin
from t5pegasus.train.phases import plan_hashes
from t5pegasus.train.run_folder import RunPaths
from t5pegasus.train.wandb_log import WandbLog

logger = logging.getLogger(__name__)


def open_metrics(folder: Path, paths: RunPaths, origin: Origin) -> MetricsWriter:
    """The records of a run in a local folder, from those that its checkpoint knows of on."""
    return MetricsWriter(
        folder,
        origin.step if origin.resumed else -1,
        plan_hashes(origin.lineage),
        rollbacks=origin.course.rollbacks,
        wandb=_open_wandb(folder, paths, origin.config),
    )


def _open_wandb(folder: Path, paths: RunPaths, config: RunConfig) -> WandbLog | None:
    project = config.train.wandb_project
    if not project or jax.process_index() != 0:
        return None
    return WandbLog(project, paths.run_path, folder, config.to_json())


def go_back(origin: Origin, rollbacks: Sequence[dict[str, Any]]) -> tuple[Course, int]:
    """The course, and the row to go on from, behind those that the checkpoint does not know of."""
    if not rollbacks:
        return origin.course, origin.rows
    return origin.course._replace(rollbacks=rollbacks[-1]["rollback"], skips=0), rollbacks[-1]["rows"][1]


def write_rollbacks(metrics: MetricsWriter, rollbacks: Sequence[dict[str, Any]], origin: Origin) -> None:
    """Those that the checkpoint does not know of: the run goes on from it, behind the rows of the bad updates."""
    first = origin.rows
    for record in rollbacks:
        skipped = [first, record["rows"][1]]
        metrics.write("divergence", origin.step, action="rollback", **record, skipped_rows=skipped)
        logger.warning(
            "update %d: %s (loss=%s, grad_norm=%s); back to step %d, on from row %d: rows %d to %d are skipped",
            record["at_step"], record["why"], record["loss"], record["grad_norm"], origin.step, skipped[1], first,
            skipped[1] - 1,
        )  # fmt: skip
        first = skipped[1]


def write_start(
    metrics: MetricsWriter, paths: RunPaths, config: RunConfig, step: int, mesh: Mesh, memory: MemoryEstimate
) -> None:
    """What the run is made of, and on what it goes on."""
    (peak, peak_source), hardware = metrics.peak, describe_hardware(jax.local_devices()[0])
    metrics.write(
        "start", step, config=config.to_json(), num_parameters=count_parameters(config.model), mesh=dict(mesh.shape),
        num_devices=jax.device_count(), device=jax.devices()[0].device_kind, peak_flops_per_device=peak,
        peak_source=peak_source, hardware=hardware, compute_dtype=str(resolve_compute_dtype(config)),
        **dataclasses.asdict(memory), **paths.to_json(),
    )  # fmt: skip
