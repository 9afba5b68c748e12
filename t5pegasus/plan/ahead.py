"""The real train step compiled for devices that are not here; compiled once, then kept in the user's cache."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from t5pegasus.config import RunConfig
from t5pegasus.storage import write_bytes
from t5pegasus.train.estimate import abstract_batch, abstract_state
from t5pegasus.train.on_mesh import compiler_options
from t5pegasus.train.step import make_train_step

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled step, or the compiler's word that it needs more memory than a device has. Bytes are per device."""

    text: str
    """Optimised HLO; empty where it does not fit."""
    fits: bool
    argument_bytes: int = 0
    temporary_bytes: int = 0
    """With what is neither argument nor donated: the metrics."""
    code_bytes: int = 0
    used_bytes: int = 0
    """What the compiler wanted, where it does not fit."""
    limit_bytes: int | None = None
    """What the compiler may use of a device, where it says so."""
    compile_seconds: float = 0.0
    """Of the compilation itself, also where this program comes from the cache."""


def compile_ahead(config: RunConfig, mesh: Mesh, target: str) -> Program:
    """Compile the update of a run for the devices of a mesh, wherever they are.

    Args:
        config: with a `compute_dtype` that is not auto, which means this machine's.
        mesh: of real or of described devices.
        target: the topology's name, for the cache.

    Raises:
        UsageError: if sizes do not divide over the mesh.
    """
    step = make_train_step(config, mesh)
    with jax.set_mesh(mesh):
        lowered = step.jitted.lower(abstract_state(config, mesh), abstract_batch(config, mesh))
    path = _cache_path(os.environ, lowered.as_text(), target, mesh)
    if path.exists():
        return _load(path)
    logger.info("compiling the step for %s, %s: minutes for large models", target, _describe(config, mesh))
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        program = _refusal(error, time.perf_counter() - began)
    else:
        memory = compiled.memory_analysis()
        program = Program(
            text=compiled.as_text() or "",
            fits=True,
            argument_bytes=memory.argument_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
            compile_seconds=time.perf_counter() - began,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, gzip.compress(json.dumps(dataclasses.asdict(program)).encode(), mtime=0))
    except OSError as error:  # the plan is there, and took minutes
        logger.warning("%s: the compiled step cannot be kept (%s); the next plan compiles it again", path, error)
    return program


def _describe(config: RunConfig, mesh: Mesh) -> str:
    sizes = " ".join(f"{name}={size}" for name, size in mesh.shape.items())
    train = config.train
    return f"{sizes}, batch {train.batch_size} in {train.accumulation_steps}, remat {train.remat}"


def _refusal(error: Exception, seconds: float) -> Program:
    said = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", str(error))
    if not said:
        raise error
    used, limit = (_count_bytes(*said.group(index, index + 1)) for index in (1, 3))
    return Program("", fits=False, used_bytes=used, limit_bytes=limit, compile_seconds=seconds)


def _count_bytes(number: str, unit: str) -> int:
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))


def _cache_path(environment: Mapping[str, str], lowered: str, target: str, mesh: Mesh) -> Path:
    versions = [f"{name} {_version(name)}" for name in ("jax", "jaxlib", "libtpu")]
    flags = [environment.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    options = str(compiler_options(mesh))
    kept = str([field.name for field in dataclasses.fields(Program)])
    devices = str([device.id for device in mesh.devices.flat])
    key = "\n".join([target, kept, *versions, *flags, options, devices, lowered])
    root = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "t5pegasus" / "plans" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json.gz"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _load(path: Path) -> Program:
    return Program(**json.loads(gzip.decompress(path.read_bytes())))
