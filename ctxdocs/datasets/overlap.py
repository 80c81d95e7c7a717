"""Does training text share runs of words with what a model is tested on? Finding it, and taking it out."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ctxdocs.datasets.files import PathsLike, find_files, is_records_file, writing
from ctxdocs.datasets.ngrams import NgramHasher, NgramIndex
from ctxdocs.datasets.reading import OnError, Skipped, read_records, record_line
from ctxdocs.datasets.records import Document, Question, Record, answer_spans, holds_answer
from ctxdocs.datasets.words import word_spans, words_of
from ctxdocs.errors import InputError

#: What of a test question counts: the sentences that hold its answer, or its contexts as a whole.
Compare = Literal["answers", "contexts"]
#: What is taken out of the training data: whole records, or the paragraphs of documents that share something.
Remove = Literal["records", "paragraphs"]

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_ROUNDS = 5


@dataclass(frozen=True)
class Overlap:
    """A training record that shares runs of words with test records.

    Parameters
    ----------
    train, test : str
        Places, ``"file:line"``; of the test records the first.
    runs : int
        How many runs of n words it shares.
    words : str
        The first of them.
    """

    train: str
    test: str
    runs: int
    words: str


@dataclass(frozen=True)
class Shared:
    """A test record that shares runs of words with training records.

    Parameters
    ----------
    test : str
        Place, ``"file:line"``.
    runs : int
        Places in its compared texts at which a run begins.
    shared : int
        At how many of them the run stands in a training record, too.
    """

    test: str
    runs: int
    shared: int


@dataclass
class OverlapReport:
    """What :func:`check_overlap` found.

    Parameters
    ----------
    n : int
        Words per run.
    test_records, test_runs : int
        Records tested against, and their different runs.
    too_short : int
        Test records of fewer than n words, which nothing can be said of.
    train_records : int
        Records looked through.
    shared_runs : int
        Different runs of the test records that training records share.
    overlaps : list of Overlap
        One per training record that shares something.
    shared : list of Shared
        One per test record that shares something.
    written, shortened : int
        Training records written out clean, and how many of them lost paragraphs.
    skipped : int
        Lines that held no record.
    """

    n: int
    test_records: int = 0
    test_runs: int = 0
    too_short: int = 0
    train_records: int = 0
    shared_runs: int = 0
    overlaps: list[Overlap] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    written: int = 0
    shortened: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return asdict(self)


def check_overlap(
    train: PathsLike,
    test: PathsLike,
    *,
    n: int = 13,
    compare: Compare = "answers",
    output: str | Path | None = None,
    remove: Remove = "records",
    on_error: OnError = "raise",
) -> OverlapReport:
    """Look for runs of ``n`` words, lower-cased and without punctuation, that stand in both.

    Training records count with all their text. Test documents do so too. A test question counts with the sentences
    that hold its answer, each widened to ``n`` words where it has fewer; if the answer stands nowhere as it is (a yes,
    a number worked out), with its relevant contexts.

    Parameters
    ----------
    train, test : path or iterable of paths
        Files of records, or folders of them.
    n : int, optional
        Words per run.
    compare : {"answers", "contexts"}, optional
        ``"contexts"``: a test question counts with all its relevant contexts.
    output : path, optional
        Where the training records that share nothing are written: a file of JSON lines, or else a folder, in which
        every file keeps its name.
    remove : {"records", "paragraphs"}, optional
        ``"paragraphs"``: a document is written without its paragraphs that share something.
    on_error : {"raise", "skip"}, optional
        As for :func:`read_records`.

    Raises
    ------
    InputError
        If an argument cannot be used, or no test record is long enough to be compared.
    """
    if compare not in ("answers", "contexts") or remove not in ("records", "paragraphs"):
        raise InputError(
            f"compare is {compare!r} and remove is {remove!r}", "'answers' or 'contexts', 'records' or 'paragraphs'"
        )
    report, skipped = OverlapReport(n), Skipped()
    index, places = _index(read_records(test, on_error=on_error, skipped=skipped), compare, report)
    report.test_runs = len(index)
    is_shared = np.zeros(len(index), dtype=bool)
    files = find_files(train)
    with _writers(output, files) as writer_of:
        for file in files:
            write = writer_of(file)
            for record in read_records(file, on_error=on_error, skipped=skipped):
                report.train_records += 1
                found = _shared(record, index)
                if found:
                    _, run, words = found[0]
                    report.overlaps.append(Overlap(record.place, places[index.owner(run)], len(found), words))
                    is_shared[[run for _, run, _ in found]] = True
                clean = record if not found else _cleaned(record, index) if remove == "paragraphs" else None
                if write is not None and clean is not None:
                    write.write(record_line(clean))
                    report.written += 1
                    report.shortened += clean is not record
    report.shared_runs = int(is_shared.sum())
    report.shared = _shared_by_test(index, places, is_shared)
    report.skipped = skipped.count
    return report


def compared_texts(record: Record, n: int, compare: Compare = "answers") -> list[str]:
    """Return the texts of a test record that no training text may repeat. See :func:`check_overlap`."""
    if isinstance(record, Document):
        return [record.text]
    contexts = [record.contexts[index] for index in record.relevant] or list(record.contexts)
    if compare == "contexts" or not any(holds_answer(text, record.answers) for text in contexts):
        return contexts or [record.question]
    return [sentence for text in contexts for sentence in _answer_sentences(text, record.answers, n)]


def _answer_sentences(text: str, answers: Sequence[str], n: int) -> Iterator[str]:
    ends = [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    starts = [0, *ends[:-1]]
    # An answer may reach over what looks like the end of a sentence: "the U.S. Army".
    sentences = {
        (starts[bisect_right(starts, begin) - 1], ends[bisect_left(ends, stop)]): None
        for begin, stop in answer_spans(text, answers)
    }
    words = word_spans(text) if sentences else []
    for start, end in sentences if words else ():
        first = sum(begin < start for begin, _ in words)
        after = sum(begin < end for begin, _ in words)
        missing = max(n - (after - first), 0)
        first = max(min(first - missing // 2, len(words) - n), 0)
        after = min(max(after, first + n), len(words))
        yield text[words[first][0] : words[after - 1][1]]


def _index(records: Iterable[Record], compare: Compare, report: OverlapReport) -> tuple[NgramIndex, list[str]]:
    texts: list[list[str]] = []
    places: list[str] = []
    for record in records:
        report.test_records += 1
        long_enough = False
        for words in map(words_of, compared_texts(record, report.n, compare)):
            if len(words) >= report.n:
                long_enough = True
                texts.append(words)
                places.append(record.place)
        report.too_short += not long_enough
    if not texts:
        raise InputError(f"no test record has {report.n} words", "compare shorter runs (n)")
    return NgramIndex(NgramHasher(report.n), texts), places


def _shared_by_test(index: NgramIndex, places: Sequence[str], is_shared: NDArray[np.bool_]) -> list[Shared]:
    counts = index.counts(np.ones_like(is_shared)).tolist(), index.counts(is_shared).tolist()
    runs: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for place, in_all, some in zip(places, *counts, strict=True):  # a question is compared by several texts
        runs[place] += in_all
        shared[place] += some
    return [Shared(place, runs[place], count) for place, count in shared.items() if count]


def _shared(record: Record, index: NgramIndex) -> list[tuple[int, int, str]]:
    texts = (record.text,) if isinstance(record, Document) else (*record.contexts, record.question)
    return [found for text in texts for found in index.find(text)]


def _cleaned(record: Record, index: NgramIndex) -> Document | None:
    """Return a document without the paragraphs that share a run; None if nothing is left, or for a question."""
    if isinstance(record, Question):
        return None
    text = record.text
    for _ in range(_ROUNDS):  # what stood around a paragraph may share a run, too, once it is gone
        found = index.find(text)
        if not found:
            return replace(record, text=text) if text.strip() else None
        words = word_spans(text)
        spans = [(words[word][0], words[word + index.hasher.n - 1][1]) for word, _, _ in found]
        text = _without(text, spans)
    return None


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    kept: list[str] = []
    start = 0
    for end in [*(match.end() for match in _PARAGRAPH_END.finditer(text)), len(text)]:
        if not any(begin < end and start < stop for begin, stop in spans):
            kept.append(text[start:end])
        start = end
    return "".join(kept).rstrip()


@contextlib.contextmanager
def _writers(output: str | Path | None, files: list[Path]) -> Iterator[Callable[[Path], IO[bytes] | None]]:
    """Give the file to write to for every file read: one for all, one of the same name in a folder, or none."""
    with contextlib.ExitStack() as stack:
        if output is None:
            yield lambda _: None
        elif is_records_file(output := Path(output)):
            whole = stack.enter_context(writing(output))
            yield lambda _: whole
        else:
            names = [file.name for file in files]
            if len(set(names)) < len(names):
                raise InputError("two training files have the same name", "write to one file: --write-clean OUT.jsonl")
            if output.resolve() in {file.resolve().parent for file in files}:
                raise InputError(f"{output} holds the training files themselves", "write to another folder")
            yield lambda file: stack.enter_context(writing(output / file.name))
