"""Documents that are sent to a server: kept until they are compressed, one after another, in a thread of their own.

An upload that has been accepted is on the disk, in the library's folder ``uploads``; a server that ends before it is
compressed goes on with it when it starts again.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

from ctxdocs.cache.files import writing
from ctxdocs.cache.lock import lock_library
from ctxdocs.corpus import SourceFile, load_document
from ctxdocs.errors import CtxdocsError, DocumentError, LibraryError, StorageError
from ctxdocs.integrations.server.borrowing import Borrowed
from ctxdocs.integrations.server.errors import RequestError, busy, closing, of_exception

if TYPE_CHECKING:
    from ctxdocs.integrations.server.batching import Engine
    from ctxdocs.integrations.server.settings import Settings
    from ctxdocs.library import Library

_log = logging.getLogger(__name__)

_REMEMBERED = 500
# How long another process may write to the library before an upload fails, and how often to look, in seconds.
_PATIENCE, _GLANCE = 600.0, 0.2
# A Word document is an archive; more than this many times its size is no text.
_LARGEST_EXPANSION = 50


class _Cancelled(Exception):
    """An upload that is not wanted any more."""


@dataclass
class Upload:
    """A document on its way into the library.

    Parameters
    ----------
    id : str
        What it is asked for by.
    name : str
        What it will be called.
    bytes : int
        Its size.
    status : {"waiting", "compressing", "done", "failed", "cancelled"}
        How far it is.
    progress : float
        The part of its text that has been compressed.
    chunks : int
        Chunks that have been compressed.
    error : str, optional
        Why it failed.
    """

    id: str
    name: str
    bytes: int
    status: Literal["waiting", "compressing", "done", "failed", "cancelled"] = "waiting"
    progress: float = 0.0
    chunks: int = 0
    error: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def uri(self) -> str:
        """The document's uri in the library."""
        return f"upload/{self.name}"

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status in ("done", "failed", "cancelled")


class Uploads:
    """The one who writes to a server's library.

    Parameters
    ----------
    library : Library
        Where documents go.
    engine : Engine
        What compresses them.
    settings : Settings
        How many may wait.
    """

    def __init__(self, library: Library, engine: Engine, settings: Settings) -> None:
        self.library = library
        self.engine = engine
        self.settings = settings
        self.folder = library.path / "uploads"
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ctxdocs-uploads")
        self._is_closing = False

    def start(self) -> None:
        """Go on with what an earlier server left."""
        if not self.folder.is_dir():
            return
        for path in self.folder.glob("up_*"):
            if not path.with_suffix(".json").exists():  # of an upload that was never accepted
                path.unlink(missing_ok=True)
        for note in sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime):
            try:
                values = json.loads(note.read_text(encoding="utf-8"))
                upload = Upload(note.stem, str(values["name"]), int(values["bytes"]))
            except (OSError, ValueError, KeyError):
                _log.warning("%s is no note of an upload, and left alone", note)
                continue
            self._enqueue(upload)

    def close(self) -> None:
        """Stop; what is not compressed stays for the next start."""
        self._is_closing = True
        self._thread.shutdown(wait=True, cancel_futures=True)

    def all(self) -> list[Upload]:
        """Return the uploads of late, the last first."""
        with self._lock:
            return list(reversed(self._uploads.values()))

    def get(self, upload_id: str) -> Upload | None:
        """Return an upload, None if there is none of that id."""
        with self._lock:
            return self._uploads.get(upload_id)

    def add(self, name: str, content: IO[bytes]) -> Upload:
        """Keep a document, and have it compressed when its turn comes; returns at once.

        Raises
        ------
        RequestError
            If it is empty or not of the format its name says, or too many wait.
        StorageError
            If the disk is full.
        """
        with self._lock:
            waiting = sum(not upload.is_over for upload in self._uploads.values())
        if waiting >= self.settings.pending_uploads:
            raise busy(f"{waiting} documents wait to be compressed", 30)
        upload_id = f"up_{secrets.token_hex(8)}"
        part = self.folder / f"{upload_id}.part"
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            with part.open("wb") as file:
                shutil.copyfileobj(content, file, 2**20)
        try:
            size = part.stat().st_size
            _check_content(name, part, size, self.settings.upload_bytes)
            upload = Upload(upload_id, name, size)
            with writing(self.folder):
                part.replace(self._file(upload))
                note = self.folder / f"{upload_id}.part"
                note.write_text(json.dumps({"name": name, "bytes": size}), encoding="utf-8")
                note.replace(self._note(upload))
        finally:
            part.unlink(missing_ok=True)
        self._enqueue(upload)
        return upload

    def cancel(self, upload: Upload) -> None:
        """Have an upload forgotten, unless it is in the library already."""
        with self._lock:
            if upload.is_over:
                return
            is_waiting, upload.status = upload.status == "waiting", "cancelled"
        if is_waiting:  # otherwise the writer's thread will notice
            self._end(upload, "cancelled")

    def remove(self, uri: str) -> Future[int]:
        """Remove a document from the library, when the writer's turn comes; the result is how many there were."""

        def remove() -> int:
            with self.library.store.writer() as writer:
                return writer.remove([uri])

        return self._thread.submit(remove)

    def _enqueue(self, upload: Upload) -> None:
        with self._lock:
            self._uploads[upload.id] = upload
            over = [key for key, value in self._uploads.items() if value.is_over]
            for key in over[: max(0, len(self._uploads) - _REMEMBERED)]:
                del self._uploads[key]
        try:
            self._thread.submit(self._compress, upload)
        except RuntimeError:  # closed meanwhile: the next start finds it
            return

    # In the writer's thread.

    def _compress(self, upload: Upload) -> None:
        with self._lock:
            if self._is_closing or upload.status != "waiting":
                return
            upload.status = "compressing"
        try:
            self._add(upload)
            self._end(upload, "done")
        except _Cancelled:
            self._end(upload, "cancelled")
        except RequestError:  # the server ends; the document stays for the next start
            if upload.status == "cancelled":
                self._end(upload, "cancelled")
        except CtxdocsError as error:
            message = of_exception(error, str(self.library.path)).detail
            self._end(upload, "failed", message)
        except Exception:
            _log.exception("compressing %s failed", upload.id)
            self._end(upload, "failed", "the server failed to compress it; its log says why")

    def _add(self, upload: Upload) -> None:
        self._wait_for_other_writers(upload)
        path = self._file(upload)
        try:
            document = load_document(SourceFile(path, upload.uri), max_bytes=self.settings.upload_bytes)
        except DocumentError as error:
            raise DocumentError(str(error).replace(str(path), upload.name)) from error
        document.metadata["uploaded"] = upload.name
        chunking = self.library.store.manifest.settings
        shared = chunking["overlap_tokens"] / chunking["chunk_tokens"]

        def on_chunks(texts: Sequence[str]) -> None:
            self._check_wanted(upload)
            upload.chunks += len(texts)
            characters = sum(map(len, texts)) * (1 - shared)
            upload.progress = min(0.99, upload.progress + characters / len(document.text))

        report = Borrowed(self.engine, on_chunks).library().add(document)
        if report.unchanged and (stored := self.library.store.document(upload.uri)):
            upload.chunks = stored.chunks

    def _wait_for_other_writers(self, upload: Upload) -> None:
        """Wait while another process writes to the library; raise what it says if it takes too long."""
        until = time.monotonic() + _PATIENCE
        while True:
            self._check_wanted(upload)
            if self._is_closing:
                raise closing()
            try:
                lock_library(self.library.path).release()
                return
            except StorageError:
                raise
            except LibraryError:
                if time.monotonic() > until:
                    raise
            time.sleep(_GLANCE)

    def _check_wanted(self, upload: Upload) -> None:
        if upload.status == "cancelled":
            raise _Cancelled

    def _end(self, upload: Upload, status: Any, error: str | None = None) -> None:
        with self._lock:
            upload.status, upload.error = status, error
            upload.progress = 1.0 if status == "done" else upload.progress
        self._note(upload).unlink(missing_ok=True)
        self._file(upload).unlink(missing_ok=True)

    def _note(self, upload: Upload) -> Path:
        return self.folder / f"{upload.id}.json"

    def _file(self, upload: Upload) -> Path:
        # The name on the disk is the server's own; the suffix, which says the format, is one of a known few.
        return self.folder / (upload.id + PurePosixPath(upload.name).suffix)


def _check_content(name: str, path: Path, size: int, most: int) -> None:
    """Refuse what is not of the format its name says, as far as its first bytes tell."""
    if not size:
        raise RequestError(400, f"{name} is empty", "invalid_value", "file")
    if size > most:
        raise RequestError(413, f"{name} is larger than {most:,} bytes", "request_too_large", "file")
    with path.open("rb") as file:
        begin = file.read(1024)
    suffix = PurePosixPath(name).suffix
    wrong = RequestError(415, f"{name} is no {suffix} file", "unsupported_format", "file")
    if suffix == ".pdf" and b"%PDF-" not in begin:
        raise wrong
    if suffix == ".docx":
        try:
            with zipfile.ZipFile(path) as archive:
                expanded = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError) as error:
            raise wrong from error
        if expanded > max(_LARGEST_EXPANSION * size, 2**20):
            raise RequestError(413, f"{name} expands to {expanded:,} bytes", "request_too_large", "file")
