"""One harness for all methods: rows, resuming, refusals, intervals, budgets, and what it writes."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import pytest
import torch

from ctxdocs import InputError, StorageError
from ctxdocs.errors import ContextTooLong
from ctxdocs.evaluation import Model, evaluate, plots
from ctxdocs.evaluation.budgets import bytes_per_slot, ratio_near
from ctxdocs.evaluation.reading import ContextReader, Reading
from ctxdocs.evaluation.rows import Row, RowStore
from ctxdocs.evaluation.tasks.needle import Needle

from .conftest import tiny_autocompressor, tiny_ccm, tiny_gist, tiny_rcc
from .evaluation_data import documents

QUICK = {
    "needle": {"lengths": (96, 160), "depths": (0, 100), "max_new_tokens": 3},
    "perplexity": {"context_tokens": 32, "tokens": 8, "stretches": 2},
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    return documents(tmp_path_factory.mktemp("texts") / "documents.jsonl")


def run(models, text_file, **options):
    options = {"limit": 6, "batch_size": 4, "options": QUICK, **options}
    return evaluate(models, ["needle", "perplexity"], data=[text_file], **options)


def figures(evaluation):
    results = evaluation.results()
    del results["times"]
    return results


def test_every_method_is_measured_alike(any_compressor, text_file):
    evaluation = run(any_compressor, text_file)
    label = any_compressor.method
    assert evaluation.readings(label, "needle") == ["memory", "text", "none"]
    assert len(evaluation.rows) == 6 * 3 * 2
    assert all(row.metrics and not row.skipped for row in evaluation.rows)
    for reading in ("memory", "text", "none"):
        score = evaluation.score(label, "perplexity", reading)
        assert score.value.low <= score.value.mean <= score.value.high
        assert score.value.count == 6
    memory, text = (evaluation.cost(label, "perplexity", reading) for reading in ("memory", "text"))
    assert memory.context_tokens == text.context_tokens == text.slots == 32
    assert memory.nbytes > 0 < text.nbytes
    assert {time.reading for time in evaluation.times} == {"memory", "text", "none"}
    assert all(time.read > 0 for time in evaluation.times)
    assert [time.read for time in evaluation.times if time.reading == "text"] == [1.0, 1.0]


def test_a_seed_decides_everything_but_the_times(compressor, text_file):
    first, second = (figures(run(compressor, text_file, seed=5)) for _ in range(2))
    assert first == second
    assert figures(run(compressor, text_file, seed=6)) != first


def test_differences_are_paired(compressor, text_file):
    evaluation = run(compressor, text_file, readings=["memory", "text", "none", "other"])
    losses = {
        reading: {
            row.example: row.metrics["loss"]
            for row in evaluation.rows
            if row.reading == reading and row.task == "perplexity"
        }
        for reading in ("memory", "none", "other")
    }
    found = {one.against: one.value for one in evaluation.differences if one.metric == "loss"}
    assert set(found) == {"text", "none", "other"}
    for against in ("none", "other"):
        gaps = [losses["memory"][example] - losses[against][example] for example in losses["memory"]]
        assert found[against].mean == pytest.approx(sum(gaps) / len(gaps))
        assert found[against].low <= found[against].mean <= found[against].high
    assert losses["other"] != losses["memory"]


def test_another_examples_memory_is_that_of_its_contexts(compressor, text_file):
    evaluation = run(compressor, text_file, readings=["other"], limit=4)
    rows = {row.example: row for row in evaluation.rows if row.task == "perplexity"}
    task = evaluation.tasks["perplexity"]
    reader = ContextReader(compressor, Reading("memory"))
    examples = task.examples(reader, 0, 4)
    given = reader.give([examples[2].contexts])[0]
    rest = examples[0].extra["next"]
    score = reader.likelihoods([reader.behind(given, rest[:1])], [rest[1:]])[0]
    assert rows[examples[0].id].metrics["loss"] == pytest.approx(-score.mean, abs=1e-4)


def test_others_are_of_other_documents(compressor, text_file):
    options = {"perplexity": {"context_tokens": 16, "tokens": 4, "stretches": 6}}
    with pytest.raises(InputError, match="all examples are about one document"):
        evaluate(compressor, ["perplexity"], data=[text_file], readings=["other"], limit=6, options=options)
    evaluate(compressor, ["perplexity"], data=[text_file], readings=["other"], limit=7, options=options)


# Folders


def test_an_interrupted_evaluation_goes_on_where_it_stopped(compressor, text_file, tmp_path, monkeypatch):
    whole = run(compressor, text_file, output=tmp_path / "whole")
    calls = []
    real = Needle.run

    def stops(self, reader, examples):
        calls.append(len(examples))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, reader, examples)

    monkeypatch.setattr(Needle, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        run(compressor, text_file, output=tmp_path / "part")
    rows = tmp_path / "part" / "rows.jsonl"
    assert len(rows.read_text().splitlines()) == 12  # three readings of the first batch
    with rows.open("a") as file:
        file.write('{"model": "autocom')  # cut off in the middle of a line
    resumed = run(compressor, text_file, output=tmp_path / "part")
    assert calls[4:] == [2, 2, 2]
    assert figures(resumed) == figures(whole)
    assert {row.process for row in resumed.rows} == {1, 2}
    again = run(compressor, text_file, output=tmp_path / "part")
    assert calls[7:] == []
    assert again.results() == resumed.results()


def test_times_are_compared_within_one_process_only(compressor, text_file, tmp_path):
    run(compressor, text_file, output=tmp_path / "e")
    path = tmp_path / "e" / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["reading"] == "text":
            row["process"] = 7
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {time.reading for time in run(compressor, text_file, output=tmp_path / "e").times} == {"text"}


def test_another_evaluations_folder_is_refused(compressor, text_file, tmp_path):
    run(compressor, text_file, output=tmp_path / "e")
    with pytest.raises(InputError, match="there limit is 6, and here it is 5"):
        run(compressor, text_file, output=tmp_path / "e", limit=5)
    with pytest.raises(InputError, match="there seed is 0"):
        run(compressor, text_file, output=tmp_path / "e", seed=1)
    with pytest.raises(InputError, match="rows of another model"):
        run(tiny_autocompressor(tokenizer=compressor.tokenizer, seed=1), text_file, output=tmp_path / "e")
    text_file_of_another_content = documents(tmp_path / "documents.jsonl", count=7)
    with pytest.raises(InputError, match="there tasks is"):
        run(compressor, text_file_of_another_content, output=tmp_path / "e")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty and holds no evaluation"):
        run(compressor, text_file, output=tmp_path / "full")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        run(compressor, text_file, output=tmp_path / "file")
    (tmp_path / "e" / "rows.jsonl").write_text('{"what": 1}\n')
    with pytest.raises(InputError, match=r"rows.jsonl:1: no row"):
        run(compressor, text_file, output=tmp_path / "e")


def test_rows_are_in_the_file_before_the_next_batch(tmp_path):
    store = RowStore({"models": ["m"]}, tmp_path / "e")
    store.append([Row("m", "t", "memory", "1", {"f1": 0.5})])
    assert RowStore({"models": ["m"]}, tmp_path / "e").rows.keys() == {("m", "t", "memory", "1")}


# What does not fit


def test_what_does_not_fit_is_skipped_and_counted(tokenizer, text_file):
    compressor = tiny_gist(tokenizer=tokenizer, model=None, window=16)
    compressor.model.config.max_position_embeddings = 160
    options = {"needle": {"lengths": (60, 200), "depths": (0,), "max_new_tokens": 3}}
    evaluation = evaluate(compressor, ["needle"], limit=6, options=options)
    skipped = [row for row in evaluation.rows if row.skipped]
    assert {(row.reading, row.labels["length"]) for row in skipped} == {("text", 200)}
    assert len(skipped) == 3
    assert all("more than the model's 160" in row.skipped for row in skipped)
    assert evaluation.cost("beacon", "needle", "text").skipped == 3
    assert evaluation.score("beacon", "needle", "text").value.count == 3
    assert evaluation.score("beacon", "needle", "memory").value.count == 6
    assert sum(evaluation.skipped["beacon/needle/text"].values()) == 3
    paired = next(one for one in evaluation.differences if one.against == "text")
    assert paired.value.count == 3


def test_a_reader_says_how_much_is_too_long(compressor):
    reader = ContextReader(compressor, Reading("text"))
    given = reader.give([["word " * 3000]])[0]
    with pytest.raises(ContextTooLong, match="more than the model's 2048"):
        reader.generate([reader.behind(given, "!")], [4])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["needel"]}, "unknown task 'needel'.*needle"),
        ({"tasks": []}, "no tasks"),
        ({"tasks": ["perplexity"], "data": []}, "needs documents"),
        ({"tasks": ["qa"]}, "the task qa finds no questions it could use in documents.jsonl"),
        ({"tasks": ["perplexity"], "options": {"perplexity": {"context_tokens": 9000}}}, "8 documents of less than"),
        ({"readings": ["aloud"]}, "unknown reading 'aloud'"),
        ({"tasks": ["reranking"], "readings": ["none"]}, "none of the readings"),
        ({"limit": 0}, "at least 1"),
        ({"ratios": [4], "budget": "8"}, "give one of them"),
        ({"budget": "lots"}, "neither tokens per slot nor bytes"),
        ({"ratios": [5000]}, "cannot keep one slot for every 5000"),
        ({"options": {"qa": {}}}, "not among those that run"),
        ({"data": ["no/such/file.jsonl"], "tasks": ["perplexity"]}, "no such file"),
        ({"split": "test", "held_out": 0.0, "tasks": ["perplexity"]}, "of the split 'test'"),
    ],
)
def test_wrong_input_is_refused_with_a_reason(options, message, compressor, text_file, tmp_path):
    tasks = options.pop("tasks", ["needle"])
    if tasks == ["reranking"]:
        from .evaluation_data import questions

        options["data"] = [questions(tmp_path / "q.jsonl")]
    with pytest.raises(InputError, match=message):
        evaluate(compressor, tasks, **{"data": [text_file], "limit": 2, **options})


def test_an_empty_file_is_refused(compressor, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(Exception, match="no record in it"):
        evaluate(compressor, ["perplexity"], data=[tmp_path / "empty.jsonl"])


def test_a_model_without_a_tokenizer_is_refused(text_file):
    with pytest.raises(InputError, match="has no tokenizer"):
        run(tiny_autocompressor(), text_file)


# Ratios and budgets


def test_ratios_are_read_side_by_side(tokenizer, text_file):
    evaluation = run(tiny_gist(tokenizer=tokenizer), text_file, ratios=[2, 8], readings=["memory", "text", "other"])
    assert evaluation.readings("beacon", "perplexity") == ["memory 2x", "memory 8x", "text", "other 2x", "other 8x"]
    for ratio in (2, 8):
        assert evaluation.cost("beacon", "perplexity", f"memory {ratio}x").tokens_per_slot == ratio
    pairs = {(one.reading, one.against) for one in evaluation.differences}
    assert ("memory 8x", "other 8x") in pairs
    assert ("memory 8x", "other 2x") not in pairs


def test_a_budget_picks_the_nearest_ratio_of_each(tokenizer):
    gist, summary = tiny_gist(tokenizer=tokenizer), tiny_autocompressor(tokenizer=tokenizer)
    assert [ratio_near(one, "8") for one in (gist, summary)] == [8, 8]
    assert ratio_near(gist, "40") == 16  # its window
    assert ratio_near(tiny_rcc(tokenizer), "8") is None
    assert ratio_near(tiny_ccm(tokenizer=tokenizer, attn_type="merge_recur"), "8") is None
    # Keys and values of 2 layers, 2 heads, 8 numbers each, and a place; a vector of 32 numbers.
    assert (bytes_per_slot(gist), bytes_per_slot(summary)) == (2 * 2 * 2 * 8 * 4 + 8, 32 * 4)
    assert [ratio_near(one, "32B") for one in (gist, summary)] == [8, 4]
    assert ratio_near(summary, "0.004kB") == 32
    for budget in ("", "0", "-3", "8 slots"):
        with pytest.raises(InputError, match="neither"):
            ratio_near(gist, budget)


def test_several_models_are_compared_on_the_same_examples(tokenizer, text_file, tmp_path):
    loaded = []

    def model(label, build):
        return Model(label, lambda: loaded.append(label) or build())

    models = [
        model("gist", lambda: tiny_gist(tokenizer=tokenizer)),
        model("summary", lambda: tiny_autocompressor(tokenizer=tokenizer)),
        model("states", lambda: tiny_rcc(tokenizer)),
    ]
    evaluation = run(models, text_file, budget="8", output=tmp_path / "e")
    assert loaded == ["gist", "summary", "states"]
    assert evaluation.readings("states", "needle") == ["memory", "text", "none"]
    assert evaluation.models["states"]["ratio_can_be_chosen"] is False
    pairs = {(one.model, one.reading, one.against_model, one.against) for one in evaluation.differences}
    assert ("summary", "memory 8x", "gist", "memory 8x") in pairs
    assert ("states", "memory", "gist", "memory 8x") in pairs
    page = (tmp_path / "e" / "report.html").read_text()
    assert all(label in page for label in loaded)
    with pytest.raises(InputError, match="same name"):
        run([models[0], models[0]], text_file)


# Reports


class Checker(HTMLParser):
    """Counts elements, and complains of tags that do not match and of anything from outside."""

    void = frozenset({"meta", "br", "link", "img", "path", "use", "rect", "stop"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for name, value in attributes:
            outside = name in ("src", "srcset") or (name in ("href", "xlink:href") and not value.startswith("#"))
            assert not outside, (tag, name, value)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def reported(compressor, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "e"
    evaluation = run(compressor, text_file, ratios=[4, 8], output=folder)
    return evaluation, folder


def test_the_page_is_one_well_formed_file_that_runs_nothing(reported):
    _, folder = reported
    text = (folder / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.counts["svg"] == 4  # quality against ratio of two tasks, bytes, times
    assert "script" not in checker.counts
    assert text.count("@media (prefers-color-scheme: dark)") == 1
    assert 'name="viewport"' in text
    assert "#0102" not in text  # every colour of the plots is the page's
    assert "#0103" not in text


def test_the_csv_and_json_hold_the_scores(reported):
    evaluation, folder = reported
    lines = list(csv.DictReader((folder / "results.csv").open()))
    assert len(lines) == len(evaluation.scores)
    assert {line["depth"] for line in lines if line["task"] == "needle"} == {"", "0", "100"}
    stored = json.loads((folder / "results.json").read_text())
    assert stored["config"]["tasks"]["needle"]["options"]["lengths"] == [96, 160]
    assert stored["models"]["autocompressor"]["fingerprint"]
    assert len(stored["scores"]) == len(lines)
    assert float(lines[0]["mean"]) == pytest.approx(stored["scores"][0]["mean"], rel=1e-5)


def test_nothing_from_models_or_data_becomes_markup(tokenizer, text_file, tmp_path, monkeypatch):
    label = "<script>alert(1)</script> $x_1$ & co"
    monkeypatch.setattr(ContextReader, "generate", lambda self, prompts, *a, **k: ["<img src=x>"] * len(prompts))
    run([Model(label, lambda: tiny_gist(tokenizer=tokenizer))], text_file, output=tmp_path / "e")
    text = (tmp_path / "e" / "report.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    Checker().feed(text)


def test_without_matplotlib_there_are_tables(reported, monkeypatch):
    from ctxdocs.evaluation.page import page

    monkeypatch.setattr(plots, "available", lambda: False)
    text = page(reported[0])
    assert "<svg" not in text
    assert "pip install ctxdocs[eval]" in text
    Checker().feed(text)


def test_the_same_evaluation_gives_the_same_plots(reported):
    first, second = (plots.quality_against_ratio(reported[0], "needle") for _ in range(2))
    assert first == second


def test_progress_ends_with_all_rows(compressor, text_file):
    seen = []
    run(compressor, text_file, on_progress=seen.append)
    ends = [(progress.task, progress.done) for progress in seen if progress.done == progress.total]
    assert ends == [("needle", 18), ("perplexity", 18)]
    assert [progress.done for progress in seen] == [4, 8, 12, 14, 16, 18] * 2


def test_gradients_stay_off(compressor, text_file):
    with torch.enable_grad():
        run(compressor, text_file)
    assert not any(parameter.grad is not None for parameter in compressor.parameters())
