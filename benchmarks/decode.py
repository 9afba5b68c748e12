"""Tokens per second of beam search, beside transformers' `generate` and CTranslate2, on the same weights and sources.

A T5-PEGASUS-small of random weights (95 M parameters, 50,000 tokens), sources of 256 tokens, and exactly 64 tokens
written for each: the end token is forbidden, so that all do the same work. Before anything is timed our token ids are
compared with transformers', which must be equal (exit status 1 if not), and CTranslate2's agreement is printed. Then
all take turns, round by round, in one process with the same number of threads; a round's tokens are those of the best
hypothesis of every source, and what is reported are the best and the median round, encoder included, compilation not.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/decode.py

Needs torch, transformers and ctranslate2. The cores have to be idle otherwise: each of the four suffers in its own way
from losing one.
"""

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

THREADS = 2
# Before jax and torch are imported, which size their pools by it; a spinning OpenMP thread would hold a core of others.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ctranslate2  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from ctranslate2.converters.transformers import MT5Loader  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from t5pegasus.config import ModelConfig, write_json  # noqa: E402
from t5pegasus.convert.hf_config import model_to_hf_config  # noqa: E402
from t5pegasus.convert.hf_tensors import parameters_to_hf  # noqa: E402
from t5pegasus.generate.options import GenerationOptions  # noqa: E402
from t5pegasus.generate.search import generate  # noqa: E402
from t5pegasus.model.t5 import init_parameters  # noqa: E402
from t5pegasus.presets import preset  # noqa: E402

Translate = Callable[[], np.ndarray]
"""Writes for all sources and returns the ids of the best hypotheses, int [sources, tokens]."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-beams", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--source-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = preset("small").model
    parameters = {name: np.asarray(value) for name, value in jax.jit(lambda: init_parameters(model, 0))().items()}
    random = np.random.default_rng(0)
    sources = random.integers(200, model.vocab_size, (args.batch_size, args.source_tokens), dtype=np.int32)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        hf = load_transformers(model, parameters, Path(folder))
        converted = Path(folder) / "ctranslate2"
        converted.mkdir()
        convert_to_ctranslate2(hf, converted)
        sides = {
            "ours": prepare_ours(model, parameters, sources, args),
            "transformers": prepare_transformers(hf, sources, args),
            "CTranslate2 float32": prepare_ctranslate2(converted, "float32", sources, args),
            "CTranslate2 int8": prepare_ctranslate2(converted, "int8", sources, args),
        }
        written = {name: translate() for name, translate in sides.items()}
        report_agreement(written)
        if not np.array_equal(written["ours"], written["transformers"]):
            return 1
        report_speed(time_in_turn(sides, args.rounds), args)
    return 0


def load_transformers(model: ModelConfig, parameters: dict, folder: Path) -> torch.nn.Module:
    """Our weights in transformers' model, by way of the files an export writes."""
    save_file(parameters_to_hf(parameters, model), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", model_to_hf_config(model))
    return transformers.MT5ForConditionalGeneration.from_pretrained(folder, local_files_only=True).eval()


def prepare_ours(model: ModelConfig, parameters: dict, sources: np.ndarray, args: argparse.Namespace) -> Translate:
    options = GenerationOptions(
        max_new_tokens=args.new_tokens,
        min_new_tokens=args.new_tokens,
        num_beams=args.num_beams,
        finalisation="huggingface",
    )
    on_device = jax.device_put(parameters)
    rows = np.arange(len(sources), dtype=np.uint32)

    def translate() -> np.ndarray:
        return np.asarray(generate(model, on_device, sources, np.ones_like(sources), rows, options).tokens[:, 0])

    return translate


def prepare_transformers(hf: torch.nn.Module, sources: np.ndarray, args: argparse.Namespace) -> Translate:
    ids = torch.tensor(sources, dtype=torch.long)

    def translate() -> np.ndarray:
        with torch.inference_mode():
            written = hf.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=args.num_beams,
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=False,
            )
        return written[:, 1:].numpy()

    return translate


def convert_to_ctranslate2(hf: torch.nn.Module, folder: Path) -> None:
    """Write CTranslate2's model of these weights, float32."""
    copied = copy.deepcopy(hf)
    # transformers 5 calls every MT5 tied, and the converter then scales the head's input by d_model^-0.5: this one
    # has a head of its own.
    copied.config.tie_word_embeddings = False
    with torch.no_grad():
        spec = MT5Loader()(copied, TokensAreNumbers(copied.config))
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))


def prepare_ctranslate2(folder: Path, compute_type: str, sources: np.ndarray, args: argparse.Namespace) -> Translate:
    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=THREADS
    )
    tokens = [[str(token) for token in source] for source in sources]

    def translate() -> np.ndarray:
        results = translator.translate_batch(
            tokens,
            beam_size=args.num_beams,
            max_decoding_length=args.new_tokens,
            min_decoding_length=args.new_tokens,
        )
        return np.array([[int(token) for token in result.hypotheses[0]] for result in results])

    return translate


class TokensAreNumbers:
    """What CTranslate2's converter asks of a tokenizer, for a vocabulary whose tokens are their ids."""

    def __init__(self, config: transformers.MT5Config):
        self.config = config
        self.pad_token, self.eos_token = str(config.pad_token_id), str(config.eos_token_id)
        self.unk_token = self.pad_token

    def get_vocab(self) -> dict[str, int]:
        """Token → id."""
        return {str(token): token for token in range(self.config.vocab_size)}

    def convert_ids_to_tokens(self, token: int) -> str:
        """Id → token."""
        return str(token)


def report_agreement(written: dict[str, np.ndarray]) -> None:
    ours = written.pop("ours")
    for name, theirs in written.items():
        equal = (ours == theirs).all(axis=1).sum() if ours.shape == theirs.shape else 0
        print(f"same ids as {name}: {equal} of {len(ours)} sources")
    written["ours"] = ours


def time_in_turn(sides: dict[str, Translate], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every round of every side, and of processor time."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, translate in sides.items():
            start, used = time.perf_counter(), time.process_time()
            translate()
            seconds[name].append((time.perf_counter() - start, time.process_time() - used))
    return seconds


def report_speed(rounds_by_side: dict[str, list[tuple[float, float]]], args: argparse.Namespace) -> None:
    tokens = args.batch_size * args.new_tokens
    versions = {"jax": jax, "torch": torch, "transformers": transformers, "ctranslate2": ctranslate2}
    print(", ".join(f"{name} {module.__version__}" for name, module in versions.items()))
    print(
        f"beam {args.num_beams}, batch {args.batch_size}, {args.source_tokens} source tokens, "
        f"{args.new_tokens} written, {THREADS} threads, {args.rounds} rounds in turn"
    )
    print(f"{'':<21}{'best tokens/s':>14}{'median':>8}{'CPU s':>8}   seconds of the rounds")
    best, median = {}, {}
    for name, rounds in rounds_by_side.items():
        walls = [wall for wall, _ in rounds]
        best[name], median[name] = min(walls), statistics.median(walls)
        figures = f"{tokens / best[name]:14.1f}{tokens / median[name]:8.1f}{min(used for _, used in rounds):8.2f}"
        print(f"{name:<21}{figures}   {' '.join(f'{wall:.2f}' for wall in walls)}")
    for name in list(best)[1:]:
        ratios = f"{best[name] / best['ours']:.2f} (best round), {median[name] / median['ours']:.2f} (median)"
        print(f"ours / {name}: {ratios}")


if __name__ == "__main__":
    sys.exit(main())
