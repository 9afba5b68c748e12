"""Examples run, and what they print is so."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("arguments", "dtype"), [([], np.float32), (["--tied"], np.float64)], ids=str)
def test_a_decoder_only_model_grows_exactly(arguments, dtype, capsys):
    with jax.enable_x64(dtype == np.float64):
        receipts = load("decoder_only").main(arguments, dtype)
    rounding = 100 * np.finfo(dtype).eps
    for receipt in receipts.values():
        assert receipt.logits <= 2 * receipt.permutation_floor <= rounding
    assert receipts["widths, in silence"].gradients <= rounding
    assert receipts["all axes, copies parted by noise"].gradients > 0.1  # noise is no function of the source
    printed = capsys.readouterr().out
    assert "refused: axis rotary cannot grow from 8 to 16: there is no rule for 'rotary'" in printed
    assert "× the permutation floor" in printed


@pytest.mark.slow
def test_it_runs_as_its_first_lines_say():
    command = [sys.executable, str(EXAMPLES / "decoder_only.py"), "--tied"]
    result = subprocess.run(command, check=False, capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr.decode()
    assert "refused: axis rotary" in result.stdout.decode()
