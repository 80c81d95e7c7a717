"""A library behind HTTP: OpenAI's API, a few endpoints of its own, and a page to try it in.

``ctxdocs serve --library DIR`` runs it; :func:`create_app` makes the ASGI application for another server.
"""

from __future__ import annotations

from ctxdocs.errors import MissingDependency

try:
    from ctxdocs.integrations.server.app import create_app
    from ctxdocs.integrations.server.running import serve
except ModuleNotFoundError as error:
    if error.name is None or error.name.startswith("ctxdocs"):
        raise
    raise MissingDependency(f"the server needs {error.name}", "pip install 'ctxdocs[serve]'") from error
from ctxdocs.integrations.server.settings import Settings

__all__ = ["Settings", "create_app", "serve"]
