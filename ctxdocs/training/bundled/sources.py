"""What the bundled model is trained on: files, selections, weights and licences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ctxdocs.datasets.files import parse_line, read_lines
from ctxdocs.errors import InputError


@dataclass(frozen=True)
class TextSource:
    """One file of running text.

    Parameters
    ----------
    file : str
        Path below the data folder, without ``.jsonl.zst`` or ``.jsonl``.
    weight : float
        Share of the training windows drawn from it, relative to the other sources.
    licence : str
        For the model card.
    keep : tuple of str
        Origins (field ``source``) that are kept; empty keeps all. API references are left out: a model this small
        gains more from prose.
    cloze : {"made", "none"}
        Whether questions are made of it (:mod:`ctxdocs.training.bundled.cloze`); novels name the same few people in
        every paragraph.
    """

    file: str
    weight: float
    licence: str
    keep: tuple[str, ...] = ()
    cloze: Literal["made", "none"] = "made"

    @property
    def name(self) -> str:
        """Last part of the path."""
        return Path(self.file).name


@dataclass(frozen=True)
class QuestionSource:
    """One file of questions with contexts and answers; fields as in :class:`TextSource`."""

    file: str
    licence: str

    @property
    def name(self) -> str:
        """Last part of the path."""
        return Path(self.file).name


TEXTS = (
    TextSource("lm/openstax", 0.45, "CC-BY-4.0 (OpenStax textbooks)"),
    TextSource("lm/gov", 0.15, "US public domain, CC0 (digital.gov, 18F, World Factbook, speeches)"),
    TextSource("lm/books", 0.15, "public domain in the US (classics)", cloze="none"),
    TextSource(
        "lm/docs",
        0.25,
        "PSF, MIT, Apache-2.0, CC0, CC-BY-4.0, CC-BY-SA-4.0 (guides and proposals of open-source projects)",
        keep=(
            "python/peps",
            "kubernetes/community",
            "swiftlang/swift-evolution",
            "rust-lang/rfcs",
            "rust-lang/book",
            "symfony/symfony-docs",
            "golang/website",
            "dotnet/EntityFramework.Docs",
            "reactjs/react.dev",
            "rails/rails",
            "d2l-ai/d2l-en",
            "dart-lang/site-www",
            "redis/redis-doc",
            "OWASP/wstg",
            "github/opensource.guide",
            "donnemartin/system-design-primer",
        ),
    ),
)

QUESTIONS = (
    QuestionSource("qa/squad_train_subset", "CC-BY-SA-4.0 (part of SQuAD 1.1 train)"),
    QuestionSource("qa/openstax_glossary", "CC-BY-4.0"),
    QuestionSource("qa/fairytaleqa", "Apache-2.0"),
    QuestionSource("qa/boolq", "CC-BY-SA-3.0"),
    QuestionSource("qa/onestopqa", "CC-BY-SA-4.0"),
    QuestionSource("qa/quoref_subset", "CC-BY-4.0"),
)

#: Published development and test sets are never trained on, nor used to choose anything.
TRAINABLE_SPLITS = ("train", "all")


def read_texts(data: Path, source: TextSource) -> Iterator[tuple[str, str]]:
    """Yield ``(title, text)`` of the records that are kept."""
    for record in _records(data, source.file):
        if not source.keep or record["source"] in source.keep:
            yield record["title"] or record["text"][:200], record["text"]


def read_questions(data: Path, source: QuestionSource) -> Iterator[dict[str, Any]]:
    """Yield the question records that may be trained on."""
    for record in _records(data, source.file):
        if record["split"] in TRAINABLE_SPLITS and record["context"] and record["answers"]:
            yield record


def _records(data: Path, file: str) -> Iterator[dict[str, Any]]:
    plain, packed = data / f"{file}.jsonl", data / f"{file}.jsonl.zst"
    found = next((path for path in (plain, packed) if path.is_file()), None)
    if found is None:
        raise InputError(f"there is neither {plain} nor {packed}", "--data names the folder with lm/ and qa/")
    yield from map(parse_line, read_lines(found))
