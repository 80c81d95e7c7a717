"""The command line: ``ctxdocs compress``, ``ask``, ``chat``, ``search``, ``info``, ``remove`` and ``models``."""

from __future__ import annotations

from ctxdocs.cli.group import main

__all__ = ["main"]
