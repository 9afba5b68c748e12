"""Folders of random examples, as a build leaves them."""

import numpy as np

from t5pegasus.data.records import Example, pack_record, token_dtype
from t5pegasus.data.shard_files import save_array, shard_name, write_manifest, write_shard

PAD, START, END = 0, 101, 102


def write_examples(folder, examples, num_shards=3, vocab_size=30_000, tokenizer="f", corruption=None):
    """A folder of examples as `build` leaves it, but for the tokenizer."""
    folder.mkdir(parents=True)
    dtype = token_dtype(vocab_size)
    parts = np.array_split(np.arange(len(examples)), num_shards)
    shards = [
        write_shard(
            folder / shard_name(i, num_shards), (pack_record(examples[j][0], examples[j][1], dtype) for j in part)
        )
        for i, part in enumerate(parts)
    ]
    save_array(folder / "lengths.npy", np.array([[len(s), len(t)] for s, t in examples], np.int32).reshape(-1, 2))
    write_manifest(
        folder, shards=shards, config={}, documents={},
        num_unknown_tokens=0, vocab_size=vocab_size, tokenizer_fingerprint=tokenizer,
        pad_id=PAD, start_id=START, end_id=END, corruption=corruption,
    )  # fmt: skip
    return folder


def random_examples(num, seed=0, longest=(40, 15), vocab_size=30_000):
    random = np.random.default_rng(seed)

    def ids(longest):
        return np.append(random.integers(200, vocab_size, random.integers(1, longest)), END).astype(np.int32)

    return [Example(ids(longest[0]), ids(longest[1])) for _ in range(num)]
