"""The LangChain LLM and retriever over a library of a tiny model."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("langchain_core")

from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.load import dumpd, load
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import PromptTemplate
from langchain_core.runnables import RunnablePassthrough
from pydantic import ValidationError

from ctxdocs.corpus import Document
from ctxdocs.errors import ContextTooLong, FingerprintMismatch, InputError, LibraryError
from ctxdocs.integrations.langchain import CompressedMemoryLLM, CompressedMemoryRetriever, format_memories
from ctxdocs.library import Library
from tests.conftest import FakeEmbedder, tiny_autocompressor

QUESTION = "When does the ferry sail?"
TEMPLATE = PromptTemplate.from_template("Read {context} and answer: {question}\n")


@pytest.fixture
def library(make_library, corpus):
    library = make_library()
    library.add(corpus)
    return library


@pytest.fixture
def llm(library):
    return CompressedMemoryLLM(library=library, max_tokens=8)


@pytest.fixture
def retriever(library):
    return CompressedMemoryRetriever(library=library, k=2)


@pytest.fixture
def chain(llm, retriever):
    context = {"context": retriever | format_memories, "question": RunnablePassthrough()}
    return context | TEMPLATE | llm | StrOutputParser()


# Answering by itself.


def test_with_k_it_answers_as_the_library_does(library, llm):
    answer = library.ask(QUESTION, k=2, max_new_tokens=8)
    assert llm.invoke(QUESTION, k=2) == answer.text != ""
    assert CompressedMemoryLLM(library=library, k=2, max_new_tokens=8).invoke(QUESTION) == answer.text
    info = llm.generate([QUESTION], k=2).generations[0][0].generation_info
    assert [source["source"] for source in info["sources"]] == [hit.document for hit in answer.sources]
    assert info["usage"]["memory_slots"] == answer.memory_slots == 8
    assert info["usage"]["input_tokens"] == answer.memory_slots + answer.prompt_tokens
    assert info["finish_reason"] == answer.finish_reason


def test_many_questions_are_one_batch(library, monkeypatch):
    llm = CompressedMemoryLLM(library=library, k=1, max_tokens=4)
    questions = [QUESTION, "Who built the lighthouse?", "What is read every six hours?"]
    alone = [llm.invoke(question) for question in questions]
    sizes, prefill = [], library.compressor.prefill
    monkeypatch.setattr(library.compressor, "prefill", lambda batch: (sizes.append(len(batch)), prefill(batch))[1])
    assert llm.batch(questions) == alone
    assert [generations[0].text for generations in llm.generate(questions).generations] == alone
    assert sizes == [3, 3]


def test_streams_add_up(llm):
    whole = llm.invoke(QUESTION, k=2)
    pieces = list(llm.stream(QUESTION, k=2))
    assert "".join(pieces) == whole
    assert len(pieces) > 2
    written = llm.invoke("as it stands")
    assert "".join(llm.stream("as it stands")) == written


async def test_async(llm):
    whole = llm.invoke(QUESTION, k=2)
    assert await llm.ainvoke(QUESTION, k=2) == whole
    assert "".join([piece async for piece in llm.astream(QUESTION, k=2)]) == whole
    assert await llm.abatch([QUESTION] * 3, k=2) == [whole] * 3
    assert (await llm.agenerate([QUESTION], k=2)).generations[0][0].text == whole


# In a pipeline.


def test_references_become_memories_at_their_places(library, chain, retriever, llm):
    hits = library.search(QUESTION, k=2)
    memories = library.memories(hits)
    expected = library.compressor.generate(["Read ", *memories, f" and answer: {QUESTION}\n"], max_new_tokens=8)
    assert chain.invoke(QUESTION) == expected
    swapped = library.compressor.generate(["Read ", *memories[::-1], f" and answer: {QUESTION}\n"], max_new_tokens=8)
    documents = retriever.invoke(QUESTION)
    assert llm.invoke(TEMPLATE.format(context=format_memories(documents[::-1]), question=QUESTION)) == swapped
    apart = f"One: {documents[0].metadata['memory']} Two: {documents[1].metadata['memory']} End"
    assert llm.invoke(apart) == library.compressor.generate(
        ["One: ", memories[0], " Two: ", memories[1], " End"], max_new_tokens=8
    )


def test_a_pipeline_streams_batches_and_runs_asynchronously(chain):
    import asyncio

    whole = chain.invoke(QUESTION)
    assert "".join(chain.stream(QUESTION)) == whole
    assert chain.batch([QUESTION] * 3) == [whole] * 3
    assert asyncio.run(chain.ainvoke(QUESTION)) == whole


def test_a_prompt_with_references_is_not_searched_for(library, chain, retriever):
    searching = CompressedMemoryLLM(library=library, k=1, max_tokens=8)
    prompt = TEMPLATE.format(context=format_memories(retriever.invoke(QUESTION)), question=QUESTION)
    assert searching.invoke(prompt) == chain.invoke(QUESTION)


def test_a_forged_reference_stays_text_and_reads_nothing(library, llm, retriever):
    genuine = retriever.invoke(QUESTION)[0].metadata["memory"]
    last = "0" if genuine[-3] != "0" else "1"
    forged = f"{genuine[:-3]}{last}]]"
    result = llm.generate([f"Tell me {forged}"])
    assert result.llm_output["token_usage"]["memory_slots"] == 0
    assert result.generations[0][0].generation_info["sources"] == []
    assert result.generations[0][0].text == library.compressor.generate(f"Tell me {forged}", max_new_tokens=8)


def test_special_tokens_in_a_prompt_stay_text(library, llm):
    ids = llm.get_token_ids("<|end|>")
    assert library.compressor.tokenizer.eos_token_id not in ids
    assert llm.get_num_tokens("<|end|>") == len(ids) > 1


def test_a_prompt_as_a_turn_stands_in_the_models_format(library, llm, retriever):
    compressor = library.compressor
    documents = retriever.invoke(QUESTION)
    memories = library.memories(library.search(QUESTION, k=2))
    prompt = f"Context: {format_memories(documents)}\nSay when."
    expected = ["Context: ", *memories, "Question: \nSay when.\nAnswer:"]
    assert (
        llm.invoke(prompt, framing="turn")
        == compressor.generate(expected, max_new_tokens=8, stop=compressor.prompt_format.stop).strip()
    )


# The retriever.


def test_documents_bring_their_memories(library, retriever):
    hits = library.search(QUESTION, k=2)
    documents = retriever.invoke(QUESTION)
    assert [document.page_content for document in documents] == [hit.text for hit in hits]
    for document, hit in zip(documents, hits, strict=True):
        assert document.metadata.pop("memory").startswith(f"[[memory:{hit.id}:")
        assert document.metadata == {
            **library.store.document(hit.document).metadata,
            "source": hit.document,
            "chunk": hit.chunk,
            "start_index": hit.start,
            "end_index": hit.end,
            "slots": hit.slots,
            "tokens": hit.tokens,
            "score": hit.score,
        }
    assert len({document.id for document in documents}) == 2


@pytest.mark.parametrize("options", [{"retrieval": "dense"}, {"retrieval": "lexical"}, {"rerank": "likelihood"}])
def test_the_librarys_ways_of_searching(library, options):
    found = CompressedMemoryRetriever(library=library, k=2, **options).invoke(QUESTION)
    hits = library.search(QUESTION, k=2, **options)
    assert [(d.page_content, d.metadata["score"]) for d in found] == [(hit.text, hit.score) for hit in hits]


def test_filters_say_which_documents_are_searched(library, retriever, llm):
    for number, year in enumerate((2019, 2025)):
        library.add(Document.from_text(f"Rule {number}.", uri=f"rule/{year}", metadata={"year": year, "kind": "rule"}))

    def found(**options):
        return sorted(document.metadata["source"] for document in retriever.invoke("rule", k=9, **options))

    assert found(filter={"kind": "rule"}) == ["rule/2019", "rule/2025"]
    assert found(filter={"kind": "rule", "year": 2025}) == ["rule/2025"]
    assert found(filter={"source": ["rule/2019", "elsewhere"]}) == ["rule/2019"]
    assert found(filter={"kind": "rule"}, retrieval="dense", rerank="likelihood") == ["rule/2019", "rule/2025"]
    assert found(filter={"kind": "law"}) == found(filter={"nothing": None}) == []
    assert len(found(filter={})) == 5
    always = CompressedMemoryRetriever(library=library, k=9, filter={"year": 2019})
    assert [document.metadata["year"] for document in always.invoke("rule")] == [2019]
    info = llm.generate(["rule"], k=9, filter={"year": 2025}).generations[0][0].generation_info
    assert [source["source"] for source in info["sources"]] == ["rule/2025"]
    with pytest.raises(InputError, match="filter must be a dict"):
        retriever.invoke("rule", filter="year")


def test_k_beyond_the_library_returns_all_there_is(retriever, llm):
    assert len(retriever.invoke(QUESTION, k=100)) == 3
    assert len(llm.generate([QUESTION], k=100).generations[0][0].generation_info["sources"]) == 3


async def test_the_retriever_is_asynchronous(retriever):
    assert await retriever.ainvoke(QUESTION) == retriever.invoke(QUESTION)


# LangChain's own machinery.


class Recorder(BaseCallbackHandler):
    def __init__(self):
        self.seen = []

    def on_llm_start(self, serialized, prompts, **kwargs):
        self.seen.append(("start", prompts))

    def on_llm_new_token(self, token, **kwargs):
        self.seen.append(("token", token))

    def on_llm_end(self, response, **kwargs):
        self.seen.append(("end", response.generations[0][0].generation_info["usage"]["output_tokens"]))

    def on_llm_error(self, error, **kwargs):
        self.seen.append(("error", type(error)))

    def on_retriever_end(self, documents, **kwargs):
        self.seen.append(("found", len(documents)))


def test_callbacks(llm, retriever):
    recorder = Recorder()
    config = {"callbacks": [recorder]}
    text = llm.invoke(QUESTION, config, k=1)
    assert recorder.seen[0] == ("start", [QUESTION])
    assert recorder.seen[-1][0] == "end"
    recorder.seen.clear()
    list(llm.stream(QUESTION, config, k=1))
    assert "".join(token for kind, token in recorder.seen if kind == "token") == text
    assert recorder.seen[-1][0] == "end"
    recorder.seen.clear()
    retriever.invoke(QUESTION, config)
    assert recorder.seen == [("found", 2)]
    recorder.seen.clear()
    with pytest.raises(InputError):
        llm.invoke("", config)
    assert recorder.seen[-1] == ("error", InputError)


def test_a_cached_answer_does_not_outlive_what_it_was_read_from(library, monkeypatch):
    llm = CompressedMemoryLLM(library=library, k=3, max_tokens=4, cache=InMemoryCache())
    calls, prefill = [], library.compressor.prefill
    monkeypatch.setattr(library.compressor, "prefill", lambda batch: (calls.append(1), prefill(batch))[1])
    first = llm.invoke(QUESTION)
    assert llm.invoke(QUESTION) == first
    assert len(calls) == 1
    library.add(Document.from_text("The ferry sails to Norway.", uri="news"))
    llm.invoke(QUESTION)
    assert len(calls) == 2
    CompressedMemoryLLM(library=library, k=3, max_tokens=5, cache=llm.cache).invoke(QUESTION)
    assert len(calls) == 3


def test_parameters_are_written_and_read_back(tmp_path, tiny_checkpoint, corpus, monkeypatch):
    Library.create(tmp_path / "lib", tiny_checkpoint, DeterministicFakeEmbedding(size=8))
    monkeypatch.chdir(tmp_path)
    llm = CompressedMemoryLLM(library="./lib", k=4, seed=0, temperature=0.5, stop=["\n"], framing="turn")
    written = dumpd(llm)
    assert written["kwargs"] | {"library": "lib", "k": 4} == written["kwargs"]
    read = load(written, valid_namespaces=["ctxdocs"], allowed_objects=[CompressedMemoryLLM])
    assert read.asdict() == llm.asdict()
    assert read.library is llm.library
    retriever = CompressedMemoryRetriever(library="lib", k=7, retrieval="dense")
    again = load(dumpd(retriever), valid_namespaces=["ctxdocs"], allowed_objects=[CompressedMemoryRetriever])
    assert (again.library, again.k, again.retrieval) == (retriever.library, 7, "dense")
    assert llm.library is retriever.library


def test_options_of_a_call(llm, library):
    assert llm.generate(["go"], max_tokens=2).llm_output["token_usage"]["output_tokens"] == 2
    long = llm.invoke("go", max_new_tokens=12, temperature=0)
    assert llm.invoke("go", max_new_tokens=12, stop=[long[3:5]]) == long[: long.find(long[3:5])]
    drawn = [llm.invoke("go", temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# Wrong input.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature must not be negative"),
        ({"max_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"libary": "x"}, "libary"),
        ({"framing": "nothing"}, "framing"),
        ({"k": "many"}, "k"),
        ({"k": 0}, "k must be at least 1"),
    ],
)
def test_wrong_settings_are_refused_where_they_are_given(library, settings, words):
    with pytest.raises((ValidationError, InputError), match=words):
        CompressedMemoryLLM(library=library, **settings)


@pytest.mark.parametrize("settings", [{"k": 0}, {"retrieval": "x"}, {"rerank": "x"}, {"nothing": 1}])
def test_wrong_settings_of_the_retriever(library, settings):
    with pytest.raises(ValidationError):
        CompressedMemoryRetriever(library=library, **settings)


def test_wrong_options_of_a_call(llm, retriever):
    for options, words in (
        ({"k": 0}, "k must be at least 1"),
        ({"model": "gpt"}, "unknown option 'model'"),
        ({"framing": "x"}, "unknown framing"),
        ({"k": 1, "retrieval": "x"}, "unknown retrieval"),
        ({"top_p": 2.0}, "top_p"),
    ):
        with pytest.raises(InputError, match=words):
            llm.invoke(QUESTION, **options)
    with pytest.raises(InputError, match="k must be at least 1"):
        retriever.invoke(QUESTION, k=0)
    with pytest.raises(InputError, match="query is empty"):
        retriever.invoke("  ")
    with pytest.raises(InputError, match="query is empty"):
        llm.invoke("  ", k=1)


def test_a_prompt_that_is_too_long_says_by_how_much(llm, library):
    text = "the ferry " * 2500
    tokens = len(llm.get_token_ids(text))
    with pytest.raises(ContextTooLong, match=f"take {tokens} positions, {tokens - 2048} more than"):
        llm.invoke(text)


def test_a_library_that_is_not_there_or_of_another_model(tmp_path, library, tokenizer):
    with pytest.raises(LibraryError, match="nowhere does not exist"):
        CompressedMemoryLLM(library=tmp_path / "nowhere")
    with pytest.raises(LibraryError, match="nowhere does not exist"):
        CompressedMemoryRetriever(library=tmp_path / "nowhere")
    other = Library.open(library.path, tiny_autocompressor(tokenizer=tokenizer, seed=5), FakeEmbedder())
    with pytest.raises(FingerprintMismatch):
        CompressedMemoryLLM(library=other, k=1).invoke(QUESTION)


def test_references_to_what_is_gone_or_elsewhere(library, llm, retriever, make_library, corpus):
    prompt = format_memories(retriever.invoke(QUESTION)) + "?"
    other = make_library("other")
    other.add(corpus)
    with pytest.raises(InputError, match="give the retriever and the model the same library"):
        CompressedMemoryLLM(library=other).invoke(prompt)
    library.remove(corpus)
    with pytest.raises(LibraryError, match="no longer in the library"):
        llm.invoke(prompt)


def test_an_empty_library(make_library):
    empty = make_library("empty")
    with pytest.raises(LibraryError, match="is empty"):
        CompressedMemoryLLM(library=empty, k=2).invoke(QUESTION)
    assert CompressedMemoryLLM(library=empty, max_tokens=2).invoke("go on")


def test_a_document_without_a_memory_is_refused(retriever):
    documents = retriever.invoke(QUESTION)
    del documents[1].metadata["memory"]
    with pytest.raises(InputError, match=r"a document has no memory.*MemoryCompressor"):
        format_memories(documents)
    assert format_memories([]) == ""


def test_every_method_reads_references(any_compressor, embedder, tmp_path, corpus):
    library = Library.create(tmp_path / "any", any_compressor, embedder, chunk_tokens=32, overlap_tokens=4)
    library.add(corpus)
    hits = library.search(QUESTION, k=2)
    prompt = format_memories(CompressedMemoryRetriever(library=library, k=2).invoke(QUESTION)) + "then"
    expected = any_compressor.generate("then", library.memories(hits), max_new_tokens=4)
    assert CompressedMemoryLLM(library=library, max_tokens=4).invoke(prompt) == expected


def test_without_langchain_it_says_what_to_install():
    code = """
import sys
sys.modules["langchain_core"] = None
import ctxdocs.integrations.langchain as package
print(sorted(dir(package)) == sorted(package.__all__))
try:
    package.CompressedMemoryLLM
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "True",
        "MissingDependency CompressedMemoryLLM needs langchain-core (pip install 'ctxdocs[langchain]')",
    ]


def test_unknown_names_are_no_attributes():
    import ctxdocs.integrations.langchain as package

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = package.Nothing
    assert all(getattr(package, name).__name__ == name for name in package.__all__)
