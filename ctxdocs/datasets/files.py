"""Files of JSON lines: plain, gzip or zstd; read line by line, written at once or not at all."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple, cast

from ctxdocs.errors import DocumentError, InputError, MissingDependency, StorageError

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
_BLOCK = 2**18
_LARGEST_WINDOW = 2**27  # what `zstd --long=27` writes
_ZSTD_LEVEL = 10
_BOM = b"\xef\xbb\xbf"


class Line(NamedTuple):
    """One line of a file.

    ``number`` counts from 1; ``data`` is without its line end.
    """

    path: Path
    number: int
    data: bytes

    @property
    def place(self) -> str:
        """``"file:line"``."""
        return f"{self.path}:{self.number}"


PathsLike = str | Path | Iterable[str | Path]


def is_records_file(path: str | Path) -> bool:
    """Return whether a path's suffix is one of :data:`SUFFIXES`."""
    return Path(path).name.endswith(SUFFIXES)


def find_files(paths: PathsLike) -> list[Path]:
    """List files of JSON lines: the files named, and those in the folders named, sorted.

    Raises
    ------
    InputError
        If a path is missing, or a folder holds no file with one of :data:`SUFFIXES`.
    """
    found: dict[Path, None] = {}
    for path in map(Path, [paths] if isinstance(paths, str | Path) else paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if is_records_file(file) and file.is_file())
            visible = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
            if not visible:
                raise InputError(f"{path}: no JSON lines in this folder", f"files end in {', '.join(SUFFIXES)}")
            found.update(dict.fromkeys(visible))
        elif path.is_file():
            found[path] = None
        else:
            raise InputError(f"{path}: no such file or folder", "check the spelling")
    if not found:
        raise InputError("no files were given", "name files of JSON lines, or folders of them")
    return list(found)


def read_lines(path: str | Path, *, on_empty: Callable[[DocumentError], None] | None = None) -> Iterator[Line]:
    """Yield the lines of a file that hold something.

    Parameters
    ----------
    path : path
        The file.
    on_empty : callable, optional
        Given the error of every empty line, in place of raising it.

    Raises
    ------
    DocumentError
        If the file cannot be read, is cut off or damaged, or a line in the middle is empty. Empty lines at the end
        are nothing to complain of.
    """
    path = Path(path)
    empty: list[int] = []
    for number, data in enumerate(_raw_lines(path), 1):
        if number == 1:
            data = data.removeprefix(_BOM)
        if not data.strip():
            empty.append(number)
            continue
        for place in empty:
            error = DocumentError(f"{path}:{place}: the line is empty", "remove it; every line holds one JSON object")
            if on_empty is None:
                raise error
            on_empty(error)
        empty.clear()
        yield Line(path, number, data)


def read_json(path: str | Path) -> Any:
    """Return the JSON value that a whole file holds, compressed or not.

    Raises
    ------
    DocumentError
        As for :func:`parse_line`.
    """
    data = b"\n".join(_raw_lines(Path(path))).removeprefix(_BOM)
    return _parse(data, str(path), "file")


def parse_line(line: Line) -> Any:
    """Return the JSON value of a line.

    Raises
    ------
    DocumentError
        If the line is not UTF-8, is no JSON, or holds text that UTF-8 cannot store.
    """
    return _parse(line.data, line.place, "line")


def _parse(data: bytes, place: str, unit: str) -> Any:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{place}: not UTF-8 (byte {error.start + 1} of the {unit})", "save the file as UTF-8"
        ) from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{place}: broken JSON at character {error.pos + 1} ({error.msg})", f"the {unit} should be one JSON value"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists a thousand deep
        raise DocumentError(f"{place}: JSON that cannot be read ({error})", "correct or remove it") from error
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{place}: half of a surrogate pair, which is no character", "replace it by \\ufffd"
            ) from error
    return value


@contextmanager
def writing(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a file for writing, compressed as its suffix says; it takes its name when all is written.

    Raises
    ------
    StorageError
        If writing fails (no permission, disk full). What was there before is left as it was.
    """
    path = Path(path)
    make_folder(path.parent)
    partial = path.with_name(f"{path.name}.part")
    try:
        try:
            with partial.open("wb") as raw, _packed(path, raw) as file:
                yield file
            partial.replace(path)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises
    ------
    StorageError
        If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{path}: the folder cannot be made ({error.strerror or error})") from error


def _packed(path: Path, raw: IO[bytes]) -> AbstractContextManager[IO[bytes]]:
    """Return what compresses into ``raw`` as the path's suffix says; closing it leaves ``raw`` open."""
    if path.suffix == ".zst":
        compressor = _zstandard(path).ZstdCompressor(level=_ZSTD_LEVEL)
        return cast("IO[bytes]", compressor.stream_writer(raw, closefd=False))
    if path.suffix == ".gz":
        # Without a name and a time inside, the same records make the same file.
        return cast("IO[bytes]", gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0))
    return nullcontext(raw)


def _raw_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            if path.suffix == ".zst":
                yield from _joined(_unpacked(path, file))
            elif path.suffix == ".gz":
                for line in gzip.GzipFile(fileobj=file):
                    yield line.rstrip(b"\n")
            else:
                for line in file:
                    yield line.rstrip(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read ({error.strerror or error})") from error


def _joined(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cut blocks at line ends; a line may span many blocks."""
    begun: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = [others[-1]]
    if last := b"".join(begun):
        yield last


def _unpacked(path: Path, file: IO[bytes]) -> Iterator[bytes]:
    """Unpack zstd frames one behind the other. Read as a stream, a file that is cut off would just end early."""
    zstandard = _zstandard(path)
    unpacking = None
    try:
        while block := file.read(_BLOCK):
            while block:
                if unpacking is None:
                    unpacking = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
                yield unpacking.decompress(block)
                block = b""
                if unpacking.eof:
                    block, unpacking = unpacking.unused_data, None
    except zstandard.ZstdError as error:
        raise _damaged(path, str(error)) from error
    if unpacking is not None:
        raise _damaged(path, "it ends in the middle of a frame")


def _damaged(path: Path, why: str) -> DocumentError:
    return DocumentError(f"{path}: the compressed file is cut off or damaged ({why})", "fetch or write it again")


def _zstandard(path: Path) -> ModuleType:
    try:
        import zstandard
    except ImportError as error:
        raise MissingDependency(f"{path}: .zst files need zstandard", "pip install ctxdocs[train]") from error
    return zstandard
