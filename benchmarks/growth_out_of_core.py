"""Growth of a checkpoint of 3 GiB on disk beside `cp`, and beside the way that loads everything.

    python benchmarks/growth_out_of_core.py --folder /disk/with/40/GiB

Each round takes, one after another, each with what it reads in the page cache and a disk with nothing left to write:
`cp` of the bytes that growth writes followed by fsync of every file and folder; and growth, checksums, statistics and
flushing included, without the receipt, which is measured apart; in the last round also loading, growing in memory and
saving. Growth and loading run as processes of their own, whose largest resident memory the kernel tells. Then growth
runs under limits of memory, and is killed at random moments, after which the result must have the same bytes.
"""

import argparse
import dataclasses
import json
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MIB = 2**20
SOURCE = {"d_model": 512, "d_ff": 1024, "num_heads": 6, "d_kv": 64}  # mT5-small, whose vocabulary makes large arrays
TARGET = {"d_model": 1024, "d_ff": 2048, "num_heads": 12}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty or absent; emptied at the end")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--vocab-size", type=int, default=250112, help="of the source; mT5's makes it 3.4 GiB")
    parser.add_argument("--layers", type=int, default=8, help="of each of the source's stacks")
    parser.add_argument("--limits", type=int, nargs="*", default=[1200], help="MiB of address space to try")
    parser.add_argument("--without-load", action="store_true", help="leave out the way that needs all memory")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(*arguments.part)
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    try:
        run(arguments)
    finally:
        shutil.rmtree(arguments.folder)


def run(arguments: argparse.Namespace) -> None:
    source, grown, other = (arguments.folder / name for name in ("source", "grown", "other"))
    write_source(source, arguments.vocab_size, arguments.layers)
    cp_seconds, grow_seconds, load_seconds, peaks, load_peaks = [], [], [], [], []
    for each in range(arguments.rounds + 1):  # the first warms up
        shutil.rmtree(grown, ignore_errors=True)
        settle(source)
        took, report = start_part("grow", source, grown)
        written = folder_bytes(grown)
        wanted = json.loads((grown / "manifest.json").read_text(encoding="utf-8"))
        settle(grown)
        copied = copy(grown, other)
        shutil.rmtree(other)
        print(
            f"round {each}: growth {took:.2f} s ({report['parts']}), peak {report['peak_bytes'] / MIB:.0f} MiB; cp and "
            f"fsync {copied:.2f} s; ratio {took / copied:.2f}",
            flush=True,
        )
        if each:
            grow_seconds.append(took)
            cp_seconds.append(copied)
            peaks.append(report["peak_bytes"])
        if each == arguments.rounds and not arguments.without_load:
            settle(source)
            took, report = start_part("load", source, other)
            shutil.rmtree(other)
            load_seconds.append(took)
            load_peaks.append(report["peak_bytes"])
            print(f"         loading all {took:.2f} s, peak {report['peak_bytes'] / MIB:.0f} MiB", flush=True)
    read = folder_bytes(source)
    print(f"source {read / MIB:.0f} MiB, grown {written / MIB:.0f} MiB ({written / read:.2f} ×)")
    summarize("cp + fsync", cp_seconds, written)
    summarize("growth", grow_seconds, written, peaks)
    if load_seconds:
        summarize("load, grow, save", load_seconds, written, load_peaks)
    ratio = statistics.median(a / b for a, b in zip(grow_seconds, cp_seconds))
    print(f"growth / cp, median of {arguments.rounds} rounds: {ratio:.2f}")
    pair = largest_pair(source, grown)
    for limit in arguments.limits:
        shutil.rmtree(grown)
        took, report = start_part("grow", source, grown, limit * MIB)
        same = json.loads((grown / "manifest.json").read_text(encoding="utf-8")) == wanted
        print(
            f"ulimit -v {limit} MiB (largest array with its source: {pair / MIB:.0f} MiB): "
            f"{took:.2f} s, same bytes: {same}"
        )
    kill_and_compare(source, grown, wanted, arguments.kills, statistics.median(grow_seconds))


def run_part(part: str, source_name: str, output_name: str) -> None:
    """What runs as a process of its own; its report is one line of JSON."""
    from growth.execution import execute_growth
    from growth.t5 import plan_growth
    from t5pegasus.checkpoint import (
        load_arrays,
        load_checkpoint_info,
        save_checkpoint,
        verify_checkpoint,
    )
    from t5pegasus.train.state import arrays_to_state, state_to_arrays

    source, output = Path(source_name), Path(output_name)
    begin = time.monotonic()
    manifest = verify_checkpoint(source)
    verified = time.monotonic()
    info = load_checkpoint_info(source)
    growth = plan_growth(info.config.model, dataclasses.replace(info.config.model, **TARGET), step=info.step)
    info = dataclasses.replace(info, config=dataclasses.replace(info.config, model=growth.target))
    parts = {"verify": verified - begin}
    if part == "grow":
        identity = {"plan_hash": growth.hash, "source_fingerprint": manifest["fingerprint"]}
        execute_growth(source, growth, output, info, identity)
    else:
        from growth.grow import grow_state

        arrays = state_to_arrays(grow_state(arrays_to_state(load_arrays(source)), growth))
        save_checkpoint(output, arrays, info, source / "tokenizer")
    parts["rest"] = time.monotonic() - verified
    usage = resource.getrusage(resource.RUSAGE_SELF)
    parts["processor"] = usage.ru_utime + usage.ru_stime
    print(
        json.dumps(
            {
                "peak_bytes": usage.ru_maxrss * 1024,
                "parts": ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items()),
            }
        )
    )


def start_part(part: str, source: Path, output: Path, address_space: int = 0) -> tuple[float, dict]:
    """Wall seconds of a part's whole process, and its report."""
    limited = ["sh", "-c", f'ulimit -v {address_space // 1024}; exec "$@"', "sh"] if address_space else []
    begin = time.monotonic()
    done = subprocess.run([*limited, *command(part, source, output)], check=False, capture_output=True, text=True)
    seconds = time.monotonic() - begin
    if done.returncode:
        raise RuntimeError(f"{part} failed:\n{done.stderr[-4000:]}")
    return seconds, json.loads(done.stdout.splitlines()[-1])


def command(part: str, source: Path, output: Path) -> list[str]:
    return [sys.executable, __file__, "--folder", str(output.parent), "--part", part, str(source), str(output)]


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp -r` with fsync of all that it wrote."""
    begin = time.monotonic()
    subprocess.run(["cp", "-r", source, target], check=True)
    paths = [str(path) for path in target.rglob("*")] + [str(target)]
    for first in range(0, len(paths), 500):
        subprocess.run(["sync", *paths[first : first + 500]], check=True)
    return time.monotonic() - begin


def settle(folder: Path) -> None:
    """Read a folder, so that it is in the page cache, and wait for the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(4 * MIB):
                    pass
    subprocess.run(["sync"], check=True)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def summarize(what: str, seconds: list[float], written: int, peaks: list[int] | None = None) -> None:
    middle = statistics.median(seconds)
    peak = f", peak resident {max(peaks) / MIB:.0f} MiB" if peaks else ""
    spread = f"{min(seconds):.2f}-{max(seconds):.2f}"
    print(f"{what}: median {middle:.2f} s ({spread}), {written / middle / 1e6:.0f} MB/s{peak}")


def largest_pair(source: Path, grown: Path) -> int:
    from t5pegasus.arrays import open_arrays

    def size(array) -> int:
        return array.dtype.itemsize * int(np.prod(array.shape))

    old, new = open_arrays(source), open_arrays(grown)
    return max(size(old[name]) + size(new[name]) for name in old)


def kill_and_compare(source: Path, grown: Path, wanted: dict, kills: int, seconds: float) -> None:
    """Kill growth again and again at random moments until it ends by itself, or was killed so many times."""
    from t5pegasus.checkpoint import verify_checkpoint

    draw = random.Random(0)
    done = 0
    while done < kills:
        shutil.rmtree(grown, ignore_errors=True)
        rounds = draw.randint(1, 4)
        for _ in range(min(rounds, kills - done)):
            process = subprocess.Popen(command("grow", source, grown), stdout=subprocess.DEVNULL)
            time.sleep(draw.uniform(0.1, 1.0) * seconds / rounds)
            process.send_signal(signal.SIGKILL)
            process.wait()
            done += 1
            if grown.exists():
                break
        if not grown.exists():
            start_part("grow", source, grown)
        if json.loads((grown / "manifest.json").read_text(encoding="utf-8")) != wanted:
            raise AssertionError("another manifest after a kill")
        left = [path.name for path in grown.parent.iterdir()]
        if sorted(left) != ["grown", "source"]:
            raise AssertionError(f"left over: {left}")
    verify_checkpoint(grown)
    print(f"killed {done} times at random moments: the manifest and all files as without a kill")


def write_source(path: Path, vocab_size: int, layers: int) -> None:
    """A checkpoint of weights and both moments, of random numbers, written the same way."""
    from growth.expand import draw
    from growth.journal import Journal, begin_growth, checkpoint_folder
    from growth.stream import KnownArray, write_leaves
    from t5pegasus.checkpoint import CheckpointInfo, commit_checkpoint
    from t5pegasus.config import ModelConfig, RunConfig
    from t5pegasus.model.t5 import declare_parameters
    from t5pegasus.train.optimizer import init_multipliers

    @dataclasses.dataclass
    class RandomArray:
        shape: tuple[int, ...]
        key: int
        scale: float
        positive: bool
        dtype = np.dtype(np.float32)
        reads_source = False

        def source_slices(self, target):
            return ()

        def compute(self, block, target):
            numbers = draw((self.key, 0), [np.arange(part.start, part.stop) for part in target])
            return np.float32(self.scale) * (np.abs(numbers) if self.positive else numbers)

    model = ModelConfig(**SOURCE, vocab_size=vocab_size, num_encoder_layers=layers, num_decoder_layers=layers)
    specs = declare_parameters(model)
    leaves = {"step": KnownArray(np.asarray(1000, np.int32)), "rows": KnownArray(np.asarray(8000, np.uint32))}
    for place, (name, spec) in enumerate(specs.items()):
        leaves[f"parameters.{name}"] = RandomArray(spec.shape, place, 1.0 if spec.gain else spec.init_std, spec.gain)
        leaves[f"first_moment.{name}"] = RandomArray(spec.shape, 1000 + place, 1e-4, False)
        leaves[f"second_moment.{name}"] = RandomArray(spec.shape, 2000 + place, 1e-8, True)
    for axis, record in init_multipliers(specs).items():
        for field, array in record._asdict().items():
            leaves[f"multipliers.{axis}.{field}"] = KnownArray(np.asarray(array))
    unfinished = path.with_name("source.unfinished")
    begin_growth(unfinished, {})
    with Journal(unfinished) as journal:
        write_leaves(checkpoint_folder(unfinished), {}, leaves, journal)
    tokenizer = path.parent / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("的\n", encoding="utf-8")
    info = CheckpointInfo(RunConfig(model=model), 1000, 8000, "float32", "f" * 64)
    commit_checkpoint(checkpoint_folder(unfinished), path, info, tokenizer, known=journal.read())
    shutil.rmtree(unfinished)
    shutil.rmtree(tokenizer)


if __name__ == "__main__":
    main()
