"""A LangGraph graph whose memories travel as references: python examples/langgraph_rag.py.

Needs ``pip install langgraph``. The first graph retrieves and generates. In the second one the library is a tool: an
agent decides to search, the tool hands back references, and the library's model reads the memories. That model calls no
tools itself, so the agent may be any model that does (``model.bind_tools([search])``); here a node stands for it.
"""

import tempfile
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import create_retriever_tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from typing_extensions import TypedDict

import ctxdocs
from ctxdocs.integrations.langchain import ChatCompressedMemory, CompressedMemoryRetriever, format_memories

CORPUS = Path(__file__).parent / "corpus" / "handbook"
QUESTION = "How long is the causeway to Tarrow Head?"


class State(TypedDict):
    """What the nodes of the first graph hand on; documents bring references along, which checkpoints keep as text."""

    question: str
    documents: list[Document]
    answer: AIMessage


def retrieve_and_generate(library: ctxdocs.Library):
    """Return a graph that searches, then has the memories of what was found read."""
    retriever = CompressedMemoryRetriever(library=library, k=2)
    model = ChatCompressedMemory(library=library, max_tokens=16)

    def retrieve(state: State):
        return {"documents": retriever.invoke(state["question"])}

    def generate(state: State):
        messages = [("system", format_memories(state["documents"])), ("human", state["question"])]
        return {"answer": model.invoke(messages)}

    return StateGraph(State).add_sequence([retrieve, generate]).add_edge(START, "retrieve").compile()


def with_a_tool(library: ctxdocs.Library):
    """Return a graph in which an agent searches by a tool, and the library's model reads what the tool hands back."""
    # With content="text", the default, the tool hands back texts, for the agent itself to read.
    retriever = CompressedMemoryRetriever(library=library, k=2, content="memory")
    search = create_retriever_tool(retriever, "search_handbook", "Searches the station's handbook.")
    model = ChatCompressedMemory(library=library, max_tokens=16)

    def agent(state: MessagesState):
        call = {"name": search.name, "args": {"query": state["messages"][-1].text}, "id": "1"}
        return {"messages": [AIMessage("", tool_calls=[call])]}

    def answer(state: MessagesState):
        question = next(message for message in state["messages"] if isinstance(message, HumanMessage))
        found = next(message for message in reversed(state["messages"]) if isinstance(message, ToolMessage))
        return {"messages": [model.invoke([("system", found.text), question])]}

    nodes = [("agent", agent), ("search", ToolNode([search])), ("answer", answer)]
    return StateGraph(MessagesState).add_sequence(nodes).add_edge(START, "agent").compile()


def main() -> None:
    """Compress the handbook; ask both graphs."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        library.add(CORPUS)

        state = retrieve_and_generate(library).invoke({"question": QUESTION})
        read = state["answer"].usage_metadata
        slots = read["input_token_details"]["memory_slots"]
        print(f"{QUESTION} -> {state['answer'].text} ({slots} of {read['input_tokens']} were memory slots)")

        messages = with_a_tool(library).invoke({"messages": [HumanMessage(QUESTION)]})["messages"]
        for message in messages:
            print(f"{message.type}: {message.text or message.tool_calls[0]['args']}")
        print("read:", *(Path(source["source"]).name for source in messages[-1].response_metadata["sources"]))


if __name__ == "__main__":
    main()
