"""What training and evaluation read: documents, and questions about contexts; and their JSON form."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Document:
    """A running text.

    Parameters
    ----------
    text : str
        Never blank.
    title : str, optional
        What the text is known by; data sets are split by it.
    source : str, optional
        Where the text is from: a repository, a data set.
    place : str, optional
        ``"file:line"`` it was read from, for messages.
    """

    text: str
    title: str = ""
    source: str = ""
    place: str = ""


@dataclass(frozen=True)
class Question:
    """A question, its answers and the contexts it is asked about.

    Parameters
    ----------
    question : str
        Never blank.
    answers : tuple of str
        Every one of them is right; empty only if the contexts do not answer the question.
    contexts : tuple of str
        Passages; empty for a question that is asked about nothing.
    relevant : tuple of int
        Indices of the contexts that hold the answer, ascending; ``()`` if it cannot be told from the contexts.
    title : str, optional
        What the question's contexts are known by; data sets are split by it.
    id, source, place : str, optional
        The data set's own id, the data set, and ``"file:line"``.
    options : tuple of str, optional
        The choices of a multiple-choice question.
    split : str, optional
        The part of its data set that its publishers put the question in, such as ``"train"`` or ``"dev"``.
    """

    question: str
    answers: tuple[str, ...]
    contexts: tuple[str, ...]
    relevant: tuple[int, ...]
    title: str = ""
    id: str = ""
    source: str = ""
    place: str = ""
    options: tuple[str, ...] = ()
    split: str = ""


Record: TypeAlias = Document | Question


class RecordProblem(ValueError):
    """Why a JSON value is no record, and what to do about it; readers add the place."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy


def parse_record(values: Any, place: str = "") -> Record:
    """Make a record of a JSON object; ``docs/datasets.md`` has the keys.

    Raises
    ------
    RecordProblem
        If keys are missing, of a wrong type or empty, or contradict each other.
    """
    if not isinstance(values, dict):
        raise RecordProblem(f"expected a JSON object, found {_type_name(values)}", "write one {...} per line")
    if "question" in values:
        return _parse_question(values, place)
    if "text" in values:
        return Document(_text(values, "text"), _string(values, "title"), _string(values, "source"), place)
    raise RecordProblem(
        "neither 'text' nor 'question' among its keys",
        "a document needs 'text', a question needs 'question', 'answers' and 'context'",
    )


def to_json(record: Record) -> dict[str, Any]:
    """Return the JSON object that :func:`parse_record` reads; empty fields and the place are left out."""
    if isinstance(record, Document):
        return {"text": record.text, **_filled(title=record.title, source=record.source)}
    return {
        "question": record.question,
        "answers": list(record.answers),
        "contexts": list(record.contexts),
        "relevant": list(record.relevant),
        **_filled(
            title=record.title, id=record.id, source=record.source, options=list(record.options), split=record.split
        ),
    }


def record_id(record: Record) -> str:
    """Return a record's id: its own, or else 16 hexadecimal digits of the sha256 of what it says."""
    if isinstance(record, Question):
        if record.id:
            return f"{record.source}:{record.id}" if record.source else record.id
        parts: Sequence[str] = (record.title, record.question, *record.contexts)
    else:
        parts = (record.title, record.text)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def find_relevant(contexts: Sequence[str], answers: Sequence[str]) -> tuple[int, ...]:
    """Return the contexts in which an answer stands, or all of them where none does (a yes, a count, a paraphrase)."""
    if len(contexts) == 1:
        return (0,)
    found = tuple(index for index, context in enumerate(contexts) if holds_answer(context, answers))
    return found or tuple(range(len(contexts)))


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Return whether one of the answers stands in the text as whole words, in capitals or not."""
    return next(answer_spans(text, answers), None) is not None


def answer_spans(text: str, answers: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield where answers stand in a text, as :func:`holds_answer` has it: first character, and the one behind."""
    wanted = "|".join(re.escape(answer.strip()) for answer in answers if answer.strip())
    if wanted:
        yield from (match.span() for match in re.finditer(rf"(?<!\w)(?:{wanted})(?!\w)", text, re.IGNORECASE))


def _parse_question(values: dict[str, Any], place: str) -> Question:
    question = _text(values, "question")
    answers = _answers(values)
    contexts = _contexts(values)
    impossible = values.get("impossible", False)
    if not isinstance(impossible, bool):
        raise RecordProblem(f"'impossible' is {_type_name(impossible)}", "write true or false")
    if values.get("relevant") is not None:
        relevant = _indices(values["relevant"], len(contexts))
        if impossible and relevant:
            raise RecordProblem("'impossible' is true and yet contexts are 'relevant'", "leave one of the two out")
    else:
        relevant = () if impossible else find_relevant(contexts, answers)
    if relevant and not answers:
        raise RecordProblem("'answers' is empty", 'give an answer, or write "impossible": true')
    return Question(
        question,
        answers,
        contexts,
        relevant,
        title=_string(values, "title"),
        id=_identity(values),
        source=_string(values, "dataset") or _string(values, "source"),
        place=place,
        options=_strings(values, "options"),
        split=_string(values, "split"),
    )


def _answers(values: dict[str, Any]) -> tuple[str, ...]:
    if "answers" not in values:
        if values.get("impossible") is True:
            return ()
        raise RecordProblem("no 'answers'", 'give "answers": ["..."], or "impossible": true')
    if isinstance(values["answers"], str):
        return (_text(values, "answers"),)
    return _strings(values, "answers")


def _contexts(values: dict[str, Any]) -> tuple[str, ...]:
    key = "contexts" if "contexts" in values else "context"
    if key not in values:
        raise RecordProblem("neither 'context' nor 'contexts'", 'give "context": "..." or "contexts": ["...", ...]')
    found = values[key]
    if found == "":
        return ()
    if isinstance(found, str):
        return (_text(values, key),)
    if not isinstance(found, list):
        raise RecordProblem(f"'{key}' is {_type_name(found)}", "write a string or a list")
    return tuple(_context(item, f"{key}[{number}]") for number, item in enumerate(found))


def _context(item: Any, name: str) -> str:
    if isinstance(item, dict):
        for key in ("title", "text"):
            if not isinstance(item.get(key, "" if key == "title" else None), str):
                raise RecordProblem(f"'{name}' has no string '{key}'", 'write {"title": "...", "text": "..."}')
        title, text = item.get("title", "").strip(), item["text"]
    elif isinstance(item, str):
        title, text = "", item
    else:
        raise RecordProblem(f"'{name}' is {_type_name(item)}", 'write a string or {"title": ..., "text": ...}')
    if not text.strip():
        raise RecordProblem(f"'{name}' is blank", "leave the context out")
    return f"{title}\n{text}" if title else text


def _indices(found: Any, contexts: int) -> tuple[int, ...]:
    if not isinstance(found, list) or any(type(index) is not int for index in found):
        raise RecordProblem("'relevant' is no list of numbers", "write the indices of contexts, from 0 on")
    if any(not 0 <= index < contexts for index in found):
        raise RecordProblem(
            f"'relevant' holds {max(found, key=abs)}, and there are {contexts} contexts", "contexts are counted from 0"
        )
    return tuple(sorted(set(found)))


def _text(values: dict[str, Any], key: str) -> str:
    found = values[key]
    if not isinstance(found, str):
        raise RecordProblem(f"'{key}' is {_type_name(found)}", "write a string")
    if not found.strip():
        raise RecordProblem(f"'{key}' is blank", "fill it in, or remove the line")
    return found


def _string(values: dict[str, Any], key: str) -> str:
    found = values.get(key)
    if found is not None and not isinstance(found, str):
        raise RecordProblem(f"'{key}' is {_type_name(found)}", "write a string, or leave it out")
    return found or ""


def _identity(values: dict[str, Any]) -> str:
    return str(values["id"]) if type(values.get("id")) is int else _string(values, "id")


def _strings(values: dict[str, Any], key: str) -> tuple[str, ...]:
    found = values.get(key)
    if found is None:
        return ()
    if not isinstance(found, list) or any(not isinstance(item, str) for item in found):
        raise RecordProblem(f"'{key}' is no list of strings", 'write ["...", "..."]')
    if any(not item.strip() for item in found):
        raise RecordProblem(f"'{key}' holds a blank string", "remove it")
    return tuple(found)


def _filled(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value}


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
