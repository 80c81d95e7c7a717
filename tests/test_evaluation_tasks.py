"""Every task on tiny models: what it makes of a seed, that right answers score as right, and its own definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from ctxdocs import DocumentError, InputError
from ctxdocs.evaluation.data import Data
from ctxdocs.evaluation.haystacks import Filler, Sentence, haystack, hidden
from ctxdocs.evaluation.reading import ContextReader, Reading
from ctxdocs.evaluation.tasks import TASKS, task_class
from ctxdocs.likelihood import Likelihood

from .conftest import FakeEmbedder, tiny_autocompressor, tiny_gist
from .evaluation_data import documents, questions, write_lines

SMALL = {
    "perplexity": {"context_tokens": 32, "tokens": 8, "stretches": 2},
    "streaming": {"tokens": 64, "step": 24, "recent": 16},
    "reconstruction": {"tokens": 16},
    "qa": {"max_new_tokens": 4},
    "multidoc": {"documents": (2, 3), "max_new_tokens": 4},
    "rag": {"k": 2, "chunk_tokens": 32, "overlap_tokens": 4, "embedder": FakeEmbedder(), "max_new_tokens": 4},
    "reranking": {"passages": 4},
    "classification": {"demonstrations": 6, "groups": 2},
    "passkey": {"lengths": (96, 160), "max_new_tokens": 4},
    "needle": {"lengths": (96, 160), "depths": (0, 100), "max_new_tokens": 4},
    "topics": {"topics": (2, 3), "turns": 1, "max_new_tokens": 4},
    "longbench": {"max_new_tokens": 4},
    "ruler": {"max_new_tokens": 4},
    "infinitebench": {"max_new_tokens": 4},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    context = "Passage one tells of boats. Passage two tells of bread. " * 3
    common = {"context": context, "input": "What is baked?"}
    return {
        "documents": documents(folder / "documents.jsonl"),
        "questions": questions(folder / "questions.jsonl"),
        "longbench": write_lines(
            folder / "long.jsonl",
            [
                {**common, "answers": ["bread"], "dataset": name, "all_classes": None}
                for name in ("hotpotqa", "lcc") * 3
            ],
        ),
        "ruler": write_lines(
            folder / "niah_single_1.jsonl",
            [
                {"input": f"Some text.\nThe number is {n}.\nWhich number is it? It is", "outputs": [f"{n}"]}
                for n in (71, 82)
            ],
        ),
        "infinitebench": write_lines(
            folder / "longbook_choice_eng.jsonl",
            [{**common, "answer": ["bread", "B"], "options": ["boats", "bread"]}] * 2,
        ),
    }


def make(name, files, **options):
    cls = task_class(name)
    path = files.get(name if cls.needs == "lines" else cls.needs)
    return cls(Data([path] if path else []), **{**SMALL[name], **options})


@pytest.fixture
def reader(compressor):
    return ContextReader(compressor, Reading("memory"))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_in_every_reading_and_makes_the_same_of_a_seed(name, files, compressor):
    task = make(name, files)
    for how in task.readings:
        reader = ContextReader(compressor, Reading(how))
        examples = task.examples(reader, seed=3, limit=4)
        again = make(name, files).examples(reader, seed=3, limit=4)
        assert [(e.id, e.question, e.answers) for e in examples] == [(e.id, e.question, e.answers) for e in again]
        assert [list(map(str, e.contexts)) for e in examples] == [list(map(str, e.contexts)) for e in again]
        assert len({example.id for example in examples}) == len(examples) > 1
        results = task.run(reader, examples)
        for result, example in zip(results, examples, strict=True):
            assert result.metrics.keys() <= {metric.name for metric in task.metrics}
            assert task.metrics[0].name in result.metrics
            assert all(math.isfinite(value) for value in result.metrics.values())
            assert all(example.labels.get(name) is not None for name in task.groups)
            assert result.costs["context_tokens"] > 0 or (how, name) == ("none", "rag")
            assert (result.costs["slots"] > 0) == (how != "none" or name == "streaming")
        alone = [task.run(reader, [example])[0] for example in examples]
        for one, other in zip(alone, results, strict=True):
            assert one.metrics == pytest.approx(other.metrics, abs=1e-4)
    task.close()
    if name not in ("longbench", "ruler", "infinitebench"):  # files of few lines give all of them
        other = make(name, files).examples(reader, seed=4, limit=4)
        assert [(e.question, str(e.contexts)) for e in other] != [(e.question, str(e.contexts)) for e in examples]


@pytest.mark.parametrize(
    "name", ["qa", "multidoc", "passkey", "needle", "topics", "ruler", "infinitebench", "longbench"]
)
def test_right_answers_score_one_and_wrong_ones_nothing(name, files, reader, monkeypatch):
    task = make(name, files)
    examples = task.examples(reader, 0, 6)
    answers = {"right": [example.answers[0] for example in examples], "wrong": ["zzz"] * len(examples)}
    for what, value in (("right", 1), ("wrong", 0)):
        monkeypatch.setattr(ContextReader, "generate", lambda *args, what=what, **kwargs: answers[what])
        assert [result.metrics[task.metrics[0].name] for result in task.run(reader, examples)] == [value] * len(
            examples
        )


def test_unknown_tasks_and_options_name_what_is_near():
    with pytest.raises(InputError, match=r"unknown task 'needles' \(did you mean needle\?\)"):
        task_class("needles")
    with pytest.raises(InputError, match="known tasks: perplexity"):
        task_class("xyz")
    with pytest.raises(InputError, match=r"needle has no option 'depth' \(it has: depths"):
        task_class("needle")(Data(), depth=3)


# What is hidden where


def test_a_needle_lies_at_its_depth():
    sentences = [Sentence(f"Sentence {number}.", 10) for number in range(10)]
    for depth, before in ((0, 0), (0.25, 2), (0.5, 5), (0.99, 10), (1, 10)):
        assert hidden(sentences, "NEEDLE", depth).split("NEEDLE")[0].count("Sentence") == before


def test_haystacks_fill_their_length_and_hold_what_is_asked(tokenizer, compressor, reader, files):
    task = task_class("needle")(Data(), lengths=(400, 800), depths=(0, 50, 100))
    examples = task.examples(reader, 0, 12)
    assert [(e.labels["length"], e.labels["depth"]) for e in examples[:6]] == [
        (length, depth) for length in (400, 800) for depth in (0, 50, 100)
    ]
    for example in examples:
        text, answer = example.contexts[0], example.answers[0]
        assert example.labels["length"] * 0.75 < len(tokenizer(text)["input_ids"]) <= example.labels["length"]
        assert text.count(answer) == 1
        at = text.index(answer) / len(text)
        assert abs(at - example.labels["depth"] / 100) < 0.3


def test_a_key_is_the_only_number_of_its_text(reader):
    for example in make("passkey", {}).examples(reader, 0, 6):
        key = example.answers[0]
        assert example.contexts[0].count(key) == 2
        assert not any(letter.isdigit() for letter in example.contexts[0].replace(key, ""))


def test_filler_comes_from_documents_where_wanted(tokenizer, files):
    filler = Filler("documents", Data([files["documents"]]), 0)
    given = files["documents"].read_text()
    rng = task_class("passkey")(Data()).random(0)
    assert all(sentence.text in given for sentence in haystack(filler.sentences(rng), tokenizer, 3000))
    with pytest.raises(InputError, match="no documents"):
        Filler("documents", Data(), 0)
    with pytest.raises(InputError, match="unknown filler"):
        Filler("poems", Data(), 0)


def test_the_right_document_stands_where_its_label_says(files, reader):
    task = make("multidoc", files, documents=(2, 4), positions=(0, 50, 100))
    examples = task.examples(reader, 0, 12)
    for example in examples:
        holding = [index for index, text in enumerate(example.contexts) if example.answers[1] in text]
        assert len(example.contexts) == example.labels["documents"]
        assert holding == [round((len(example.contexts) - 1) * example.labels["position"] / 100)]
    assert len({example.question for example in examples}) == 2  # six cells each
    with pytest.raises(InputError, match="too few for 50 documents"):
        make("multidoc", files, documents=(50,)).examples(reader, 0, 12)


# Losses


def test_perplexity_is_the_loss_of_the_logits(files, compressor):
    task = make("perplexity", files)
    for how in ("memory", "text", "none"):
        reader = ContextReader(compressor, Reading(how))
        examples = task.examples(reader, 0, 3)
        for example, result in zip(examples, task.run(reader, examples), strict=True):
            context, rest = example.contexts[0], example.extra["next"]
            assert (len(context), len(rest)) == (32, 8)
            front = context if how == "text" else rest[:0]
            memories = compressor.compress_ids([context]) if how == "memory" else []
            logits = compressor.logits(torch.cat([front, rest]), memories)[len(front) : -1]
            assert result.metrics["loss"] == pytest.approx(float(functional.cross_entropy(logits, rest[1:])), abs=1e-4)


def test_documents_that_are_too_short_are_counted(files, reader):
    task = make("perplexity", files, context_tokens=100_000)
    assert task.examples(reader, 0, 5) == []
    assert task.left_out == {"documents of less than 100008 tokens": 8}


def test_a_stream_in_one_segment_is_the_text_itself(files, tokenizer):
    compressor = tiny_autocompressor(tokenizer=tokenizer, segment_tokens=256)
    losses = {}
    for how in ("memory", "text"):
        reader = ContextReader(compressor, Reading(how))
        task = make("streaming", files)
        losses[how] = [result.metrics for result in task.run(reader, task.examples(reader, 0, 2))]
    for one, other in zip(losses["memory"], losses["text"], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    short = make("streaming", files, tokens=64, step=64)  # what none sees is one step's own beginning
    reader = ContextReader(compressor, Reading("none"))
    assert short.run(reader, short.examples(reader, 0, 2))[0].metrics == pytest.approx(losses["text"][0], abs=1e-4)


def test_a_stream_takes_the_readings_ratio(files, tokenizer):
    compressor = tiny_gist(tokenizer=tokenizer, window=16)
    slots = []
    for ratio in (2, 8):
        reader = ContextReader(compressor, Reading("memory", ratio))
        task = make("streaming", files)
        slots.append(task.run(reader, task.examples(reader, 0, 1))[0].costs["slots"])
    assert slots == [32, 8]


# Options, passages, libraries


def test_labels_are_calibrated_by_an_input_that_says_nothing(reader, monkeypatch):
    task = make("classification", {})
    example = task.examples(reader, 0, 1)[0]
    options = example.extra["options"]
    right = options.index(example.answers[0])
    # Every option is -2 behind the input; the right one alone is worse behind nothing.
    means = [-2.0] * len(options) + [-3.0 if index == right else -1.0 for index in range(len(options))]
    scores = [Likelihood(torch.tensor([mean]), torch.tensor([False])) for mean in means]
    monkeypatch.setattr(ContextReader, "likelihoods", lambda *args: scores)
    metrics = task.run(reader, [example])[0].metrics
    assert metrics == {"accuracy": 1.0, "uncalibrated": float(right == 0)}


def test_demonstrations_show_every_label_and_never_the_word_asked(reader):
    for example in make("classification", {}, demonstrations=9, groups=3).examples(reader, 0, 8):
        shown = "".join(example.contexts)
        assert len(example.contexts) == 3
        assert shown.count("Input:") == 9
        assert all(f"Output: {label}\n" in shown for label in example.extra["options"])
        assert f"Input: {example.question}\n" not in shown


def test_answers_are_labels_where_they_are_few(tmp_path, files, reader):
    records = [{"question": f"Is {n} even?", "answers": ["no" if n % 2 else "yes"], "context": ""} for n in range(12)]
    data = Data([write_lines(tmp_path / "q.jsonl", records)])
    task = task_class("classification")(data, examples="questions", demonstrations=4, groups=2)
    for example in task.examples(reader, 0, 3):
        assert sorted(example.extra["options"]) == ["no", "yes"]
        assert example.question not in "".join(example.contexts)
    with pytest.raises(InputError, match="24 different answers"):
        many = write_lines(
            tmp_path / "m.jsonl", [{"question": "What?", "answers": [f"{n}"], "context": "x"} for n in range(24)]
        )
        task_class("classification")(Data([many]), examples="questions").examples(reader, 0, 10)


def test_passages_that_look_alike_are_ranked_last(files, reader, monkeypatch):
    task = make("reranking", files)
    examples = task.examples(reader, 0, 3)
    assert all(example.answers[1] in example.contexts[-1] and len(example.contexts) == 4 for example in examples)
    title = [json.loads(line) for line in files["questions"].read_text().splitlines()]
    by_context = {record["context"]: record["title"] for record in title}
    assert by_context[examples[0].contexts[0]] == by_context[examples[0].contexts[-1]]  # the hard one first
    for scores, rank in (([-1, -1, -1, -1], 4), ([-2, -1, -3, -1.5], 2), ([-2, -2, -2, -1], 1)):
        monkeypatch.setattr(
            "ctxdocs.evaluation.tasks.reranking.question_likelihoods", lambda *args, scores=scores: [scores] * 3
        )
        metrics = task.run(reader, examples)[0].metrics
        assert metrics == {"mrr": 1 / rank, "recall@1": float(rank == 1), "recall@3": float(rank <= 3)}


def test_a_library_is_asked_end_to_end(files, compressor):
    task = make("rag", files, k=12)
    reader = ContextReader(compressor, Reading("memory"))
    results = task.run(reader, task.examples(reader, 0, 4))
    assert [result.metrics["recall"] for result in results] == [1.0] * 4  # everything is retrieved
    assert reader.seconds["compress"] > 0
    text = ContextReader(compressor, Reading("text"))
    read = task.run(text, task.examples(text, 0, 4))
    assert [result.metrics["recall"] for result in read] == [1.0] * 4
    assert text.seconds["compress"] == 0
    assert results[0].costs["slots"] < read[0].costs["slots"] == results[0].costs["context_tokens"]
    nothing = ContextReader(compressor, Reading("none"))
    assert "recall" not in task.run(nothing, task.examples(nothing, 0, 4))[0].metrics
    folder = Path(task._folder.name)
    assert len(list(folder.iterdir())) == 1  # text is read from the same library
    task.close()
    assert not folder.exists()


# Files of benchmarks


def test_rulers_last_line_asks(files, reader):
    example = make("ruler", files).examples(reader, 0, 1)[0]
    assert example.contexts[0].endswith(".\n")
    assert example.question == "Which number is it? It is"
    prompt = make("ruler", files).prompt(reader, reader.give([example.contexts])[0], example)
    assert reader.tokenizer.decode(prompt[-1]) == example.question
    assert example.labels == {"dataset": "niah_single_1"}


def test_rulers_outputs_count_all_but_in_questions(tmp_path, reader):
    lines = [
        {"input": "a\nb?", "outputs": ["x1", "x2"], "task": task, "answer_prefix": " It is"} for task in ("vt", "qa_1")
    ]
    examples = task_class("ruler")(Data([write_lines(tmp_path / "r.jsonl", lines)])).examples(reader, 0, 5)
    task = task_class("ruler")(Data())
    assert [task.grade("It is X1", example)["score"] for example in examples] == [0.5, 1.0]
    assert examples[0].question == "b? It is"
    assert [task.new_tokens(example) for example in examples] == [30, 32]


def test_ruler_reads_to_the_end_and_libraries_stop_where_their_format_does(files, reader, monkeypatch):
    seen = []
    monkeypatch.setattr(ContextReader, "generate", lambda self, prompts, tokens, stop: seen.append(stop) or ["x"] * 2)
    for name in ("ruler", "needle"):
        task = make(name, files)
        task.run(reader, task.examples(reader, 0, 2))
    assert seen == [(), None]


def test_long_contexts_are_cut_in_the_middle(tmp_path, reader):
    line = {"context": "start " + "middle " * 200 + "end", "input": "?", "answers": ["x"], "dataset": "qasper"}
    path = write_lines(tmp_path / "l.jsonl", [line])
    cut = task_class("longbench")(Data([path]), max_context_tokens=20).examples(reader, 0, 1)[0].contexts[0]
    assert cut.startswith("start")
    assert cut.endswith("end")
    assert len(reader.ids(cut)) <= 22


def test_lines_are_drawn_per_data_set(tmp_path, reader):
    lines = [
        {"context": "c", "input": f"{n}", "answers": ["x"], "dataset": name}
        for n in range(30)
        for name in ("lcc", "trec_e")
    ]
    path = write_lines(tmp_path / "l.jsonl", lines)
    drawn = {seed: task_class("longbench")(Data([path])).examples(reader, seed, 5) for seed in (0, 1)}
    assert [example.labels["dataset"] for example in drawn[0]] == ["lcc"] * 5 + ["trec"] * 5
    assert [e.id for e in drawn[0]] != [e.id for e in drawn[1]]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        (
            "longbench",
            {"context": "c", "input": "?", "answers": ["x"], "dataset": "dureader"},
            "unknown data set 'dureader'",
        ),
        ("longbench", {"question": "?"}, "no 'input', which every line of a longbench file has"),
        ("ruler", {"input": "a\nb", "outputs": [{}]}, "'outputs' holds neither strings nor numbers"),
        ("infinitebench", {"input": 3, "context": "c", "answer": "x"}, "'input' is no string"),
    ],
)
def test_lines_of_another_kind_are_named(name, line, message, tmp_path, reader):
    path = write_lines(tmp_path / "passkey.jsonl", [line])
    with pytest.raises((InputError, DocumentError), match=message) as caught:
        task_class(name)(Data([path])).examples(reader, 0, 1)
    assert "passkey.jsonl:1" in str(caught.value)


# Data


def test_splits_hold_out_titles(files):
    whole = [document.title for document in Data([files["documents"]]).documents(0)]
    parts = [
        [document.title for document in Data([files["documents"]], split=split, held_out=0.4).documents(0)]
        for split in ("validation", "test")
    ]
    assert sorted(whole) == sorted({*whole, *parts[0], *parts[1]})
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) + len(parts[1]) >= 2
    with pytest.raises(InputError, match="unknown split"):
        Data(split="exam")
