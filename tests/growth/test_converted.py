"""Growth of what other programs trained: parameters without an optimizer's state, under the whole receipt."""

import numpy as np
import pytest

from launch import cli
from t5pegasus.config import NUMERICS, ModelConfig
from t5pegasus.convert.hf import export_hf, is_hf_folder, read_hf
from t5pegasus.convert.imported import Imported, save_imported
from t5pegasus.model.t5 import declare_parameters
from t5pegasus.text.tokenizer.wordpiece import WordpieceTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"天地玄黄宇宙洪荒"]
MODEL = ModelConfig(
    vocab_size=len(WORDS), d_model=8, d_kv=4, d_ff=12, num_heads=2, num_encoder_layers=1, num_decoder_layers=1,
    pad_token_id=0, eos_token_id=3, decoder_start_token_id=2, dropout_rate=0.0, **NUMERICS["hf-mt5"],
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    random = np.random.default_rng(3)
    parameters = {
        name: (spec.init_std * random.normal(size=spec.shape) + spec.gain).astype(np.float32)
        for name, spec in declare_parameters(MODEL).items()
    }
    folder = tmp_path_factory.mktemp("converted") / "source"
    return save_imported(Imported(MODEL, parameters, WordpieceTokenizer(WORDS)), folder)


@pytest.mark.slow
def test_a_hugging_face_folder_grows_under_the_whole_receipt(checkpoint, tmp_path, capsys):
    folder = export_hf(checkpoint, tmp_path / "hf")
    assert cli.main(["grow", str(folder), str(tmp_path / "grown"), "--to", "d_model=12,d_ff=18"]) == 0
    assert is_hf_folder(tmp_path / "grown")
    assert read_hf(tmp_path / "grown").model.d_model == 12
    receipt = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("receipt: R"))
    assert "gradients r·g" in receipt
    assert "copies parted" in receipt
    assert "only" not in receipt


@pytest.mark.slow
def test_a_converted_checkpoint_grows_under_the_whole_receipt(checkpoint, tmp_path, capsys):
    assert cli.main(["grow", str(checkpoint), str(tmp_path / "grown"), "--to", "d_ff=18"]) == 0
    assert "copies parted" in capsys.readouterr().out
