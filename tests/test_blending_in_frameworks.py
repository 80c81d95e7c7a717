"""Blending where other people's code asks: in LangChain, in LlamaIndex and over HTTP, as the library itself does it."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError, Library
from ctxdocs.integrations.reading import LibraryReader
from ctxdocs.integrations.searching import Search
from ctxdocs.memory import Memory
from ctxdocs.prompts import encode_text

from .conftest import FakeEmbedder, tiny_kv, tiny_model
from .test_blending import same

QUESTION = "When does the ferry sail?"


@pytest.fixture(scope="module")
def library(tokenizer, tmp_path_factory):
    """Exact memories; a third document says what the others do not."""
    from ctxdocs.corpus import Document

    folder = tmp_path_factory.mktemp("blended")
    compressor = tiny_kv(tokenizer=tokenizer, model=tiny_model(num_hidden_layers=4, initializer_range=0.5))
    library = Library.create(folder / "kv", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    for name in ("ferry", "lighthouse", "gauge"):
        library.add(Document.from_text(f"The {name} sails twice a day in winter, says the {name} owner.", name))
    return library


@pytest.fixture
def asked(library):
    """What the library answers; blending must make a difference."""
    plainly = library.ask(QUESTION, k=3, max_new_tokens=8)
    blended = library.ask(QUESTION, k=3, max_new_tokens=8, blend=0.5)
    assert blended.text != plainly.text
    return blended.text


def memories_of(prompt):
    return [part for part in prompt if isinstance(part, Memory)]


def test_langchain(library, asked):
    langchain = pytest.importorskip("ctxdocs.integrations.langchain")
    pytest.importorskip("langchain_core")
    plain = langchain.CompressedMemoryLLM(library=library, k=3, max_tokens=8)
    llm = langchain.CompressedMemoryLLM(library=library, k=3, blend=0.5, max_tokens=8)
    assert llm.invoke(QUESTION) == plain.invoke(QUESTION, blend=0.5) == asked != plain.invoke(QUESTION)
    assert "".join(llm.stream(QUESTION)) == asked
    assert llm.batch([QUESTION] * 2) == [asked] * 2
    chat = langchain.ChatCompressedMemory(library=library, k=3, blend=0.5, max_tokens=8)
    message = chat.invoke(QUESTION)
    assert message.content == asked
    assert message.usage_metadata["input_token_details"]["memory_slots"] > 30
    assert chat.invoke(QUESTION, blend=0).content == plain.invoke(QUESTION)
    assert llm._identifying_params["blend"] == 0.5  # a cached answer is one of this share


def test_references_in_a_prompt_are_blended_where_they_stand(library):
    langchain = pytest.importorskip("ctxdocs.integrations.langchain")
    pytest.importorskip("langchain_core")
    documents = langchain.CompressedMemoryRetriever(library=library, k=2).invoke(QUESTION)
    prompt = f"One: {documents[0].metadata['memory']} two: {documents[1].metadata['memory']} {QUESTION}"
    reader = LibraryReader(library)
    plain = reader.as_written(prompt)
    blended = reader.blended(plain, 1)
    one, two = ([part for part in request.prompt if not isinstance(part, Memory)] for request in (plain, blended))
    assert all(part.equal(other) for part, other in zip(one, two, strict=True))
    assert not same(memories_of(plain.prompt), memories_of(blended.prompt))
    assert reader.blended(plain, None) is plain
    # All of the tokens again: a prefill of the text.
    texts = iter(encode_text(library.compressor.tokenizer, document.page_content) for document in documents)
    ids = torch.cat([next(texts) if isinstance(part, Memory) else part for part in plain.prompt])
    expected = library.compressor.generate_ids(ids, max_new_tokens=8)
    llm = langchain.CompressedMemoryLLM(library=library, max_tokens=8)
    assert llm.invoke(prompt, blend=1) == library.compressor.tokenizer.decode(expected) != llm.invoke(prompt)


def test_llama_index(library, asked):
    llama_index = pytest.importorskip("ctxdocs.integrations.llama_index")
    pytest.importorskip("llama_index.core")
    engine = llama_index.CompressedMemoryQueryEngine.from_library(library, k=3, blend=0.5, max_new_tokens=8)
    assert str(engine.query(QUESTION)) == asked
    streamed = llama_index.CompressedMemoryQueryEngine.from_library(
        library, k=3, blend=0.5, max_new_tokens=8, streaming=True
    )
    assert "".join(streamed.query(QUESTION).response_gen) == asked
    llm = llama_index.CompressedMemoryLLM(library=library, k=3, max_new_tokens=8)
    assert llm.complete(QUESTION, blend=0.5).text == asked != llm.complete(QUESTION).text
    chat = llama_index.CompressedMemoryChatEngine.from_library(library, k=3, blend=0.5, max_new_tokens=8)
    assert str(chat.chat(QUESTION)) == asked
    synthesizer = llama_index.CompressedMemorySynthesizer(library, blend=0.5, max_new_tokens=8)
    assert str(synthesizer.synthesize(QUESTION, llama_index.CompressedMemoryRetriever(library, 3).retrieve(QUESTION)))


def test_memories_of_no_chunk_are_not_blended(library):
    llama_index = pytest.importorskip("ctxdocs.integrations.llama_index")
    pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms.types import ChatMessage

    llm = llama_index.CompressedMemoryLLM(library=library, blend=0.5, max_new_tokens=2)
    with pytest.raises(InputError, match=r"1 of the memories in the prompt are of no chunk of the library.*compress"):
        llm.complete(QUESTION, contents=["A text from elsewhere."])
    turns = [ChatMessage("One."), ChatMessage("Two.", role="assistant"), ChatMessage(QUESTION)]
    with pytest.raises(InputError, match="read the history as text"):
        llm.chat(turns, history="memory", k=1)
    assert llm.chat(turns, k=1).raw["usage"]["memory_slots"]


def test_what_cannot_be_blended_is_refused(library, make_library, corpus):
    langchain = pytest.importorskip("ctxdocs.integrations.langchain")
    pytest.importorskip("langchain_core")
    with pytest.raises(ValueError, match=r"blend is 2.0, and must lie between"):
        langchain.ChatCompressedMemory(library=library, blend=2)
    llm = langchain.CompressedMemoryLLM(library=library)
    with pytest.raises(InputError, match="blend is -1"):
        llm.invoke(QUESTION, blend=-1)
    summaries = make_library()
    summaries.add(corpus)
    with pytest.raises(InputError, match="blending needs memories of every key and value"):
        langchain.CompressedMemoryLLM(library=summaries, k=1).invoke(QUESTION, blend=0.5)
    reader = LibraryReader(library)
    (request,) = reader.questions([QUESTION], Search(2))
    with pytest.raises(InputError, match="2 memories to blend, and token ids of 1 documents"):
        library.blend(request.prompt, request.sources[:1], 0.5)


def test_the_server(library, asked):
    pytest.importorskip("fastapi")
    from .server_samples import with_client

    body = {"model": "tiny", "k": 3, "max_tokens": 8, "messages": [{"role": "user", "content": QUESTION}]}
    wrong = {"blend": 2}, {"blend": 0.5, "mode": "text"}
    as_it_stands = {"model": "tiny", "k": 3, "max_tokens": 8, "prompt": QUESTION}

    async def use(client):
        chat, text = "/v1/chat/completions", "/v1/completions"
        answers = [(await client.post(chat, json={**body, **how})).json() for how in ({}, {"blend": 0.5}, *wrong)]
        texts = [(await client.post(text, json={**as_it_stands, **how})).json() for how in ({}, {"blend": 1})]
        return answers, texts

    (plain, blended, *refused), (as_read, changed) = with_client(library, use)
    said = [answer["choices"][0]["message"]["content"] for answer in (plain, blended)]
    assert said == [library.ask(QUESTION, k=3, max_new_tokens=8).text, asked]
    assert blended["usage"] == {**plain["usage"], "ctxdocs": blended["usage"]["ctxdocs"]}
    assert [answer["error"]["param"] for answer in refused] == ["blend"] * 2
    assert as_read["choices"][0]["text"] != changed["choices"][0]["text"]


def test_a_server_of_a_library_that_is_not_exact(make_library, corpus):
    pytest.importorskip("fastapi")
    from .server_samples import with_client

    summaries = make_library()
    summaries.add(corpus)
    body = {"model": "tiny", "k": 1, "blend": 0.5, "messages": [{"role": "user", "content": QUESTION}]}

    async def use(client):
        return await client.post("/v1/chat/completions", json=body)

    response = with_client(summaries, use)
    assert response.status_code == 400
    assert "blending needs memories of every key and value" in response.json()["error"]["message"]
