"""Data of training runs: files become examples, examples batches, each decided by the seed and a number."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ctxdocs.datasets.tokens import TokenSequences
from ctxdocs.errors import InputError
from ctxdocs.prompts import PromptFormat
from ctxdocs.training.card import curve
from ctxdocs.training.config import DataOptions
from ctxdocs.training.data import TrainingData, load_data
from ctxdocs.training.document_examples import DocumentRows
from ctxdocs.training.examples import Asking, cut, sequences
from ctxdocs.training.losses import IGNORED
from ctxdocs.training.method_examples import Segments, Spans, segments
from ctxdocs.training.sampling import Batches, Drawn
from ctxdocs.training.steps import build_step
from ctxdocs.training.steps.documents import DocumentsOptions
from tests.conftest import tiny_ccm, tiny_rcc
from tests.training_samples import write_documents, write_questions


@pytest.fixture
def asking(tokenizer) -> Asking:
    return Asking(tokenizer, PromptFormat())


@pytest.fixture
def data(tmp_path, tokenizer) -> TrainingData:
    files = [str(write_documents(tmp_path / "texts.jsonl")), str(write_questions(tmp_path / "questions.jsonl"))]
    train, held_out = load_data(DataOptions(files=files), tokenizer, tmp_path / "data", seed=0)
    assert held_out is None
    return train


def rng(seed: int = 0):
    return np.random.default_rng(seed)


def test_documents_and_questions_are_told_apart_and_counted(data):
    assert len(data.documents) == 40
    assert len(data.questions) == 20
    counts = data.files["texts.jsonl"]
    assert (counts.documents, counts.questions, counts.tokens) == (40, 0, data.documents.offsets[-1])
    assert data.files["questions.jsonl"].questions == 20


def test_titles_are_held_out_by_their_hash(tmp_path, tokenizer):
    files = [str(write_documents(tmp_path / "texts.jsonl"))]
    options = DataOptions(files=files, validation_share=0.25)
    train, held_out = load_data(options, tokenizer, tmp_path / "data", seed=0)
    assert held_out is not None
    assert len(train.documents) + len(held_out.documents) == 40
    other, _ = load_data(options, tokenizer, tmp_path / "other", seed=1)
    assert other.documents.lengths.tolist() != train.documents.lengths.tolist()


def test_what_was_tokenised_is_used_again(tmp_path, tokenizer, monkeypatch):
    options = DataOptions(files=[str(write_documents(tmp_path / "texts.jsonl"))])
    first, _ = load_data(options, tokenizer, tmp_path / "data", seed=0)
    monkeypatch.setattr("ctxdocs.training.data.read_records", lambda *args, **options: pytest.fail("read again"))
    again, _ = load_data(options, tokenizer, tmp_path / "data", seed=0)
    assert np.array_equal(first.documents.tokens, again.documents.tokens)
    assert first.files == again.files


def test_token_files_are_taken_as_they_are(tmp_path, tokenizer):
    from ctxdocs.datasets.tokenising import tokenise_files

    texts = write_documents(tmp_path / "texts.jsonl")
    tokenise_files(texts, tokenizer, tmp_path / "ready")
    both = DataOptions(files=[str(tmp_path / "ready.tokens.npy"), str(texts)])
    data, _ = load_data(both, tokenizer, tmp_path / "data", seed=0)
    assert len(data.documents) == 80
    assert np.array_equal(data.documents[0], data.documents[40])


def test_splits_of_questions_can_be_chosen(tmp_path, tokenizer):
    path = tmp_path / "questions.jsonl"
    record = {"question": "Why?", "answers": ["So."], "context": "So."}
    lines = [json.dumps({**record, "split": split, "title": split}) for split in ("train", "dev", "train")]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data, _ = load_data(DataOptions(files=[str(path)], splits=["train"]), tokenizer, tmp_path / "data", seed=0)
    assert len(data.questions) == 2
    with pytest.raises(InputError, match="nothing is left"):
        load_data(DataOptions(files=[str(path)], splits=["tests"]), tokenizer, tmp_path / "other", seed=0)


# Examples.


def test_only_answers_of_questions_are_targets(data, asking, tokenizer):
    options = DataOptions(sequence_tokens=128, packing="documents")
    examples = sequences(data, options, 2, asking, seed=0)
    assert len(examples) == 60
    example = examples.example(59, rng())
    target = example["labels"] != IGNORED
    assert tokenizer.decode(example["ids"][target]).strip().removesuffix("<|end|>").isdigit()
    assert "How many doors" in tokenizer.decode(example["ids"])
    assert max(len(examples.example(index, rng())["ids"]) for index in range(60)) == examples.lengths.max() <= 128


def test_what_fills_a_row_up_is_no_target(asking):
    data = TrainingData(TokenSequences.pack([[5] * 10, [6] * 10]))
    rows = sequences(data, DataOptions(sequence_tokens=16), 2, asking, seed=0)
    assert len(rows) == 2
    assert (rows.example(1, rng())["labels"] == IGNORED).sum() == 10


def test_segments_are_stretches_of_documents(data, asking):
    step = build_step(tiny_ccm(segment_tokens=16), "published", {"segments": [2, 4]})
    examples = Segments(data, step, 64)
    for draw in range(30):
        example = examples.example(draw % len(examples), rng(draw))
        lengths = [len(segment) for segment in example["segments"]]
        assert 2 <= len(lengths) <= 4
        assert lengths[:-1] == [16] * (len(lengths) - 1)
        assert lengths[-1] >= 2
    both = segments(data, step, asking, 128)
    asked = both.example(len(both) - 1, rng())
    assert (asked["labels"] != IGNORED).sum() >= 2


def test_spans_are_copies_behind_a_cue(data):
    step = build_step(tiny_rcc(), "published", {"target_tokens": 16, "cue": [2, 4]})
    examples = Spans(data, step, 32, 0, seed=0)
    starts = set()
    for draw in range(20):
        example = examples.example(0, rng(draw))
        text, span = example["context"].tolist(), example["span"].tolist()
        starts.add(next(at for at in range(17) if text[at : at + 16] == span))
        assert 2 <= (example["labels"] == IGNORED).sum() <= 4
    assert len(starts) > 4


@pytest.mark.parametrize("kind", ["continuation", "reconstruction", "answers"])
def test_rows_behind_memories_hold_what_explains_them(data, asking, tokenizer, kind):
    options = DocumentsOptions(document_tokens=[24], read_tokens=12, cue=[2, 4])
    for name in ("continuation", "reconstruction", "answers"):
        setattr(options.weights, name, float(name == kind))
    rows = DocumentRows(data, options, asking)
    for draw in range(10):
        example = rows.example(draw, rng(draw))
        own, read = tokenizer.decode(example["own"][0]), tokenizer.decode(example["read"][-example["targets"] :])
        assert example["kind"] == kind
        assert 0 < example["targets"] <= len(example["read"]) <= 12
        if kind == "continuation":
            whole = tokenizer.decode(data.documents[int(rows.kept[draw])])
            assert own + tokenizer.decode(example["read"]) in whole
        elif kind == "reconstruction":
            assert read in own
            assert 2 <= len(example["read"]) - example["targets"] <= 4
        else:
            assert read.removesuffix("<|end|>").strip() in own


def test_a_share_of_questions_may_have_no_answer(data, asking, tokenizer):
    options = DocumentsOptions(document_tokens=[24], read_tokens=24, unanswerable=0.5, questions=1.0)
    rows = DocumentRows(data, options, asking)
    examples = [rows.example(0, rng(draw)) for draw in range(40)]
    hidden = [example for example in examples if example["left_out"]]
    assert 8 < len(hidden) < 32
    assert all("not in the documents" in tokenizer.decode(example["read"]) for example in hidden)
    assert not any(example["own"] for example in hidden)
    assert all(len(example["own"]) + len(example["near"]) == 2 for example in examples)


def test_contexts_are_cut_around_their_answer():
    ids = torch.arange(100)
    assert cut(ids, 0.0, 10).tolist() == list(range(10))
    assert cut(ids, 0.5, 10).tolist() == list(range(45, 55))
    assert cut(ids, 1.0, 10).tolist() == list(range(90, 100))


# Batches.


def test_batches_hold_one_group_and_every_example_once_a_pass():
    groups = [0] * 7 + [1] * 5
    batches = Batches(groups, 2, 1, seed=0)
    assert (batches.per_pass, len(batches)) == (5, 5)
    drawn = [[index for index, _ in batch] for batch in batches]
    assert all(len({groups[index] for index in batch}) == 1 for batch in drawn)
    assert len({index for batch in drawn for index in batch}) == 10
    kept = Batches(groups, 2, 1, seed=0, leftovers="kept")
    assert sorted(index for batch in kept for index, _ in batch) == list(range(12))
    assert len(kept) == 7


def test_batches_go_on_pass_after_pass_with_new_draws():
    batches = Batches([0] * 6, 2, 1, seed=3)
    batches.total = 9
    keys = [key for batch in batches for key in batch]
    assert [draw for _, draw in keys] == list(range(18))
    passes = [tuple(index for index, _ in keys[start : start + 6]) for start in (0, 6, 12)]
    assert all(sorted(one) == list(range(6)) for one in passes)
    assert len(set(passes)) > 1
    assert keys == [key for batch in batches for key in batch]


def test_devices_get_batches_of_one_group_at_the_same_time():
    groups = [0] * 9 + [1] * 9
    batches = list(Batches(groups, 2, 2, seed=0))
    assert len(batches) == 8
    for place in range(0, 8, 2):
        assert len({groups[index] for batch in batches[place : place + 2] for index, _ in batch}) == 1


def test_too_few_examples_are_refused():
    with pytest.raises(InputError, match="3 sequences do not fill a batch of 4"):
        Batches([0, 0, 1], 4, 1, seed=0)


def test_an_example_is_decided_by_its_key(data, asking):
    rows = DocumentRows(data, DocumentsOptions(document_tokens=[24], read_tokens=24), asking)
    drawn = Drawn(rows, seed=5)
    one, same, other = drawn[3, 10], drawn[3, 10], drawn[3, 11]
    assert one["seed"] == same["seed"] != other["seed"]
    assert one["read"].equal(same["read"])


def test_the_curve_is_an_image_with_both_kinds_of_losses():
    svg = curve([(1, 9.0), (10, 4.0), (20, 3.5)], [(20, 3.75)])
    assert svg.startswith("<svg")
    assert svg.count("<circle") == 1
    assert "9.00" in svg
    assert "nan" not in curve([(1, 2.0), (2, 2.0)])
