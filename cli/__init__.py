"""The command line: ``ctxdocs`` and its subcommands, one file each."""

from __future__ import annotations

from ctxdocs.cli.group import main

__all__ = ["main"]
