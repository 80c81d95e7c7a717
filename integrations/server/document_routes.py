"""The library's documents: listed, uploaded, removed."""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query, Request, UploadFile
from starlette.responses import JSONResponse, Response

from ctxdocs.cache import StoredDocument
from ctxdocs.integrations.server.errors import RequestError, closing
from ctxdocs.integrations.server.names import safe_name

if TYPE_CHECKING:
    from ctxdocs.integrations.server.state import State
    from ctxdocs.integrations.server.uploads import Upload

router = APIRouter(prefix="/v1/documents", tags=["Library"])


@router.get("")
def documents(
    request: Request, limit: Annotated[int, Query(ge=1, le=10_000)] = 1000, after: str = ""
) -> dict[str, Any]:
    """List the documents in the order they were added, and uploads of late."""
    state: State = request.app.state.ctxdocs
    last = _number(after) if after else -1
    listed = []
    for document in state.library.store.documents():
        if document.id > last:
            listed.append(_document(document))
            if len(listed) > limit:
                break
    counts = state.library.store.counts()
    return {
        "object": "list",
        "data": listed[:limit],
        "has_more": len(listed) > limit,
        "uploads": [_upload(upload) for upload in state.uploads.all()],
        "library": {
            "documents": counts.documents,
            "chunks": counts.chunks,
            "tokens": counts.tokens,
            "slots": counts.slots,
            "memory_bytes": counts.memory_bytes,
            "disk_bytes": counts.disk_bytes,
        },
    }


@router.post("", status_code=202)
async def upload(request: Request, file: UploadFile) -> Response:
    """Take a document and compress it in the background; ask for its status by the id that comes back."""
    state: State = request.app.state.ctxdocs
    files = len((await request.form()).getlist("file"))
    if files > 1:
        raise RequestError(400, f"{files} documents in one request; send each in its own", "invalid_value", "file")
    _check_writable(state)
    if state.engine.is_closing:
        raise closing()
    name = safe_name(file.filename)
    taken = await asyncio.to_thread(state.uploads.add, name, file.file)
    return JSONResponse(_upload(taken), 202, {"Location": f"/v1/documents/{taken.id}"})


@router.get("/{document_id}")
def document(request: Request, document_id: str) -> dict[str, Any]:
    """Describe a document, or say how far an upload is."""
    found = _find(request.app.state.ctxdocs, document_id)
    return _document(found) if isinstance(found, StoredDocument) else _upload(found)


@router.delete("/{document_id}")
async def remove(request: Request, document_id: str) -> dict[str, Any]:
    """Remove a document, or give an upload up."""
    state: State = request.app.state.ctxdocs
    _check_writable(state)
    found = await asyncio.to_thread(_find, state, document_id)
    if isinstance(found, StoredDocument):
        removing = asyncio.wrap_future(state.uploads.remove(found.uri))
        try:
            await asyncio.wait_for(removing, state.settings.request_seconds)
        except asyncio.TimeoutError:
            raise RequestError(409, "another document is being compressed; try again later", "busy") from None
    else:
        state.uploads.cancel(found)
    return {"id": document_id, "object": "document.deleted", "deleted": True}


def _find(state: State, document_id: str) -> StoredDocument | Upload:
    found: StoredDocument | Upload | None
    if document_id.startswith("up_"):
        found = state.uploads.get(document_id)
    else:
        number = _number(document_id)
        found = next((each for each in state.library.store.documents() if each.id == number), None)
    if found is None:
        raise RequestError(404, f"there is no document {document_id!r}", "document_not_found")
    return found


def _check_writable(state: State) -> None:
    if state.settings.access == "read":
        raise RequestError(403, "this server's library is read only", "read_only")


def _number(document_id: str) -> int:
    digits = document_id.removeprefix("doc_")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1


def _document(document: StoredDocument) -> dict[str, Any]:
    return {
        "id": f"doc_{document.id}",
        "object": "document",
        "name": PurePosixPath(document.uri).name or document.uri,
        "uri": document.uri,
        "added_at": document.added_at,
        "chunks": document.chunks,
        "tokens": document.tokens,
        "slots": document.slots,
        "bytes": document.nbytes,
    }


def _upload(upload: Upload) -> dict[str, Any]:
    return {"object": "upload", **vars(upload), "uri": upload.uri}
