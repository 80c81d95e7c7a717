"""Compress the example corpus once, then ask it questions: python examples/quickstart.py."""

import tempfile
from pathlib import Path

import ctxdocs

CORPUS = Path(__file__).parent / "corpus"
QUESTION = "How long is the causeway to Tarrow Head?"


def main() -> None:
    """Compress, search, and ask in the three modes."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctxdocs.Library.create(Path(folder) / "library")
        report = library.add(CORPUS)
        print(
            f"{report.documents} documents: {report.source_tokens} tokens of text became {report.memory_slots} "
            f"memory slots, {report.compression_ratio:.1f} times fewer"
        )
        print(f"a second run: {library.add(CORPUS).unchanged} documents unchanged, nothing compressed")

        best = library.search(QUESTION, k=1)[0]
        print(f"\n{QUESTION}\nbest chunk, from {Path(best.document).name}: {' '.join(best.text.split())[:120]} ...")

        for mode in ("memory", "text", "none"):
            answer = library.ask(QUESTION, k=2, mode=mode, max_new_tokens=16)
            read = f"{answer.memory_slots} memory slots and {answer.prompt_tokens} tokens"
            print(
                f"\nreading {mode}: {answer.text!r}\n  ({read}, first token after {answer.time_to_first_token:.3f} s)"
            )


if __name__ == "__main__":
    main()
