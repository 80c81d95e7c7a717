"""LangChain's own suites, as their authors ship them, over a tiny library."""

from __future__ import annotations

import pytest

pytest.importorskip("langchain_tests")

from langchain_tests.integration_tests import (
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
)
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from ctxdocs.corpus import Document
from ctxdocs.integrations.langchain import ChatCompressedMemory, CompressedMemoryRetriever, MemoryEmbeddings
from ctxdocs.library import Library
from tests.conftest import TEXT, FakeEmbedder


@pytest.fixture(scope="class", autouse=True)
def library(request, tmp_path_factory, compressor):
    """A library of a few sentences, as the attribute ``library`` of the test class."""
    folder = tmp_path_factory.mktemp("standard") / "library"
    library = Library.create(folder, compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    library.add([Document.from_text(line, f"line/{number}") for number, line in enumerate(TEXT.splitlines())])
    request.cls.library = library
    return library


class OverALibrary:
    """What both suites for chat models are told; all else are their defaults."""

    @property
    def chat_model_class(self):
        return ChatCompressedMemory

    @property
    def chat_model_params(self):
        return {"library": self.library}

    @property
    def structured_output_kwargs(self):
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_model_override(self) -> bool:
        return False  # a library's memories are read by the model that made them


class TestChatUnit(OverALibrary, ChatModelUnitTests):
    pass


class TestChatIntegration(OverALibrary, ChatModelIntegrationTests):
    pass


class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self):
        return CompressedMemoryRetriever

    @property
    def retriever_constructor_params(self):
        return {"library": self.library, "k": 2}

    @property
    def retriever_query_example(self):
        return "When does the ferry sail?"


class OverAnEmbedder:
    @property
    def embeddings_class(self):
        return MemoryEmbeddings

    @property
    def embedding_model_params(self):
        return {"embedder": FakeEmbedder()}


class TestEmbeddingsUnit(OverAnEmbedder, EmbeddingsUnitTests):
    pass


class TestEmbeddingsIntegration(OverAnEmbedder, EmbeddingsIntegrationTests):
    pass
