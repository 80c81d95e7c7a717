"""Names of uploaded documents, which come from anybody."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

from ctxdocs.corpus.formats import SUFFIXES
from ctxdocs.integrations.server.errors import RequestError

_LONGEST = 120
# What no name needs: control characters, marks that turn the writing direction or are not seen.
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def safe_name(given: str | None) -> str:
    """Return a document's name without folders, and without what could be mistaken for something else.

    It is what the document is called in the library; no file is ever called by it.

    Raises
    ------
    RequestError
        If nothing is left, or its suffix is none of a format that is read.
    """
    name = unicodedata.normalize("NFC", given or "")
    name = re.split(r"[/\\]", name)[-1]
    name = "".join(character for character in name if unicodedata.category(character) not in _UNSEEN)
    name = " ".join(name.split()).strip(". ")
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(sorted(SUFFIXES))
        message = f"the format of {name or 'a document without a name'!r} is not read; formats: {known}"
        raise RequestError(415, message, "unsupported_format", "file")
    stem = name[: -len(suffix)].strip(". ")
    if not stem:
        raise RequestError(400, "the document has no name", "invalid_value", "file")
    return stem[:_LONGEST].strip() + suffix
