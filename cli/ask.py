"""``ctxdocs ask``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from ctxdocs.cli.hits import described
from ctxdocs.cli.options import (
    device_option,
    json_option,
    k_option,
    library_option,
    open_library,
    rerank_option,
    retrieval_option,
)
from ctxdocs.cli.output import aligned, clean, counted, print_json, silence, terminal
from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.library import Answer, Library

_BATCH = 16


@click.command()
@click.argument("question", required=False)
@click.option(
    "--questions",
    "questions_file",
    type=click.File(encoding="utf-8", errors="replace"),
    help="A file with a question on each line, instead of QUESTION.",
)
@library_option
@k_option
@click.option(
    "--mode",
    type=click.Choice(["memory", "text", "none"]),
    default="memory",
    show_default=True,
    help="Read the chunks' memories, their text, or nothing.",
)
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Upper bound of the answer's length.")
@click.option("--temperature", type=float, help="Above 0, tokens are drawn; default: the likeliest is taken.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens that hold this probability.")
@click.option("--top-k", type=int, help="Draw among this many likeliest tokens.")
@click.option("--seed", type=int, help="Seed of the draws.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End the answer here, instead of where the model would.")
@click.option(
    "--schema",
    "schema_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A file with a JSON schema: the answer is JSON that keeps to it. Give it enough --max-new-tokens.",
)
@retrieval_option
@rerank_option
@click.option(
    "--blend",
    type=float,
    metavar="SHARE",
    help="Compute this share of the chunks' tokens again, 0 to 1, so that exact memories know of each other: try 0.15.",
)
@click.option("--model", metavar="NAME", help="Where the library's compressor is, if it has moved.")
@device_option
@json_option
def ask(
    question: str | None,
    questions_file: IO[str] | None,
    library_path: Path,
    model: str | None,
    device: str,
    as_json: bool,
    schema_file: Path | None,
    **options: Any,
) -> None:
    """Answer a question from a library.

    QUESTION may be "-": it is then read from standard input.
    """
    if (question is None) == (questions_file is None):
        raise click.UsageError("give a QUESTION or --questions FILE, and not both")
    questions = _questions(question, questions_file)
    if schema_file is not None:
        options["schema"] = _schema(schema_file)
    library = open_library(library_path, model, device)
    silence()
    chosen = {name: value for name, value in options.items() if value not in (None, ())}
    if questions_file is not None:
        _answer_all(library, questions, chosen, as_json)
    elif as_json:
        print_json(_record(questions[0], library.ask(questions[0], **chosen)))
    else:
        _answer_streaming(library, questions[0], chosen)


def _questions(question: str | None, file: IO[str] | None) -> list[str]:
    if file is not None:
        questions = [line.strip() for line in file if line.strip()]
    else:
        text = sys.stdin.read() if question == "-" else question or ""
        questions = [text.strip()] if text.strip() else []
    if not questions:
        raise InputError("there is no question", "ask something")
    return questions


def _schema(file: Path) -> dict[str, Any]:
    """Read a JSON schema, and see whether it can be used before a model is loaded."""
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"the schema cannot be read: {error}", "--schema takes a file") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is no JSON: {error}", "write a JSON schema into it") from error
    from ctxdocs.structure import checked_schema

    checked_schema(schema)
    return schema


def _answer_all(library: Library, questions: list[str], options: dict[str, Any], as_json: bool) -> None:
    """Answer questions in batches; as text each one is printed as soon as its batch is done."""
    records = []
    for start in range(0, len(questions), _BATCH):
        batch = questions[start : start + _BATCH]
        for question, answer in zip(batch, library.ask_many(batch, **options), strict=True):
            if as_json:
                records.append(_record(question, answer))
                continue
            console = terminal(sys.stdout)
            console.print(clean(question), style="bold")
            console.print(clean(answer.text))
            _show_sources(answer)
            console.print()
    if as_json:
        print_json({"answers": records})


def _answer_streaming(library: Library, question: str, options: dict[str, Any]) -> None:
    stream = library.stream(question, **options)
    begun = False
    try:
        for piece in stream:
            text = piece if begun else piece.lstrip()
            begun = begun or bool(text)
            click.echo(clean(text), nl=False)
    finally:  # an interruption is reported on a line of its own
        click.echo("\n")
    _show_sources(stream.answer)


def _show_sources(answer: Answer) -> None:
    console = terminal(sys.stdout)
    rows = [described(number, source) for number, source in enumerate(answer.sources, 1)]
    if rows:
        console.print(aligned(rows, right=[0]))
    console.print(
        f"read {counted(answer.memory_slots, 'memory slot')} and {counted(answer.prompt_tokens, 'token')}; "
        f"first token after {answer.time_to_first_token:.2f} s, all after {answer.seconds:.2f} s",
        style="dim",
    )


def _record(question: str, answer: Answer) -> dict[str, Any]:
    values = answer.to_dict()
    return {"question": question, "answer": values.pop("text"), **values}
