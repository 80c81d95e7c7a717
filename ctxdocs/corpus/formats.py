"""One loader per file format: raw bytes to text and metadata."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ctxdocs.errors import DocumentError

if TYPE_CHECKING:
    from bs4 import BeautifulSoup


class Loader(NamedTuple):
    """How a format is read.

    ``read(path, data)`` returns the text and what else is known of it; ``path`` serves error messages only.
    """

    format: str
    read: Callable[[Path, bytes], tuple[str, dict[str, Any]]]


def read_text(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    """Read a file's bytes by the loader of its suffix, as plain text if there is none.

    Returns
    -------
    str, dict
        The text, in which lone surrogates are replaced, and the metadata.

    Raises
    ------
    DocumentError
        As :func:`ctxdocs.corpus.load_document` says.
    """
    loader = _LOADERS.get(path.suffix.lower(), _TEXT)
    text, metadata = loader.read(path, data)
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text, {"format": loader.format, **{key: value for key, value in metadata.items() if value}}


# --- plain text -------------------------------------------------------------------------------------------------

_BOMS = (  # the UTF-32 mark begins with the UTF-16 one: longest first
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")


def _read_plain(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    text, encoding = _decode(path, data)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, {"encoding": encoding if encoding != "utf-8" else None}


def _decode(path: Path, data: bytes, declared: str | None = None) -> tuple[str, str]:
    """Decode by byte order mark, as UTF-8, as declared, or by what charset-normalizer finds."""
    for mark, encoding in _BOMS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding), encoding
            except UnicodeDecodeError as error:
                raise DocumentError(f"{path}: not valid {encoding} at byte {error.start}") from error
    if b"\0" not in data:
        for encoding in ("utf-8", declared or "utf-8"):
            try:
                return data.decode(encoding), encoding
            except (UnicodeError, LookupError):
                continue
        from charset_normalizer import from_bytes

        # Short texts fit many code pages equally well: then the most common one of the web is likeliest.
        matches = sorted(from_bytes(data), key=lambda m: (m.chaos, -m.coherence, m.encoding != "cp1252"))
        # Single-byte code pages accept any bytes: control characters tell that these are no text.
        if matches and not _CONTROL.search(text := str(matches[0])):
            return text, matches[0].encoding
    raise DocumentError(f"{path}: binary, not text", f"formats read: {', '.join(sorted(SUFFIXES))}")


# --- HTML -------------------------------------------------------------------------------------------------------

_HIDDEN = "title script style noscript template nav footer aside form button svg iframe"
_PARAGRAPHS = "p h1 h2 h3 h4 h5 h6 table pre blockquote section article header main figure hr"
_LINES = "div ul ol dl li dt dd tr br figcaption caption address details summary"
# Newlines that part an element from its neighbours.
_GAPS = dict.fromkeys(_PARAGRAPHS.split(), 2) | dict.fromkeys(_LINES.split(), 1)
_CELL_BREAK = " | "


def _read_html(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector

    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    markup, encoding = _decode(path, data, declared)
    # html.parser is always there: the same page gives the same chunks on every machine.
    soup = BeautifulSoup(markup, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else None
    return _html_text(soup), {"title": title, "encoding": encoding if encoding != "utf-8" else None}


def _html_text(soup: BeautifulSoup) -> str:
    """Return the visible text, block elements parted by newlines, whitespace collapsed outside ``<pre>``."""
    from bs4.element import NavigableString, PreformattedString, Tag

    hidden = frozenset(_HIDDEN.split())
    pieces: list[str] = []
    gap = preformatted = 0
    # Depth first with an explicit stack, because damaged pages nest deeper than Python recurses. A plain string
    # on the stack is the name of an element that ends there.
    stack: list[Any] = [soup]
    while stack:
        node = stack.pop()
        if isinstance(node, Tag):
            if node.name in hidden:
                continue
            # Pages may leave out the end tags of cells, which html.parser then nests.
            if node.name in ("td", "th") and (before := node.find_previous(["tr", "td", "th"])):
                pieces += [_CELL_BREAK] * (before.name != "tr")
            preformatted += node.name == "pre"
            gap = max(gap, _GAPS.get(node.name, 0))
            stack += [node.name, *reversed(node.contents)]
        elif not isinstance(node, NavigableString):
            preformatted -= node == "pre"
            gap = max(gap, _GAPS.get(node, 0))
        elif not isinstance(node, PreformattedString):
            text = str(node)
            if not preformatted:
                text = re.sub(r"\s+", " ", text)
                if gap or not pieces or pieces[-1].endswith((" ", "\n")):
                    text = text.lstrip()
            if text:
                if pieces and pieces[-1] != _CELL_BREAK:
                    pieces.append("\n" * gap)
                pieces.append(text)
                gap = 0
    text = re.sub(r"[ \t]+\n", "\n", "".join(pieces))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n ")


# --- PDF --------------------------------------------------------------------------------------------------------


def _read_pdf(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError
    except ImportError as error:
        raise _missing(path, "pypdf") from error
    try:
        reader = PdfReader(io.BytesIO(data))
        # Many files are encrypted with an empty password, only to forbid printing or editing.
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
        title = None if locked else reader.metadata and reader.metadata.title
    except DependencyError:
        locked = True
    except Exception as error:  # a damaged file makes the parser raise nearly anything
        raise DocumentError(f"{path}: damaged PDF ({error or type(error).__name__})") from error
    if locked:
        raise DocumentError(f"{path}: encrypted PDF", "save it without a password")
    text = "\n\n".join(filter(None, (page.strip() for page in pages)))
    return text.replace("\0", ""), {"title": title, "pages": len(pages)}


# --- Word -------------------------------------------------------------------------------------------------------


def _read_docx(path: Path, data: bytes) -> tuple[str, dict[str, Any]]:
    try:
        import docx
    except ImportError as error:
        raise _missing(path, "python-docx") from error
    try:
        document = docx.Document(io.BytesIO(data))
        return "\n\n".join(_docx_blocks(document)), {"title": document.core_properties.title}
    except Exception as error:  # a damaged file makes the parser raise nearly anything
        raise DocumentError(f"{path}: damaged Word document ({error or type(error).__name__})") from error


def _docx_blocks(container: Any) -> Iterator[str]:
    """Yield paragraphs and tables of a document or a table cell in reading order, a table as lines of cells."""
    for block in container.iter_inner_content():
        if hasattr(block, "rows"):
            yield "\n".join(
                # A merged cell is listed once for every column it spans.
                _CELL_BREAK.join(" ".join(_docx_blocks(cell)) for cell in dict.fromkeys(row.cells))
                for row in block.rows
            )
        elif block.text.strip():
            yield block.text


def _missing(path: Path, package: str) -> DocumentError:
    return DocumentError(f"{path}: reading it needs {package}", "pip install 'ctxdocs[docs-formats]'")


_TEXT = Loader("text", _read_plain)
_MARKDOWN = Loader("markdown", _read_plain)
_HTML = Loader("html", _read_html)
_LOADERS = {
    ".txt": _TEXT,
    ".md": _MARKDOWN,
    ".markdown": _MARKDOWN,
    ".rst": Loader("rst", _read_plain),
    ".html": _HTML,
    ".htm": _HTML,
    ".pdf": Loader("pdf", _read_pdf),
    ".docx": Loader("docx", _read_docx),
}
SUFFIXES = frozenset(_LOADERS)
"""Suffixes of the formats that are read, in lower case."""
