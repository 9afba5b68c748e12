"""What another program wrote with its model, stored: bert4keras 0.11.5."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from t5pegasus.convert.bert4keras import read_bert4keras
from t5pegasus.generate.options import GenerationOptions
from t5pegasus.generate.search import generate


@pytest.fixture(scope="module")
def bert4keras(shared_data: Path):
    folder = shared_data / "refs" / "b4k_tiny"
    return read_bert4keras(folder), dict(np.load(folder / "b4k_tiny_ref.npz"))


@pytest.mark.parametrize("suffix", ["", "_nocrossbias"])
@pytest.mark.parametrize(("name", "num_beams"), [("greedy", 1), ("beam3", 3)])
def test_outputs_are_those_of_bert4keras(bert4keras, name, num_beams, suffix):
    foreign, reference = bert4keras
    model = dataclasses.replace(foreign.model, cross_attention_bias=suffix == "")
    tokens = reference["decode_encoder_input_ids"].astype(np.int32)
    segments = (tokens > 0).astype(np.int32)
    options = GenerationOptions(12, num_beams=num_beams, length_penalty=0.0, finalisation="bert4keras")
    rows = np.arange(len(tokens), dtype=np.uint32)
    found = generate(model, foreign.parameters, tokens, segments, rows, options)
    wanted = {field: reference[f"{name}_{field}{suffix}"] for field in ("ids", "length", "score")}
    assert np.array_equal(found.lengths[:, 0], wanted["length"] - 1)  # theirs count the start token
    assert np.array_equal(found.tokens[:, 0], wanted["ids"][:, 1:])
    np.testing.assert_allclose(found.scores[:, 0], wanted["score"], rtol=0, atol=2e-5)
