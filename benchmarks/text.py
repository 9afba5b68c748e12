"""Speed of tokenizers and pseudo-summaries beside their peers, and the memory of training a tokenizer.

Encoding: ours with an empty and a filled word cache, beside bert4keras' way (jieba and word pieces in Python, no
cache) and Hugging Face's tokenizers (Rust, BERT's rules). Pseudo-summaries: ours beside the original loop, which takes
every candidate at every step, with the LCS of pylcs as T5-PEGASUS does, and with the faster one that ours has. The ids
and summaries that are compared must be equal. Times are CPU seconds of one process, the best of several rounds, so
that other work on the machine counts little.

    pip install -e '.[dev,peers]' pylcs
    python benchmarks/text.py --data-path ../shared/data
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

os.environ["RAYON_NUM_THREADS"] = "1"

VOCABULARY, BERT_VOCABULARY = "t5_pegasus_vocab_50000.txt", "bert_google_zh_vocab_21128.txt"
SENTENCEPIECE = "uer_cluecorpussmall_spm.model"
SLOW_SHARE = 16
"""The slow peers get this part of the text."""


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, default=Path("../shared/data"))
    parser.add_argument("--num-documents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["encode", "pseudo", "training"])
    parser.add_argument("--train", nargs=2, metavar=("FILE", "KIND"), help="measure one training and end")
    args = parser.parse_args()
    if args.train:
        measure_training(Path(args.train[0]), args.train[1])
        return
    texts = read_texts(args.data_path / "pretrain_zh_small.jsonl.gz", args.num_documents)
    print(
        f"{len(texts):,} documents, {size(texts) / 1e6:.1f} MB; best of {args.rounds} rounds, CPU seconds of one core"
    )
    if "encode" in args.parts:
        compare_encoding(texts, args.data_path / "vocab", args.rounds)
    if "pseudo" in args.parts:
        compare_pseudo_summaries(texts, args.rounds)
    if "training" in args.parts:
        for kind in ("wordpiece", "sentencepiece"):
            for name in ("pretrain_zh_small.jsonl.gz", "pretrain_zh.jsonl.zst"):
                subprocess.run([sys.executable, __file__, "--train", args.data_path / name, kind], check=True)


def read_texts(path: Path, number: int) -> list[str]:
    from t5pegasus.text.clean import clean_documents
    from t5pegasus.text.read import read_documents

    return [document.text for document in islice(clean_documents(read_documents([path]), Counter()), number)]


def size(texts: list[str]) -> int:
    return sum(len(text.encode("utf-8")) for text in texts)


def measure(work: Callable[[], Any], texts: list[str], rounds: int) -> float:
    """MB of UTF-8 per CPU second, best of several rounds."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return size(texts) / 1e6 / min(seconds)


def compare_encoding(texts: list[str], folder: Path, rounds: int) -> None:
    from tokenizers import BertWordPieceTokenizer

    from t5pegasus.text.tokenizer import adopt_vocabulary

    few = texts[:: SLOW_SHARE * 4]
    reference = PythonTokenizer(folder / VOCABULARY)
    warm = adopt_vocabulary(folder / VOCABULARY)
    assert [warm.encode(text) for text in few] == [reference.encode(text) for text in few]
    slow = measure(lambda: [reference.encode(text) for text in few], few, min(rounds, 3))
    cold = measure(lambda: list(map(adopt_vocabulary(folder / VOCABULARY).encode, texts)), texts, rounds)
    fast = measure(lambda: list(map(warm.encode, texts)), texts, rounds)
    print(f"wordpiece, 50,000 entries: ours {fast:.1f} MB/s (word cache empty at first: {cold:.1f})")
    print(f"  jieba and word pieces in Python: {slow:.2f} MB/s, same ids; ratio {fast / slow:.0f}")

    ours = adopt_vocabulary(folder / BERT_VOCABULARY, dictionary=False)
    hugging_face = BertWordPieceTokenizer(str(folder / BERT_VOCABULARY), lowercase=True)

    def encode_in_rust(part: list[str]) -> list[list[int]]:
        return [hugging_face.encode(text, add_special_tokens=False).ids for text in part]

    same = sum(ours.encode(text) == ids for text, ids in zip(texts, encode_in_rust(texts), strict=True))
    fast = measure(lambda: list(map(ours.encode, texts)), texts, rounds)
    slow = measure(lambda: encode_in_rust(texts), texts, rounds)
    print(f"bert, 21,128 entries: ours {fast:.1f} MB/s")
    print(
        f"  Hugging Face tokenizers: {slow:.1f} MB/s, same ids in {same:,} of {len(texts):,} documents; "
        f"ratio {fast / slow:.1f}"
    )
    model = adopt_vocabulary(folder / SENTENCEPIECE)
    print(f"sentencepiece, 100,000 entries: {measure(lambda: list(map(model.encode, texts)), texts, rounds):.1f} MB/s")


class PythonTokenizer:
    """What bert4keras does with a text, in its order, without a cache of words."""

    def __init__(self, path: Path) -> None:
        import jieba

        from t5pegasus.text.tokenizer.wordpiece import read_vocabulary

        jieba.initialize()
        self._cut = jieba.cut
        self._ids = {token: index for index, token in enumerate(read_vocabulary(path))}

    def encode(self, text: str) -> list[int]:
        """Ids of a text without specials."""
        from t5pegasus.text.tokenizer.wordpiece import normalise, split_basic, split_wordpieces

        tokens: list[str] = []
        for word in self._cut(normalise(text), HMM=False):
            if word in self._ids:
                tokens.append(word)
            else:
                tokens += [piece for part in split_basic(word) for piece in split_wordpieces(part, self._ids)]
        return [self._ids.get(token, self._ids["[UNK]"]) for token in tokens]


def compare_pseudo_summaries(texts: list[str], rounds: int) -> None:
    import pylcs
    from rapidfuzz.distance import LCSseq

    from t5pegasus.text.pseudo_summary import make_pseudo_summaries, make_pseudo_summary
    from t5pegasus.text.sentences import chunk_sentences, split_sentences

    few = texts[:: SLOW_SHARE * 4]
    chunks = [chunk for text in few for chunk in chunk_sentences(split_sentences(text))]
    fast = measure(lambda: [list(make_pseudo_summaries(text)) for text in texts], texts, min(rounds, 3))
    print(f"pseudo-summaries: ours {fast:.1f} MB/s")
    ours = measure(lambda: [make_pseudo_summary(chunk) for chunk in chunks], few, rounds)
    for name, lcs in (("pylcs", pylcs.lcs_sequence_length), ("rapidfuzz", LCSseq.similarity)):
        assert all(select_by_every_score(chunk, lcs) == set(selection(chunk)) for chunk in chunks)
        slow = measure(lambda lcs=lcs: [select_by_every_score(chunk, lcs) for chunk in chunks], few, min(rounds, 3))
        print(f"  every score of every step, LCS of {name}: {slow:.2f} MB/s, same sentences; ratio {ours / slow:.0f}")


def selection(chunk: list[str]) -> list[int]:
    from t5pegasus.text.pseudo_summary import select_gap_sentences

    return select_gap_sentences(chunk)


def select_by_every_score(sentences: list[str], lcs: Callable[[str, str], int]) -> set[int]:
    remaining, selected = list(range(len(sentences))), set()

    def join(indices: Any) -> str:
        return "".join(sentences[index] for index in sorted(indices))

    while True:
        scores = [lcs(join(set(remaining) - {index}), join(selected | {index})) for index in remaining]
        selected.add(remaining.pop(scores.index(max(scores))))
        rest = len(join(remaining))
        if len(remaining) == 1 or rest == 0 or len(join(selected)) / rest > 0.25:
            return selected


def measure_training(path: Path, kind: str) -> None:
    """One `tokenizer train` in this process: seconds and peak memory."""
    from launch.verbs import tokenizer

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--input", str(path), "--output-path", f"{folder}/tokenizer", "--kind", kind]
        tokenizer.main(["train", *arguments, "--vocab-size", "50000"])
    after = resource.getrusage(resource.RUSAGE_SELF)
    print(
        f"{kind} on {path.name}: peak {after.ru_maxrss / 1024:,.0f} MiB (before: {before / 1024:,.0f} MiB), "
        f"{time.perf_counter() - began:.0f} s, {after.ru_utime + after.ru_stime:.0f} CPU seconds",
        flush=True,
    )


if __name__ == "__main__":
    main()
