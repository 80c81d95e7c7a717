"""The command line: ``ctxdocs compress``, ``ask``, ``chat``, ``search``, ``info``, ``remove``, ``models`` and ``eval``."""

from __future__ import annotations

from ctxdocs.cli.group import main

__all__ = ["main"]
