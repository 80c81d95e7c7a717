"""``python -m ctxdocs.cli``."""

from __future__ import annotations

from ctxdocs.cli.group import main

main(prog_name="ctxdocs")
