"""What a user sees when a command fails, and the exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import click

from ctxdocs.cli.output import clean, print_json, terminal
from ctxdocs.errors import CtxdocsError

#: Exit codes beside 0 (done) and 2 (usage, click's own).
USER_ERROR, SOME_FAILED, INTERRUPTED = 1, 3, 130


class Interrupted(CtxdocsError):
    """Ctrl-C, where a command can say what became of the work."""


@contextmanager
def reporting(output: Literal["text", "json"]) -> Iterator[None]:
    """Turn errors inside the block into a message and an exit code.

    With ``"json"`` every error is one JSON object on standard output; with ``"text"`` it is a message and a hint on
    standard error. Environment variable ``CTXDOCS_DEBUG`` shows the traceback too.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except KeyboardInterrupt:
        _fail(Interrupted("Interrupted"), INTERRUPTED, output)
    except Interrupted as error:
        _fail(error, INTERRUPTED, output)
    except CtxdocsError as error:
        _fail(error, USER_ERROR, output)
    except click.ClickException as error:
        if output == "text":
            raise
        context = getattr(error, "ctx", None)
        hint = context and f"see: {context.command_path} --help"
        _fail(CtxdocsError(error.format_message(), hint), error.exit_code, output)
    except BrokenPipeError:
        raise  # click ends quietly when the reader of a pipe has gone
    except Exception as error:
        if output == "text":
            raise
        traceback.print_exc()
        _fail(CtxdocsError(f"{type(error).__name__}: {error}", "this is a bug in ctxdocs"), USER_ERROR, output)


def _fail(error: CtxdocsError, code: int, output: Literal["text", "json"]) -> None:
    if os.environ.get("CTXDOCS_DEBUG"):
        traceback.print_exc()
    if output == "json":
        print_json({"error": error.message, "hint": error.hint})
    else:
        console = terminal(sys.stderr)
        label = "" if code == INTERRUPTED else "Error: "
        console.print(label + clean(error.message), style="bold red")
        if error.hint:
            console.print(f"Hint: {clean(error.hint)}")
    raise click.exceptions.Exit(code)
