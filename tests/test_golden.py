"""Parity with the authors' numbers: a few cases travel with the tests, the full set is used where it is there."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctxdocs.compressors import METHODS
from tests.parity.__main__ import main, run
from tests.parity.case import Case

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


@pytest.fixture
def case(tmp_path) -> Path:
    """A copy of a small case, to be changed."""
    return shutil.copytree(HERE / "autocompressor-opt-fused", tmp_path / "case")


def change(folder, edit):
    tensors = load_file(folder / "io.safetensors")
    edit(tensors)
    save_file(tensors, folder / "io.safetensors")


def last_line(capsys) -> str:
    return capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "name", ["expected_logits", "expected_memory", "expected_memory_doc2", "expected_generated_logits"]
)
def test_the_runner_fails_on_a_wrong_number(case, capsys, name):
    change(case, lambda tensors: tensors[name].view(-1)[0].add_(1e-3))
    assert main([str(case.parent)]) == 1
    assert last_line(capsys) == "0 passed, 1 failed, 0 unsupported"
    assert run(case).differing == [name]


def test_the_runner_fails_on_a_wrong_id_and_on_a_wrong_shape(case):
    change(case, lambda tensors: tensors["expected_generated_ids"].view(-1)[3].add_(1))
    assert run(case).line().endswith("ids DIFFER  FAIL (expected_generated_ids)")
    change(case, lambda tensors: tensors.update(expected_memory=tensors["expected_memory"][:, 1:].clone()))
    assert "expected_memory has shape (1, 8, 64), got (1, 9, 64)" in run(case).differing


def test_what_a_case_does_not_hold_is_not_missed(case):
    for name in ("expected_memory_doc1", "expected_generated_logits", "expected_logits"):
        change(case, lambda tensors, name=name: tensors.pop(name))
        assert run(case).verdict == "PASS"
    change(case, lambda tensors: [tensors.pop(name) for name in list(tensors) if "expected" in name])
    assert run(case).verdict == "FAIL"  # nothing was compared


def test_what_nobody_compares_fails_the_case(case):
    change(case, lambda tensors: tensors.update(expected_weather=torch.zeros(1)))
    assert run(case).line().endswith("ids equal  FAIL (not compared: expected_weather)")
    change(case, lambda tensors: tensors.pop("expected_weather"))
    change(case, lambda tensors: tensors.update(expected_train_grad=torch.zeros(1)))
    outcome = run(case)  # numbers of training are of another tier
    assert (outcome.verdict, outcome.not_compared) == ("PASS", ["expected_train_grad"])


def test_a_case_that_cannot_be_read_fails_and_the_others_run(case, capsys):
    broken = case.parent / "broken"
    broken.mkdir()
    (broken / "case.json").write_text("{")
    shutil.copytree(case, case.parent / "unknown")
    description = json.loads((case / "case.json").read_text())
    (case.parent / "unknown" / "case.json").write_text(json.dumps({**description, "method": "zip"}))
    assert main([str(case.parent)]) == 1
    assert last_line(capsys) == "1 passed, 1 failed, 1 unsupported"
    assert "no method zip" in run(case.parent / "unknown").line()
    assert run(broken).line().startswith("broken  required  ")


def test_the_name_of_a_case_says_nothing(case):
    assert run(case.rename(case.parent / "beacon-qwen2-train-optional")).verdict == "PASS"


TIERS = {
    "training": ("*-train", "ccm-*-masks-*"),
    "optional": (
        "*segmentation*",
        "*stride-lt-window*",
        "*mlp-param*",
        "*join*",
        "*rewind*",
        "*parallel*",
        "beacon-*-interleave-stepexp*",
        "*leftpad*",
        "*left-padded*",
    ),
}


@pytest.mark.parametrize("folder", CASES, ids=lambda folder: folder.name)
def test_tiers_are_told_by_settings_and_tensors(folder):
    named = [tier for tier, patterns in TIERS.items() if any(fnmatch(folder.name, pattern) for pattern in patterns)]
    assert Case.load(folder).tier == (named[0] if named else "required")
