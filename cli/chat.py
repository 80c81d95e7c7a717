"""``ctxdocs chat``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctxdocs.cli.hits import described
from ctxdocs.cli.options import device_option, json_option, k_option, open_library
from ctxdocs.cli.output import aligned, clean, counted, print_json, shown, silence, terminal
from ctxdocs.errors import CtxdocsError, InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ctxdocs.answers import Answer
    from ctxdocs.conversation import Conversation

_HELP = """\
/memory      what the conversation takes: slots, tokens seen, ratio
/save FILE   write the conversation to a file
/load FILE   go on with one
/reset       forget the conversation
/exit        leave (or Ctrl-D); Ctrl-C ends an answer"""


@click.command()
@click.option("--model", metavar="NAME", help="A checkpoint's folder or hub name; default: the library's, or bundled.")
@click.option("--method", metavar="NAME", help="The checkpoint's method, where it does not say.")
@click.option(
    "--library",
    "library_path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Answer from this library; default: from the conversation alone.",
)
@k_option
@click.option("--system", metavar="TEXT", help="What the model is told before the first turn.")
@click.option("--session", "session_path", metavar="FILE", type=click.Path(path_type=Path), help="Go on with /save's.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Upper bound of an answer's length.")
@click.option("--temperature", type=float, help="Above 0, tokens are drawn; default: the likeliest is taken.")
@click.option("--top-p", type=float, help="Draw among the likeliest tokens that hold this probability.")
@click.option("--top-k", type=int, help="Draw among this many likeliest tokens.")
@click.option("--repetition-penalty", type=float, help="Above 1, an answer repeats itself less.")
@click.option("--seed", type=int, help="Seed of the draws.")
@device_option
@json_option
def chat(
    model: str | None,
    method: str | None,
    library_path: Path | None,
    system: str | None,
    session_path: Path | None,
    device: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Hold a conversation whose history is compressed memory.

    Reads a question per line; lines that begin with a slash are commands (/help). With --json every line is answered
    by one JSON object on a line.
    """
    from ctxdocs.conversation import Conversation

    silence()
    given = {name: value for name, value in options.items() if value is not None}
    if library_path is not None:
        if method is not None:
            raise click.UsageError("--method goes with --model; a library knows its own")
        library = open_library(library_path, model, device)
        conversation = Conversation(library.compressor, library, system=system, **given)
    else:
        from ctxdocs.checkpoints import load_compressor

        given.pop("k")
        conversation = Conversation(load_compressor(model, method, device=device), system=system, **given)
    if session_path is not None:
        conversation.load(session_path)
    interactive = sys.stdin.isatty() and not as_json
    if interactive:
        compressor = conversation.compressor
        name = clean(compressor.name_or_path or "a model made in Python")
        click.echo(f"{name} ({compressor.method}). /help lists the commands; Ctrl-D leaves.")
    for line in _lines(interactive):
        if line in ("/exit", "/quit"):
            return
        try:
            if line.startswith("/"):
                _command(conversation, line, as_json)
            elif as_json:
                print_json(_record(line, _whole(conversation, line)))
            else:
                _answer(conversation, line)
        except CtxdocsError as error:  # the conversation goes on as it was
            if as_json:
                print_json({"error": error.message, "hint": error.hint})
            else:
                terminal(sys.stderr).print(clean(f"Error: {error}"), style="bold red")


def _lines(interactive: bool) -> Iterator[str]:
    """Yield what the user types, line by line, without blank lines; ends with the input."""
    if interactive:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() a history and line editing
    while True:
        try:
            line = input("> ") if interactive else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            if interactive:
                click.echo()
            return
        except KeyboardInterrupt:  # as in a shell: a new line
            click.echo()
            continue
        except UnicodeDecodeError:
            raise InputError("the input is not UTF-8", "set the terminal's encoding") from None
        if line.strip():
            yield line.strip()


def _answer(conversation: Conversation, question: str) -> None:
    pieces = conversation.ask(question)
    begun = False
    try:
        while True:
            try:
                piece = next(pieces)
            except StopIteration as end:
                answer: Answer = end.value
                break
            text = piece if begun else piece.lstrip()
            begun = begun or bool(text)
            click.echo(clean(text), nl=False)
    except KeyboardInterrupt:  # ends the answer, and not the conversation
        pieces.close()
        click.echo(" ...")
        return
    click.echo()
    if answer.sources:
        rows = [described(number, source) for number, source in enumerate(answer.sources, 1)]
        terminal(sys.stdout).print(aligned(rows, right=[0]), style="dim")


def _whole(conversation: Conversation, question: str) -> Answer:
    pieces = conversation.ask(question)
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value


def _command(conversation: Conversation, line: str, as_json: bool) -> None:
    name, _, argument = line.partition(" ")
    path = Path(argument.strip()).expanduser()
    if name in ("/save", "/load") and not argument.strip():
        raise InputError(f"{name} needs a file", f"write: {name} FILE")
    if name == "/save":
        conversation.save(path)
        said: dict[str, Any] = {"saved": str(path)}
        text = f"Saved to {shown(path)}."
    elif name == "/load":
        conversation.load(path)
        said = {"loaded": str(path), "turns": len(conversation.turns)}
        text = f"Going on after {counted(len(conversation.turns), 'turn')}."
    elif name == "/reset":
        conversation.reset()
        said, text = {"reset": True}, "Forgotten."
    elif name == "/memory":
        said, text = _memory(conversation)
    elif name == "/help":
        said, text = {"help": _HELP}, _HELP
    else:
        raise InputError(f"there is no command {name}", "/help lists them; a question does not begin with a slash")
    if as_json:
        print_json(said)
    else:
        terminal(sys.stdout).print(text, style="dim")


def _memory(conversation: Conversation) -> tuple[dict[str, Any], str]:
    memory, turns = conversation.memory(), len(conversation.turns)
    if memory is None:
        return {"turns": 0, "slots": 0, "tokens_seen": 0, "bytes": 0}, "Nothing has been said yet."
    seen, slots = conversation.session.tokens_seen, memory.slots
    said = {"turns": turns, "slots": slots, "tokens_seen": seen, "bytes": memory.nbytes}
    ratio = f", {seen / slots:.1f} tokens per slot" if slots else ""
    return said, f"{counted(turns, 'turn')}: {counted(seen, 'token')} seen, {counted(slots, 'slot')}{ratio}."


def _record(question: str, answer: Answer) -> dict[str, Any]:
    values = answer.to_dict()
    return {"question": question, "answer": values.pop("text"), **values}
