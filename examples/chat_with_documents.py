"""A conversation over documents, its history kept as memory: python examples/chat_with_documents.py.

Every question is answered behind the memory of the conversation so far and those of the chunks that were found for it:
what is read grows by slots, not by what was said. Given a folder, it asks for questions instead:

    python examples/chat_with_documents.py FOLDER
"""

import sys
import tempfile
from pathlib import Path

import ctxdocs
from ctxdocs.conversation import Conversation

CORPUS = Path(__file__).parent / "corpus" / "handbook"
QUESTIONS = ("How long is the causeway to Tarrow Head?", "When is it under water?", "Who is on the night watch?")


def ask(conversation: Conversation, question: str) -> None:
    """Print an answer as it is written, and what was read for it."""
    print(f"\n> {question}")
    pieces = conversation.ask(question)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            answer = end.value
            break
    print(f"\n  {answer.prompt_tokens} tokens and {answer.memory_slots} slots were read, first token after ", end="")
    print(f"{answer.time_to_first_token:.2f} s; from {', '.join({Path(hit.document).name for hit in answer.sources})}")
    said = conversation.memory()
    print(f"  the conversation so far: {said.source_tokens} tokens in {said.slots} slots")


def main(*arguments: str) -> None:
    """Talk about a folder; leave, and go on with the conversation later."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        library.add(arguments[0] if arguments else CORPUS)
        conversation = Conversation(library.compressor, library, k=2, max_new_tokens=24)
        if arguments:
            while question := input("\nask, or end with an empty line: ").strip():
                ask(conversation, question)
            return
        *first, last = QUESTIONS
        for question in first:
            ask(conversation, question)

        # Another day, maybe in another process.
        kept = Path(folder) / "conversation.safetensors"
        conversation.save(kept)
        later = Conversation(library.compressor, library, k=2, max_new_tokens=24)
        later.load(kept)
        ask(later, last)
        print(f"\n{len(later.turns)} turns, kept in {kept.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
