"""Parity with the authors' numbers: a few cases travel with the tests, the full set is used where it is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctxdocs.compressors import METHODS
from tests.parity.__main__ import main, run

HERE = Path(__file__).parent / "golden"
FULL = Path(__file__).parents[2] / "shared" / "golden"
CASES = sorted({path.parent.name: path.parent for root in (FULL, HERE) for path in root.glob("*/case.json")}.values())


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_case(folder):
    outcome = run(folder)
    if outcome.unsupported and outcome.case.tier != "required":
        pytest.skip(outcome.unsupported)
    if outcome.case.method not in METHODS:
        pytest.skip(f"ctxdocs has no method {outcome.case.method} yet")
    assert outcome.verdict == "PASS", outcome.line()


def test_the_runner_fails_on_a_wrong_number(tmp_path, capsys):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(HERE / "autocompressor-opt-fused", tmp_path / "case")
    tensors = load_file(folder / "io.safetensors")
    tensors["expected_logits"][0, 0, 0] += 1e-3
    save_file(tensors, folder / "io.safetensors")
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "0 passed, 1 failed, 0 unsupported"
