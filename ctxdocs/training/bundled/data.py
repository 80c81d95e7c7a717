"""Preparing the data: split by title, tokenise, pack as 16-bit ids that are read through memory maps."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.tokenizer import SPECIAL_TOKENS, train_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
#: Of 10,000 hash values, how many go to validation, and how many to test.
HELD_OUT = 200
#: Contexts are cut to this many characters around the answer: what one memory is trained to hold.
CONTEXT_CHARACTERS = 800
ANSWER_CHARACTERS = 200
_TOKENIZER_CHARACTERS = 6_000_000  # per source
_ENCODED_AT_ONCE = 512
_LONGEST_PIECE = 20_000  # characters; long books are tokenised in pieces, in parallel


@dataclass(frozen=True)
class Packed:
    """Many token sequences in one array, so that they can be memory-mapped.

    Parameters
    ----------
    tokens : numpy.ndarray
        uint16 ``[total]``.
    offsets : numpy.ndarray
        int64 ``[sequences + 1]``.
    """

    tokens: NDArray[np.uint16]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per sequence."""
        return np.diff(self.offsets)

    @classmethod
    def pack(cls, sequences: Iterable[Sequence[int]]) -> Packed:
        """Join sequences."""
        arrays = [np.asarray(sequence, dtype=np.uint16) for sequence in sequences]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(np.concatenate(arrays) if arrays else np.empty(0, np.uint16), offsets)

    def save(self, stem: Path) -> None:
        """Write ``stem.tokens.npy`` and ``stem.offsets.npy``."""
        np.save(f"{stem}.tokens.npy", self.tokens)
        np.save(f"{stem}.offsets.npy", self.offsets)

    @classmethod
    def load(cls, stem: Path) -> Packed:
        """Map what :meth:`save` wrote."""
        return cls(np.load(f"{stem}.tokens.npy", mmap_mode="r"), np.load(f"{stem}.offsets.npy"))


@dataclass(frozen=True)
class Questions:
    """Questions about contexts; several may share one.

    Parameters
    ----------
    contexts, questions, answers : Packed
        Token ids; question ``i`` is answered by ``answers[i]``.
    context_of : numpy.ndarray
        int64 ``[questions]``, index into ``contexts``; ascending.
    """

    contexts: Packed
    questions: Packed
    answers: Packed
    context_of: NDArray[np.int64]

    def save(self, stem: Path) -> None:
        """Write the four arrays under names that start with ``stem``."""
        for name in ("contexts", "questions", "answers"):
            getattr(self, name).save(Path(f"{stem}.{name}"))
        np.save(f"{stem}.context_of.npy", self.context_of)

    @classmethod
    def load(cls, stem: Path) -> Questions:
        """Map what :meth:`save` wrote."""
        packed = {name: Packed.load(Path(f"{stem}.{name}")) for name in ("contexts", "questions", "answers")}
        return cls(context_of=np.load(f"{stem}.context_of.npy"), **packed)


@dataclass(frozen=True)
class Split:
    """One of the three splits: running text by source, and questions."""

    texts: dict[str, Packed]
    questions: Questions


def split_of(title: str) -> str:
    """Return the split that a title belongs to: 2 % validation, 2 % test, the rest train, by its hash."""
    value = int.from_bytes(hashlib.sha256(title.strip().lower().encode()).digest()[:8], "big") % 10_000
    return "validation" if value < HELD_OUT else "test" if value < 2 * HELD_OUT else "train"


def load_split(cache: Path, split: str) -> Split:
    """Map one split of prepared data."""
    texts = {source.name: Packed.load(cache / f"{split}.{source.name}") for source in sources.TEXTS}
    return Split(texts, Questions.load(cache / f"{split}.questions"))


def prepare(data: Path, cache: Path, vocabulary: int) -> None:
    """Write tokenizer and packed splits to ``cache``, unless they are there already.

    Parameters
    ----------
    data : Path
        Folder with ``lm/`` and ``qa/``.
    cache : Path
        Created if absent. ``prepared.json`` is written last: token counts, and the held-out titles of each split.
    vocabulary : int
        Size of the tokenizer's vocabulary, at most 65,536.
    """
    if (cache / "prepared.json").is_file():
        return
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(_tokenizer_texts(data), vocabulary)
    tokenizer.save(str(cache / "tokenizer.json"))
    summary: dict[str, Any] = {"vocabulary": tokenizer.get_vocab_size(), "tokens": {}, "held_out_titles": {}}
    for source in sources.TEXTS:
        documents = defaultdict(list)
        titles = defaultdict(set)
        for title, text in sources.read_texts(data, source):
            documents[split_of(title)].append(text)
            titles[split_of(title)].add(title)
        for split in SPLITS:
            packed = _encode_documents(tokenizer, documents[split])
            packed.save(cache / f"{split}.{source.name}")
            summary["tokens"][f"{split}.{source.name}"] = len(packed.tokens)
        summary["held_out_titles"][source.name] = {split: sorted(titles[split]) for split in SPLITS[1:]}
    for split, records in _split_questions(data).items():
        questions = _encode_questions(tokenizer, records)
        questions.save(cache / f"{split}.questions")
        summary["tokens"][f"{split}.questions"] = sum(
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
                yield text[: min(budget, _LONGEST_PIECE * 4)]
                budget -= min(len(text), _LONGEST_PIECE * 4)
                if budget <= 0:
                    break


def _encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> Packed:
    pieces = [list(_pieces(text)) for text in texts]
    encoded = _encode(tokenizer, itertools.chain.from_iterable(pieces))
    return Packed.pack(
        list(itertools.chain.from_iterable(itertools.islice(encoded, len(document)))) for document in pieces
    )


def _pieces(text: str) -> Iterator[str]:
    """Cut at paragraph ends; tokens do not span them."""
    while len(text) > _LONGEST_PIECE:
        cut = text.rfind("\n\n", 1, _LONGEST_PIECE)
        cut = cut if cut > 0 else _LONGEST_PIECE
        yield text[:cut]
        text = text[cut:]
    yield text


def _encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """Tokenise in batches, in parallel, dropping ids of special tokens that a text spells out."""
    texts = iter(texts)
    while batch := list(itertools.islice(texts, _ENCODED_AT_ONCE)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield [token for token in encoding.ids if token >= len(SPECIAL_TOKENS)]


def _split_questions(data: Path) -> dict[str, list[tuple[str, str, str]]]:
    """Return ``(context, question, answer)`` by split; by the context's hash where a record has no title."""
    records: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
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


def _encode_questions(tokenizer: Tokenizer, records: Sequence[tuple[str, str, str]]) -> Questions:
    contexts = {context: None for context, _, _ in records}
    index = {context: number for number, context in enumerate(contexts)}
    records = sorted(records, key=lambda record: index[record[0]])
    return Questions(
        contexts=Packed.pack(_encode(tokenizer, contexts)),
        questions=Packed.pack(_encode(tokenizer, (" " + question for _, question, _ in records))),
        answers=Packed.pack(_encode(tokenizer, (" " + answer for _, _, answer in records))),
        context_of=np.array([index[context] for context, _, _ in records], dtype=np.int64),
    )
