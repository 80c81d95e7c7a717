"""A LlamaIndex chat engine over a library: sources, and if wanted the conversation itself, read as memories."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.callbacks import CallbackManager, trace_method
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse, ToolOutput
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.types import Thread
from llama_index.core.vector_stores.types import MetadataFilters

from ctxdocs.integrations.llama_index.llm import CompressedMemoryLLM
from ctxdocs.integrations.llama_index.retriever import CompressedMemoryRetriever
from ctxdocs.integrations.llama_index.synthesizer import reading_llm
from ctxdocs.library import Library
from ctxdocs.sharing import shared_library


class CompressedMemoryChatEngine(BaseChatEngine):
    """Answers messages from what a retriever finds for each, read as memories in front of it.

    Earlier turns are read with every message; what was found for them is not. LlamaIndex's own ``ContextChatEngine``
    and ``CondensePlusContextChatEngine`` also take the retriever and the language model of this package; they put
    what was found into the system's text instead, which is another one with every message.

    Parameters
    ----------
    retriever : BaseRetriever
        Any; nodes without a memory are compressed on the way, and not kept.
    llm : CompressedMemoryLLM
        The model. With ``history="memory"`` it reads every earlier turn once and keeps its memory.
    memory : BaseMemory, optional
        Where LlamaIndex keeps the messages; by default all of them, in a list.
    system_prompt : str, optional
        What the model is told before the first turn.
    node_postprocessors : sequence of BaseNodePostprocessor
        What nodes pass between being found and being read.
    callback_manager : CallbackManager, optional
        LlamaIndex's.

    Raises
    ------
    InputError
        If the model is one that reads no memories.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: CompressedMemoryLLM,
        *,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._retriever = retriever
        self._llm = reading_llm(None, llm, {})
        self._memory = memory or ChatMemoryBuffer.from_defaults(token_limit=sys.maxsize)
        self._system = [ChatMessage(system_prompt, role=MessageRole.SYSTEM)] if system_prompt else []
        self._node_postprocessors = list(node_postprocessors)
        self.callback_manager = callback_manager or CallbackManager([])
        for postprocessor in self._node_postprocessors:
            postprocessor.callback_manager = self.callback_manager

    @classmethod
    def from_library(
        cls,
        library: Library | str | Path,
        k: int = 4,
        *,
        retrieval: str = "hybrid",
        rerank: str = "none",
        filters: MetadataFilters | Mapping[str, Any] | None = None,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        callback_manager: CallbackManager | None = None,
        **options: Any,
    ) -> CompressedMemoryChatEngine:
        """Return a chat engine of a library.

        Parameters
        ----------
        library, k, retrieval, rerank, filters
            As in :class:`~ctxdocs.integrations.llama_index.CompressedMemoryRetriever`.
        memory, system_prompt, node_postprocessors, callback_manager
            As in the class.
        **options
            Parameters of :class:`~ctxdocs.integrations.llama_index.CompressedMemoryLLM`, such as ``history`` and
            ``max_new_tokens``.

        Raises
        ------
        LibraryError
            If there is no library.
        InputError
            If a setting is out of range.
        """
        shared = shared_library(library)
        how: dict[str, Any] = {"retrieval": retrieval, "rerank": rerank, "filters": filters}
        return cls(
            CompressedMemoryRetriever(shared, k, callback_manager=callback_manager, **how),
            CompressedMemoryLLM(library=shared, **options),
            memory=memory,
            system_prompt=system_prompt,
            node_postprocessors=node_postprocessors,
            callback_manager=callback_manager,
        )

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message; ``chat_history`` takes the place of the messages so far."""
        nodes, messages = self._prepared(message, chat_history)
        reply = self._llm.chat(messages, contents=_contents(nodes)).message
        self._memory.put(messages[-1])
        self._memory.put(reply)
        return AgentChatResponse(reply.content or "", _found(message, nodes), nodes)

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Like :meth:`chat`, piece by piece."""
        nodes, messages = self._prepared(message, chat_history)
        stream = self._llm.stream_chat(messages, contents=_contents(nodes))
        self._memory.put(messages[-1])
        response = StreamingAgentChatResponse(chat_stream=stream, sources=_found(message, nodes), source_nodes=nodes)
        # LlamaIndex's response hands pieces on from a thread that also writes the answer to the history.
        thread = Thread(target=response.write_response_to_history, args=(self._memory,))
        response.write_response_to_history_thread = thread
        thread.start()
        return response

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Like :meth:`chat`, in threads."""
        nodes, messages = await self._aprepared(message, chat_history)
        reply = (await self._llm.achat(messages, contents=_contents(nodes))).message
        await self._memory.aput(messages[-1])
        await self._memory.aput(reply)
        return AgentChatResponse(reply.content or "", _found(message, nodes), nodes)

    @trace_method("chat")
    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Like :meth:`stream_chat`, in threads."""
        nodes, messages = await self._aprepared(message, chat_history)
        stream = await self._llm.astream_chat(messages, contents=_contents(nodes))
        await self._memory.aput(messages[-1])
        response = StreamingAgentChatResponse(achat_stream=stream, sources=_found(message, nodes), source_nodes=nodes)
        task = asyncio.create_task(response.awrite_response_to_history(self._memory))
        response.awrite_response_to_history_task = task
        return response

    def _prepared(
        self, message: str, chat_history: list[ChatMessage] | None
    ) -> tuple[list[NodeWithScore], list[ChatMessage]]:
        """Return what is found for a message, and the conversation that ends with it."""
        if chat_history is not None:
            self._memory.set(chat_history)
        nodes = self._retriever.retrieve(message)
        for postprocessor in self._node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, QueryBundle(message))
        return nodes, [*self._system, *self._memory.get(), ChatMessage(message)]

    async def _aprepared(
        self, message: str, chat_history: list[ChatMessage] | None
    ) -> tuple[list[NodeWithScore], list[ChatMessage]]:
        if chat_history is not None:
            await self._memory.aset(chat_history)
        nodes = await self._retriever.aretrieve(message)
        for postprocessor in self._node_postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, QueryBundle(message))
        return nodes, [*self._system, *await self._memory.aget(), ChatMessage(message)]

    def reset(self) -> None:
        """Forget the messages so far."""
        self._memory.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The messages so far."""
        return self._memory.get_all()


def _contents(nodes: Sequence[NodeWithScore]) -> list[str]:
    return [found.node.get_content(MetadataMode.LLM) for found in nodes]


def _found(message: str, nodes: list[NodeWithScore]) -> list[ToolOutput]:
    return [ToolOutput(tool_name="retriever", content=str(nodes), raw_input={"message": message}, raw_output=nodes)]
