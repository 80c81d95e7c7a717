"""What the splits of the bundled model's data are made of, as records; training shares no long run of words with tests.

``python -m ctxdocs.training.bundled.records --data DATA --output DIR`` writes them, to be looked at and compared.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from ctxdocs import datasets
from ctxdocs.datasets.overlap import OverlapReport, check_overlap
from ctxdocs.datasets.reading import read_records, write_records
from ctxdocs.datasets.records import Document, Question, Record
from ctxdocs.datasets.splits import SPLITS
from ctxdocs.errors import CtxdocsError
from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.cloze import CONTEXT_CHARACTERS

#: Share that goes to validation, and share that goes to test.
HELD_OUT = 0.02
ANSWER_CHARACTERS = 200
#: Folder of training records without what they share with those that are held out.
CLEAN = "clean"


def split_of(title: str) -> datasets.Split:
    """Return the split that a title belongs to: 2 % validation, 2 % test, the rest train, by its hash."""
    return datasets.split_of(title, validation=HELD_OUT, test=HELD_OUT)


def write_splits(data: Path, folder: Path) -> None:
    """Write ``SPLIT/SOURCE.jsonl`` to a folder, for the three splits and all sources that have something in them.

    Parameters
    ----------
    data : Path
        Folder with ``lm/`` and ``qa/``.
    folder : Path
        Created if absent.
    """
    everything = {source.name: _documents(data, source) for source in sources.TEXTS}
    everything |= {source.name: _questions(data, source) for source in sources.QUESTIONS}
    for name, found in everything.items():
        parts: dict[datasets.Split, list[Record]] = defaultdict(list)
        for split, record in found:
            parts[split].append(record)
        for split, records in parts.items():
            write_records(folder / split / f"{name}.jsonl", records)


def write_clean(folder: Path) -> OverlapReport:
    """Write to ``clean/`` what is in ``train/`` without what shares 13 words in a row with what is held out.

    Documents lose the paragraphs that do, questions are left out.

    Parameters
    ----------
    folder : Path
        What :func:`write_splits` wrote.
    """
    held_out = [folder / split for split in SPLITS[1:] if (folder / split).is_dir()]
    if not held_out:
        (folder / SPLITS[0]).rename(folder / CLEAN)
        return OverlapReport(0)
    return check_overlap(folder / SPLITS[0], held_out, compare="contexts", output=folder / CLEAN, remove="paragraphs")


def records_of(folder: Path, name: str) -> Iterator[Record]:
    """Yield the records of one source, of a split's folder or of the clean one; none where it has none."""
    file = folder / f"{name}.jsonl"
    if file.is_file() and file.stat().st_size:
        yield from read_records(file)


def _documents(data: Path, source: sources.TextSource) -> Iterator[tuple[datasets.Split, Record]]:
    for title, text in sources.read_texts(data, source):
        yield split_of(title), Document(text, title, source.name)


def _questions(data: Path, source: sources.QuestionSource) -> Iterator[tuple[datasets.Split, Record]]:
    """Yield questions about contexts that were cut; split by the context's hash where a record has no title."""
    for record in sources.read_questions(data, source):
        context, answer = record["context"], record["answers"][0].strip()
        cut = _cut_context(context, answer)
        if cut and answer and len(answer) <= ANSWER_CHARACTERS:
            title = record["title"] or ""
            question = Question(record["question"].strip(), (answer,), (cut,), (0,), title, source=source.name)
            yield split_of(title or context), question


def _cut_context(context: str, answer: str) -> str | None:
    """Return a context short enough for one memory that still holds the answer, or None if it cannot be told."""
    if len(context) <= CONTEXT_CHARACTERS:
        return context
    at = context.find(answer)
    if at < 0:
        return None
    # A grid of half-overlapping stretches, so that questions about one context go on sharing it.
    half = CONTEXT_CHARACTERS // 2
    start = min(max(0, (at + len(answer) // 2) // half * half - half // 2), len(context) - CONTEXT_CHARACTERS)
    start = context.rfind(" ", 0, start) + 1 if start else 0
    cut = context[start : start + CONTEXT_CHARACTERS].rpartition(" ")[0]
    return cut if answer in cut else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the records of all splits. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ctxdocs.training.bundled.records", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with lm/ and qa/ (JSON lines)")
    parser.add_argument("--output", type=Path, required=True, help="gets train/, validation/ and test/")
    options = parser.parse_args(arguments)
    try:
        write_splits(options.data, options.output)
    except CtxdocsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
