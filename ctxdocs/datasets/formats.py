"""Published data sets, each format as JSON objects that :func:`ctxdocs.datasets.records.parse_record` reads.

A format yields ``(place, values)`` for every record, or ``(place, error)`` where there is none to be read. What else is
wrong with a single record is left for the parser to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ctxdocs.datasets.files import is_records_file, parse_line, read_json, read_lines
from ctxdocs.errors import DocumentError, InputError

#: Place, and a JSON value or a :class:`DocumentError`.
Values: TypeAlias = tuple[str, Any]


class Format(NamedTuple):
    """One format.

    Parameters
    ----------
    description : str
        For the help of the command line.
    read : callable
        A path to ``(place, values)`` of its records.
    recognises : callable
        Whether a file's first JSON value is of this format.
    """

    description: str
    read: Callable[[Path], Iterator[Values]]
    recognises: Callable[[Any], bool]


def detect(path: str | Path) -> str:
    """Return the name of a file's format, by its first JSON value; ``"text"`` for anything that is no JSON.

    Raises
    ------
    InputError
        If the path is missing, or holds JSON of no known format.
    DocumentError
        If it is broken.
    """
    path = Path(path)
    if path.is_dir():
        return "records" if any(map(is_records_file, path.rglob("*"))) else "text"
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder", "check the spelling")
    if is_records_file(path):
        line = next(read_lines(path), None)
        if line is None:
            raise DocumentError(f"{path}: no record in it", "remove the file, or write one JSON object per line")
        first = parse_line(line)
    elif ".json" in path.suffixes:
        first = read_json(path)
    else:
        return "text"
    for name, form in FORMATS.items():
        if form.recognises(first):
            return name
    keys = f"the keys {sorted(first)}" if isinstance(first, dict) else f"a {type(first).__name__}"
    raise InputError(f"{path}: of no known format ({keys})", f"known are {', '.join(FORMATS)}")


def _records(path: Path) -> Iterator[Values]:
    empty: list[DocumentError] = []
    for line in read_lines(path, on_empty=empty.append):
        yield from ((line.place, error) for error in empty)
        empty.clear()
        value: Any
        try:
            value = parse_line(line)
        except DocumentError as error:
            value = error
        yield line.place, value


def _passages(path: Path) -> Iterator[Values]:
    """Several titled passages in one string, and the titles of those that are needed."""
    for place, values in _records(path):
        if isinstance(values, dict) and isinstance(values.get("context"), str):
            passages = [passage.partition(": ") for passage in values["context"].split("\n\n") if passage.strip()]
            wanted = values.get("supporting_titles")
            found = [
                place for place, (title, *_) in enumerate(passages) if isinstance(wanted, list) and title in wanted
            ]
            contexts = [{"title": title, "text": text} if mark else title for title, mark, text in passages]
            values = {**values, "contexts": contexts, "relevant": found or None}
        yield place, values


def _squad(path: Path) -> Iterator[Values]:
    """SQuAD 1.1 and 2.0 (Rajpurkar et al., 2016, 2018), and sets in its layout."""
    for number, article in enumerate(_list(read_json(path), "data", str(path))):
        place = f"{path}: data[{number}]"
        for index, paragraph in enumerate(_list(article, "paragraphs", place)):
            inside = f"{place}.paragraphs[{index}]"
            for asked, values in enumerate(_list(paragraph, "qas", inside)):
                if isinstance(values, dict):
                    values = {
                        "question": values.get("question"),
                        "answers": _distinct(values.get("answers"), "text"),
                        "contexts": [paragraph.get("context")],
                        "impossible": values.get("is_impossible", False),
                        "title": article.get("title"),
                        "id": values.get("id"),
                    }
                yield f"{inside}.qas[{asked}]", values


def _nq_open(path: Path) -> Iterator[Values]:
    """NaturalQuestions-open (Lee et al., 2019): questions and answers without contexts."""
    for place, values in _records(path):
        if isinstance(values, dict):
            answers = values.get("answer")
            values = {"question": values.get("question"), "answers": answers, "contexts": [], "id": values.get("id")}
        yield place, values


def _hotpotqa(path: Path) -> Iterator[Values]:
    """HotpotQA (Yang et al., 2018): ten titled paragraphs, two of them needed; 2WikiMultihopQA has the same layout."""
    found = read_json(path)
    if not isinstance(found, list):
        raise DocumentError(f"{path}: a HotpotQA file is a list of questions", "see `convert --help` for other formats")
    for number, values in enumerate(found):
        if isinstance(values, dict):
            values = {
                "question": values.get("question"),
                "answers": values.get("answer"),
                "contexts": _hotpotqa_contexts(values.get("context")),
                "relevant": _hotpotqa_relevant(values),
                "id": values.get("_id"),
            }
        yield f"{path}: [{number}]", values


def _hotpotqa_contexts(found: Any) -> Any:
    if not isinstance(found, list) or not all(_is_titled(item) for item in found):
        return found
    return [{"title": title, "text": "".join(sentences)} for title, sentences in found]


def _hotpotqa_relevant(values: dict[str, Any]) -> list[int] | None:
    contexts, facts = values.get("context"), values.get("supporting_facts")
    if not isinstance(contexts, list) or not isinstance(facts, list):
        return None
    titles = {fact[0] for fact in facts if isinstance(fact, list) and fact and isinstance(fact[0], str)}
    return [index for index, item in enumerate(contexts) if _is_titled(item) and item[0] in titles] or None


def _is_titled(item: Any) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 2
        and isinstance(item[0], str)
        and isinstance(item[1], list)
        and all(isinstance(sentence, str) for sentence in item[1])
    )


def _text(path: Path) -> Iterator[Values]:
    """Files of text, Markdown, HTML and so on, as libraries read them; a folder is searched."""
    from ctxdocs.corpus import find_files, load_document

    found = find_files(path)
    if not found:
        raise InputError(f"{path}: no text in this folder", "a file of an unknown suffix can be named itself")
    folder = path.resolve() if path.is_dir() else path.resolve().parent
    for source in found:
        try:
            document = load_document(source)
        except DocumentError as error:
            yield str(source.path), error
            continue
        title = document.metadata.get("title") or source.path.relative_to(folder).as_posix()
        yield str(source.path), {"text": document.text, "title": title, "source": folder.name}


def _list(values: Any, key: str, place: str) -> list[Any]:
    found = values.get(key) if isinstance(values, dict) else None
    if not isinstance(found, list):
        raise DocumentError(f"{place}: no list '{key}'", "is it in the format named?")
    return found


def _distinct(found: Any, key: str) -> Any:
    """Return the different strings that a list of objects has under ``key``; anything else is left to the parser."""
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        return found
    return list(dict.fromkeys(item.get(key) for item in found))


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(key in value for key in keys)


def _is_record(value: Any) -> bool:
    return _has("text")(value) or _has("question", "context")(value) or _has("question", "contexts")(value)


def _is_hotpotqa(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and _has("question", "answer", "context")(value[0])


#: By name; the first that recognises a file is what :func:`detect` returns.
FORMATS = {
    "passages": Format(
        "JSON lines whose context is 'Title: text' paragraphs, with supporting_titles",
        _passages,
        _has("question", "context", "supporting_titles"),
    ),
    "records": Format("JSON lines as docs/datasets.md says", _records, _is_record),
    "squad": Format("SQuAD 1.1 and 2.0 JSON", _squad, _has("data")),
    "nq-open": Format("NaturalQuestions-open JSON lines", _nq_open, _has("question", "answer")),
    "hotpotqa": Format("HotpotQA JSON", _hotpotqa, _is_hotpotqa),
    "text": Format("text, Markdown, HTML ... files, or a folder of them", _text, lambda value: False),
}
