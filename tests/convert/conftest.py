"""What the tests of conversion start from."""

from pathlib import Path

import pytest
from hf_models import MODELS, WORDS, draw_parameters

from t5pegasus.convert.hf import export_hf
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every one of `MODELS`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        name: save_imported(Imported(model, draw_parameters(model), WordpieceTokenizer(WORDS)), folder / str(index))
        for index, (name, model) in enumerate(MODELS.items())
    }


@pytest.fixture(scope="session")
def exported(checkpoints: dict[str, Path], tmp_path_factory) -> dict[str, Path]:
    """The Hugging Face folder of each of them, bert4keras' without its bias in cross-attention."""
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: export_hf(checkpoint, folder / str(index), lossy=name == "bert4keras")
        for index, (name, checkpoint) in enumerate(checkpoints.items())
    }
