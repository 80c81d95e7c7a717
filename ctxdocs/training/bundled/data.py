"""Preparing the data: split by title, clean, tokenise, pack as 16-bit ids that are read through memory maps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ctxdocs.datasets.records import Document, Question
from ctxdocs.datasets.splits import SPLITS
from ctxdocs.datasets.tokenising import BatchEncoder
from ctxdocs.datasets.tokens import TokenSequences
from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.cloze import cloze_questions
from ctxdocs.training.bundled.records import CLEAN, records_of, write_clean, write_splits
from ctxdocs.training.bundled.tokenizer import train_tokenizer

#: Answers a question about something that is not in the documents.
NOT_FOUND = "not in the documents"
_KINDS = ("questions", "cloze")
#: Context, question and answer.
_Asked: TypeAlias = tuple[str, str, str]
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


def load_split(cache: Path, split: str) -> Split:
    """Map one split of prepared data."""
    from tokenizers import Tokenizer

    texts = {source.name: TokenSequences.load(cache / f"{split}.{source.name}") for source in sources.TEXTS}
    not_found = Tokenizer.from_file(str(cache / "tokenizer.json")).encode(f" {NOT_FOUND}").ids
    questions, cloze = (Questions.load(cache / f"{split}.{kind}") for kind in ("questions", "cloze"))
    return Split(texts, questions, cloze, np.array(not_found, dtype=np.int64))


def prepare(data: Path, cache: Path, vocabulary: int, tokenizer_file: Path | None = None) -> None:
    """Write tokenizer and packed splits to ``cache``, unless they are there already.

    Training texts are those of :func:`ctxdocs.training.bundled.records.write_clean`.

    Parameters
    ----------
    data : Path
        Folder with ``lm/`` and ``qa/``.
    cache : Path
        Created if absent. ``prepared.json`` is written last: token counts, the held-out titles of each split, and what
        training texts shared with them and lost.
    vocabulary : int
        Size of the tokenizer's vocabulary, at most 65,536.
    tokenizer_file : Path, optional
        ``tokenizer.json`` of an earlier run; else a tokenizer is trained.
    """
    if (cache / "prepared.json").is_file():
        return
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        records = Path(temporary)
        write_splits(data, records)
        report = write_clean(records)
        folders = {str(split): records / (CLEAN if split == "train" else split) for split in SPLITS}
        summary = _pack(folders, cache, vocabulary, tokenizer_file)
    summary["overlap"] = {
        "words": report.n,
        "records": report.train_records,
        "removed": report.train_records - report.written,
        "shortened": report.shortened,
    }
    partial = cache / "prepared.json.part"
    partial.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(cache / "prepared.json")


def _pack(folders: Mapping[str, Path], cache: Path, vocabulary: int, tokenizer_file: Path | None) -> dict[str, Any]:
    """Tokenise the records of all splits."""
    from tokenizers import Tokenizer

    if tokenizer_file is None:
        tokenizer = train_tokenizer(_tokenizer_texts(folders["train"]), vocabulary)
    else:
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.save(str(cache / "tokenizer.json"))
    encoder = BatchEncoder(tokenizer)
    summary: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size(), "tokens": {}, "held_out_titles": {}}
    asked: dict[str, dict[str, list[_Asked]]] = {kind: {split: [] for split in folders} for kind in _KINDS}
    rng = np.random.default_rng(0)
    for source in sources.TEXTS:
        titles: dict[str, list[str]] = {}
        for split, folder in folders.items():
            documents = [each for each in records_of(folder, source.name) if isinstance(each, Document)]
            packed = TokenSequences.pack(encoder.encode(document.text for document in documents))
            packed.save(cache / f"{split}.{source.name}")
            summary["tokens"][f"{split}.{source.name}"] = len(packed.tokens)
            titles[split] = sorted({document.title for document in documents})
            if source.cloze == "made":
                asked["cloze"][split] += (
                    made for document in documents for made in cloze_questions(document.text, rng)
                )
        summary["held_out_titles"][source.name] = {split: titles[split] for split in SPLITS[1:]}
    for split, folder in folders.items():
        records = (record for source in sources.QUESTIONS for record in records_of(folder, source.name))
        asked["questions"][split] = [
            (record.contexts[0], record.question, record.answers[0])
            for record in records
            if isinstance(record, Question)
        ]
    for kind, splits in asked.items():
        for split, found in splits.items():
            questions = _encode_questions(encoder, found)
            questions.save(cache / f"{split}.{kind}")
            summary["tokens"][f"{split}.{kind}"] = sum(
                len(packed.tokens) for packed in (questions.contexts, questions.questions, questions.answers)
            )
    return summary


def _tokenizer_texts(folder: Path) -> Iterator[str]:
    """Yield training texts, the same number of characters from every source."""
    for source in sources.TEXTS:
        budget = _TOKENIZER_CHARACTERS
        for record in records_of(folder, source.name):
            if budget > 0 and isinstance(record, Document):
                yield record.text[: min(budget, _TOKENIZER_DOCUMENT)]
                budget -= min(len(record.text), _TOKENIZER_DOCUMENT)


def _encode_questions(encoder: BatchEncoder, records: Sequence[_Asked]) -> Questions:
    contexts = {context: None for context, _, _ in records}
    index = {context: number for number, context in enumerate(contexts)}
    records = sorted(records, key=lambda record: index[record[0]])
    return Questions(
        contexts=TokenSequences.pack(encoder.encode(contexts)),
        questions=TokenSequences.pack(encoder.encode((" " + question for _, question, _ in records))),
        answers=TokenSequences.pack(encoder.encode((" " + answer for _, _, answer in records))),
        context_of=np.array([index[context] for context, _, _ in records], dtype=np.int64),
    )
