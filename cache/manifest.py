"""``manifest.json``: what a library is made of; written once, when the library is created."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ctxdocs.cache.files import replacing
from ctxdocs.cache.layout import MANIFEST
from ctxdocs.errors import InputError, LibraryError

FORMAT = "ctxdocs-library"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What every reader and writer of a library must agree on.

    Parameters
    ----------
    compressor : dict
        ``fingerprint`` (str), and whatever its owner needs to load the compressor again.
    embedder : dict
        ``name`` (str) and ``dimension`` (int), and whatever its owner adds.
    codec : str
        How memories are encoded in the shards; a key of ``CODECS``.
    index : str
        FAISS ``index_factory`` string.
    settings : dict
        Not interpreted here; chunking, for instance.
    created_at : str
        UTC, ISO 8601.
    """

    compressor: dict[str, Any]
    embedder: dict[str, Any]
    codec: str
    index: str
    settings: dict[str, Any]
    created_at: str

    def __post_init__(self) -> None:
        """Check the few values that are relied upon."""
        dimension = self.embedder.get("dimension")
        if not isinstance(dimension, int) or dimension < 1:
            raise InputError(f"embedder['dimension'] must be a positive int, got {dimension!r}")
        for name, value in (
            ("compressor['fingerprint']", self.compressor.get("fingerprint")),
            ("embedder['name']", self.embedder.get("name")),
        ):
            if not isinstance(value, str):
                raise InputError(f"{name} must be a str, got {value!r}")
        try:
            json.dumps(asdict(self))
        except (TypeError, ValueError) as error:
            raise InputError(f"the manifest cannot be written as JSON: {error}") from error

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the compressor whose memories the library holds."""
        return self.compressor["fingerprint"]

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return self.embedder["dimension"]

    def write(self, folder: Path) -> None:
        """Write the manifest into a library's folder, atomically."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with replacing(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the library in ``folder``.

        Raises
        ------
        LibraryError
            If there is no library, its manifest is damaged, or its format is newer than this version of ctxdocs.
        """
        path = folder / MANIFEST
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "is no library" if folder.exists() else "does not exist"
            raise LibraryError(
                f"{folder} {what}: there is no {MANIFEST}", "check the path, or create a library there"
            ) from error
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise _damaged(path, f"its format is not {FORMAT!r}")
        version = document.get("version")
        if not isinstance(version, int) or version < 1:
            raise _damaged(path, f"its version is {version!r}")
        if version > VERSION:
            raise LibraryError(
                f"{folder} is in format {version}, newer than the {VERSION} this ctxdocs reads", "upgrade ctxdocs"
            )
        values: dict[str, Any] = {field.name: document.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            wanted = dict if name in ("compressor", "embedder", "settings") else str
            if not isinstance(value, wanted):
                raise _damaged(path, f"{name!r} is missing or of the wrong type")
        try:
            return cls(**values)
        except InputError as error:
            raise _damaged(path, error.message) from error


def _damaged(path: Path, reason: str) -> LibraryError:
    return LibraryError(f"{path} is damaged: {reason}", "restore it from a copy, or create the library anew")
