"""``ctxdocs eval`` as a user runs it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ctxdocs.cli import main

from .conftest import tiny_gist
from .evaluation_data import documents, questions

NEEDLE = ["--tasks", "needle", "--option", "needle.lengths=96", "--option", "needle.max_new_tokens=3", "--limit", 5]


def run(*args, code=0):
    result = CliRunner().invoke(main, ["eval", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def run_json(*args, code=0):
    return json.loads(run(*args, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def gist_checkpoint(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "gist"
    tiny_gist(tokenizer=tokenizer).save(folder)
    return folder


def test_a_table_and_a_folder(tiny_checkpoint, tmp_path):
    output = run(tiny_checkpoint, *NEEDLE, "--ratios", "4,8", "--output", tmp_path / "e").stdout
    lines = output.splitlines()
    assert lines[0] == "needle"
    assert lines[1].split() == "model given as examples tokens per slot answer found ROUGE-L recall".split()  # noqa: SIM905
    assert [line.split()[1] for line in lines[2:6]] == ["memory", "memory", "text", "none"]
    assert "20 rows; report: " in output
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "report.html",
        "results.csv",
        "results.json",
        "rows.jsonl",
    ]
    again = run(tiny_checkpoint, *NEEDLE, "--ratios", "4,8", "--output", tmp_path / "e").stdout
    assert again == output


def test_json_is_the_results(tiny_checkpoint, tmp_path):
    values = run_json(tiny_checkpoint, *NEEDLE, "--output", tmp_path / "e")
    stored = json.loads((tmp_path / "e" / "results.json").read_text())
    assert values["scores"] == stored["scores"]
    assert {score["reading"] for score in values["scores"]} == {"memory", "text", "none"}
    assert values["output"] == str(tmp_path / "e")


def test_files_go_to_all_tasks_or_to_one(tiny_checkpoint, tmp_path):
    texts, asked = documents(tmp_path / "texts.jsonl"), questions(tmp_path / "asked.jsonl")
    options = ["--option", "perplexity.context_tokens=32", "--option", "perplexity.tokens=8"]
    small = ["--limit", 3, "--option", "qa.max_new_tokens=3", *options]
    values = run_json(tiny_checkpoint, "--tasks", "qa,perplexity", "--data", texts, "--data", f"qa={asked}", *small)
    assert list(values["config"]["tasks"]["qa"]["data"].values()) == ["asked.jsonl"]
    assert list(values["config"]["tasks"]["perplexity"]["data"].values()) == ["texts.jsonl"]
    assert {score["task"] for score in values["scores"]} == {"qa", "perplexity"}


def test_a_leaderboard_at_one_budget(tiny_checkpoint, gist_checkpoint, tmp_path):
    result = run("--compare", tiny_checkpoint, f"beacon:{gist_checkpoint}", *NEEDLE, "--budget", "8").stdout
    rows = [line.split() for line in result.splitlines() if line.startswith(("tiny", "gist"))]
    assert [row[:3] for row in rows if row[1] == "memory"] == [["tiny", "memory", "8x"], ["gist", "memory", "8x"]]


def test_what_is_skipped_is_said(tiny_checkpoint):
    options = ["--option", "needle.lengths=3000", "--option", "needle.depths=50", "--limit", 2, "--tasks", "needle"]
    output = run(tiny_checkpoint, *options, "--readings", "text,none").stdout
    assert "skipped 2 of tiny/needle/text, as: the prompt and 16 tokens behind it take" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "needel"], "unknown task 'needel'"),
        (["--tasks", "qa"], "the task qa needs questions about contexts"),
        (["--tasks", "qa", "--data", "nowhere.jsonl"], "no such file"),
        (["--tasks", "needle", "--option", "needle.depth=3"], "needle has no option 'depth'"),
        (["--tasks", "needle", "--option", "lengths=3"], "is not TASK.NAME=VALUE"),
        (["--tasks", "needle", "--option", "needle.lengths=3,x"], "'x' is no whole number"),
        (["--tasks", "needle", "--ratios", "four"], "'four' is no whole number"),
        (["--tasks", "needle", "--budget", "much"], "neither tokens per slot nor bytes"),
        (["--tasks", "needle", "--readings", "aloud"], "unknown reading 'aloud'"),
    ],
)
def test_wrong_input(args, message, tiny_checkpoint):
    assert message in run_json(tiny_checkpoint, *args, code=1)["error"]


def test_several_models_need_compare(tiny_checkpoint):
    assert "--compare" in run(tiny_checkpoint, "bundled", *NEEDLE, code=2).output
    assert "two models or more" in run("--compare", tiny_checkpoint, *NEEDLE, code=2).output
    assert "given twice" in run_json("--compare", tiny_checkpoint, tiny_checkpoint, *NEEDLE, code=1)["error"]


def test_an_interruption_says_how_to_go_on(tiny_checkpoint, tmp_path, monkeypatch):
    from ctxdocs.evaluation.tasks.needle import Needle

    def stops(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Needle, "run", stops)
    result = run(tiny_checkpoint, *NEEDLE, "--output", tmp_path / "e", code=130)
    assert "what was measured so far is kept" in result.stderr
    assert "same command" in result.stderr


def test_help_lists_every_task():
    from ctxdocs.evaluation.tasks import TASKS

    text = run("--help").stdout
    assert all(name in text for name in TASKS)
