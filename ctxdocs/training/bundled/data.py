"""Preparing the data: split by title, tokenise, pack as 16-bit ids that are read through memory maps."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs import datasets
from ctxdocs.datasets.splits import SPLITS
from ctxdocs.datasets.tokenising import BatchEncoder
from ctxdocs.datasets.tokens import TokenSequences
from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.cloze import CONTEXT_CHARACTERS, cloze_questions
from ctxdocs.training.bundled.tokenizer import train_tokenizer

#: Share that goes to validation, and share that goes to test.
HELD_OUT = 0.02
ANSWER_CHARACTERS = 200
#: Answers a question about something that is not in the documents.
NOT_FOUND = "not in the documents"
_TOKENIZER_CHARACTERS = 6_000_000  # per source
_TOKENIZER_DOCUMENT = 80_000  # characters of one document


@dataclass(frozen=True)
class Questions:
    """Questions about contexts; several may share one.

    Parameters
    ----------
    contexts, questions, answers : TokenSequences
        Token ids; question ``i`` is answered by ``answers[i]``.
    context_of : numpy.ndarray
        int64 ``[questions]``, index into ``contexts``; ascending.
    """

    contexts: TokenSequences
    questions: TokenSequences
    answers: TokenSequences
    context_of: NDArray[np.int64]

    def save(self, stem: Path) -> None:
        """Write the four arrays under names that start with ``stem``."""
        for name in ("contexts", "questions", "answers"):
            getattr(self, name).save(Path(f"{stem}.{name}"))
        np.save(f"{stem}.context_of.npy", self.context_of)

    @classmethod
    def load(cls, stem: Path) -> Questions:
        """Map what :meth:`save` wrote."""
        packed = {name: TokenSequences.load(Path(f"{stem}.{name}")) for name in ("contexts", "questions", "answers")}
        return cls(context_of=np.load(f"{stem}.context_of.npy"), **packed)


@dataclass(frozen=True)
class Split:
    """One of the three splits: running text by source, questions, and what answers one that a document leaves open.

    Parameters
    ----------
    texts : dict of str to TokenSequences
        By source.
    questions, cloze : Questions
        With their contexts: those that people asked, and those that were made of running text.
    not_found : numpy.ndarray
        int64, token ids of :data:`NOT_FOUND`.
    """

    texts: dict[str, TokenSequences]
    questions: Questions
    cloze: Questions
    not_found: NDArray[np.int64]


def split_of(title: str) -> datasets.Split:
    """Return the split that a title belongs to: 2 % validation, 2 % test, the rest train, by its hash."""
    return datasets.split_of(title, validation=HELD_OUT, test=HELD_OUT)


def load_split(cache: Path, split: str) -> Split:
    """Map one split of prepared data."""
    from tokenizers import Tokenizer

    texts = {source.name: TokenSequences.load(cache / f"{split}.{source.name}") for source in sources.TEXTS}
    not_found = Tokenizer.from_file(str(cache / "tokenizer.json")).encode(f" {NOT_FOUND}").ids
    questions, cloze = (Questions.load(cache / f"{split}.{kind}") for kind in ("questions", "cloze"))
    return Split(texts, questions, cloze, np.array(not_found, dtype=np.int64))


def prepare(data: Path, cache: Path, vocabulary: int, tokenizer_file: Path | None = None) -> None:
    """Write tokenizer and packed splits to ``cache``, unless they are there already.

    Parameters
    ----------
    data : Path
        Folder with ``lm/`` and ``qa/``.
    cache : Path
        Created if absent. ``prepared.json`` is written last: token counts, and the held-out titles of each split.
    vocabulary : int
        Size of the tokenizer's vocabulary, at most 65,536.
    tokenizer_file : Path, optional
        ``tokenizer.json`` of an earlier run; else a tokenizer is trained.
    """
    if (cache / "prepared.json").is_file():
        return
    from tokenizers import Tokenizer

    cache.mkdir(parents=True, exist_ok=True)
    if tokenizer_file is None:
        tokenizer = train_tokenizer(_tokenizer_texts(data), vocabulary)
    else:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.save(str(cache / "tokenizer.json"))
    encoder = BatchEncoder(tokenizer)
    summary: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size(), "tokens": {}, "held_out_titles": {}}
    cloze: dict[datasets.Split, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    rng = np.random.default_rng(0)
    for source in sources.TEXTS:
        documents = defaultdict(list)
        titles = defaultdict(set)
        for title, text in sources.read_texts(data, source):
            documents[split_of(title)].append(text)
            titles[split_of(title)].add(title)
            if source.cloze == "made":
                cloze[split_of(title)] += cloze_questions(text, rng)
        for split in SPLITS:
            packed = TokenSequences.pack(encoder.encode(documents[split]))
            packed.save(cache / f"{split}.{source.name}")
            summary["tokens"][f"{split}.{source.name}"] = len(packed.tokens)
        summary["held_out_titles"][source.name] = {split: sorted(titles[split]) for split in SPLITS[1:]}
    for kind, splits in (("questions", _split_questions(data)), ("cloze", cloze)):
        for split, records in splits.items():
            questions = _encode_questions(encoder, records)
            questions.save(cache / f"{split}.{kind}")
            summary["tokens"][f"{split}.{kind}"] = sum(
                len(packed.tokens) for packed in (questions.contexts, questions.questions, questions.answers)
            )
    partial = cache / "prepared.json.part"
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(cache / "prepared.json")


def _tokenizer_texts(data: Path) -> Iterator[str]:
    """Yield training texts, the same number of characters from every source."""
    for source in sources.TEXTS:
        budget = _TOKENIZER_CHARACTERS
        for title, text in sources.read_texts(data, source):
            if split_of(title) == "train":
                yield text[: min(budget, _TOKENIZER_DOCUMENT)]
                budget -= min(len(text), _TOKENIZER_DOCUMENT)
                if budget <= 0:
                    break


def _split_questions(data: Path) -> dict[datasets.Split, list[tuple[str, str, str]]]:
    """Return ``(context, question, answer)`` by split; by the context's hash where a record has no title."""
    records: dict[datasets.Split, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    for source in sources.QUESTIONS:
        for record in sources.read_questions(data, source):
            context, answer = record["context"], record["answers"][0].strip()
            cut = _cut_context(context, answer)
            if cut and answer and len(answer) <= ANSWER_CHARACTERS:
                split = split_of(record["title"] or context)
                records[split].append((cut, record["question"].strip(), answer))
    return records


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


def _encode_questions(encoder: BatchEncoder, records: Sequence[tuple[str, str, str]]) -> Questions:
    contexts = {context: None for context, _, _ in records}
    index = {context: number for number, context in enumerate(contexts)}
    records = sorted(records, key=lambda record: index[record[0]])
    return Questions(
        contexts=TokenSequences.pack(encoder.encode(contexts)),
        questions=TokenSequences.pack(encoder.encode((" " + question for _, question, _ in records))),
        answers=TokenSequences.pack(encoder.encode((" " + answer for _, _, answer in records))),
        context_of=np.array([index[context] for context, _, _ in records], dtype=np.int64),
    )
