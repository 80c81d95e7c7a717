"""The ``ctxdocs`` command: its subcommands are imported when they are called."""

from __future__ import annotations

import importlib
from typing import Any

import click

import ctxdocs
from ctxdocs.cli.failures import reporting

_COMMANDS = ("compress", "ask", "chat", "search", "serve", "info", "remove", "models", "doctor", "train", "eval")


class _Commands(click.Group):
    """Subcommands, each a function in the module of its name; what it returns is the exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return getattr(importlib.import_module(f"ctxdocs.cli.{cmd_name}"), cmd_name)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # A usage error is reported before the subcommand has parsed its options: whether to report it as JSON is
        # read off the arguments themselves. Behind `--` nothing is an option.
        options = args[: args.index("--")] if "--" in args else args
        ctx.obj = "json" if "--json" in options else "text"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with reporting(ctx.obj):
            ctx.exit(super().invoke(ctx) or 0)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ctxdocs.__version__, prog_name="ctxdocs")
def main() -> None:
    """Compress documents once into memories that a language model reads instead of their text.

    \b
      ctxdocs compress ./docs
      ctxdocs ask "When does the ferry sail?"
    """
