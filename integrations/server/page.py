"""The page: a few files, and headers that let it load nothing from anywhere else."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from ctxdocs.integrations.server.errors import RequestError

router = APIRouter(include_in_schema=False)

_FOLDER = Path(__file__).with_name("static")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
# Read once: what is served is what was installed, and no name that is asked for becomes a path.
_FILES = {path.name: path.read_bytes() for path in _FOLDER.iterdir() if path.suffix in _TYPES}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/")
def page() -> Response:
    """Return the page."""
    return _file("index.html")


@router.get("/docs")
def endpoints() -> Response:
    """Return the page that describes the endpoints."""
    return _file("docs.html")


@router.get("/static/{name}")
def file(name: str) -> Response:
    """Return one of the page's files."""
    if name not in _FILES:
        raise RequestError(404, f"there is no file {name!r}")
    return _file(name)


def _file(name: str) -> Response:
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix], headers=_HEADERS)
