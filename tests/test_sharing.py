"""One library and one model for many objects and threads."""

from __future__ import annotations

import gc
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ctxdocs import generation
from ctxdocs.errors import ContextTooLong, LibraryError
from ctxdocs.generation import GenerationOptions
from ctxdocs.library import Library
from ctxdocs.sharing import SharedModel, one_at_a_time, shared_library, shared_model
from tests.conftest import tiny_autocompressor


def prompts(compressor, *lengths):
    return [[torch.arange(2, 2 + length)] for length in lengths]


def test_a_path_is_opened_once(make_library, tmp_path, monkeypatch):
    library = make_library()
    monkeypatch.chdir(tmp_path)
    one = shared_library("library")
    assert shared_library(tmp_path / "library") is shared_library("./library") is one
    assert shared_library(library) is library
    assert shared_model(library) is shared_model(library)


def test_a_library_made_anew_in_its_place_is_another(make_library):
    path = make_library().path
    one = shared_library(path)
    shutil.rmtree(path)
    make_library()
    assert shared_library(path) is not one
    with pytest.raises(LibraryError, match="does not exist"):
        shared_library(path / "nothing")


def test_what_nobody_uses_is_let_go(make_library, tokenizer, tmp_path, embedder):
    import weakref

    compressor = tiny_autocompressor(tokenizer=tokenizer)
    library = Library.create(tmp_path / "alone", compressor, embedder)
    with one_at_a_time(library, with_model=True):
        pass
    gone = [weakref.ref(compressor), weakref.ref(library), weakref.ref(shared_model(library))]
    del compressor, library
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_many_threads_get_what_each_would_get_alone(compressor):
    model, options = SharedModel(compressor), GenerationOptions(max_new_tokens=6, eos_token_ids=())
    asked = prompts(compressor, *range(1, 25))
    alone = [generation.generate(compressor, [prompt], options)[0].ids for prompt in asked]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda prompt: model.generate([prompt], options)[0].ids, asked))
    assert answers == alone
    assert [result.ids for result in model.generate(asked, options)] == alone


def test_calls_that_wait_are_answered_together(compressor, monkeypatch):
    model, options = SharedModel(compressor, batch_size=8), GenerationOptions(max_new_tokens=2)
    sizes, started, go_on = [], threading.Event(), threading.Event()
    prefill = compressor.prefill

    def watched(batch):
        sizes.append(len(batch))
        started.set()
        go_on.wait(10)
        return prefill(batch)

    monkeypatch.setattr(compressor, "prefill", watched)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(model.generate, prompts(compressor, 3), options)
        started.wait(10)
        others = [pool.submit(model.generate, prompts(compressor, 3), options) for _ in range(10)]
        while len(model._waiting) < 10:
            pass
        go_on.set()
        results = [future.result() for future in [first, *others]]
    assert sizes == [1, 8, 2]
    assert len({tuple(result[0].ids) for result in results}) == 1


def test_a_call_does_not_fail_for_what_stands_in_another(compressor, monkeypatch):
    model, options = SharedModel(compressor), GenerationOptions(max_new_tokens=2)
    too_long = [[torch.full((3000,), 5)]]
    with model._turn, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(model.generate, asked, options) for asked in (prompts(compressor, 3), too_long)]
        while len(model._waiting) < 2:
            pass
        model._turn.release()
        try:
            assert len(futures[0].result()[0].ids) == 2
            with pytest.raises(ContextTooLong, match="952 more"):
                futures[1].result()
        finally:
            model._turn.acquire()
    assert model._waiting == []


def test_a_seed_gives_the_same_text_whatever_is_asked_beside(compressor):
    model = SharedModel(compressor)
    options = GenerationOptions(max_new_tokens=6, temperature=1.0, seed=3, eos_token_ids=())
    one, two = prompts(compressor, 4, 9)
    together = model.generate([one, two], options)
    assert [result.ids for result in together] == [
        model.generate([one], options)[0].ids,
        model.generate([two], options)[0].ids,
    ]


def test_streams_take_turns_with_answers(compressor):
    model, options = SharedModel(compressor), GenerationOptions(max_new_tokens=5, eos_token_ids=())
    (prompt,) = prompts(compressor, 4)
    streams = [model.stream(prompt, options) for _ in range(3)]
    pieces = [next(stream) for stream in streams]  # all have begun, and none is over
    answer = model.generate([prompt], options)[0]
    for index, stream in enumerate(streams[:2]):
        pieces[index] += "".join(stream)
    assert pieces[:2] == [answer.text] * 2
    streams[2].close()
    assert model.generate([prompt], options)[0].text == answer.text
