"""Texts become tokens, in parallel and in batches; files of records become token files, once."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctxdocs.corpus import file_digest
from ctxdocs.datasets.files import PathsLike, find_files
from ctxdocs.datasets.reading import OnError, Skipped, read_records
from ctxdocs.datasets.records import Document
from ctxdocs.datasets.tokens import TokenArray, TokenSequences, TokenWriter, token_dtype
from ctxdocs.errors import CheckpointError, InputError, StorageError
from ctxdocs.prefetching import Prefetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_BATCH_CHARACTERS = 2_000_000
_LONGEST_PIECE = 20_000  # characters; a book is tokenised in pieces, in parallel
_BATCHES_AHEAD = 2
#: Tokenised whole and in two, to see whether a tokenizer lets a text be cut between words.
_PROBE, _PROBE_CUT = "The tide rose by 6 m. Then it fell again", 26


class BatchEncoder:
    """Tokenises texts from outside: no special tokens are added, and none are recognised in a text.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer or transformers tokenizer
        With a fast backend; it is copied and left as it is.

    Attributes
    ----------
    vocabulary : int
        Number of ids.
    dtype : numpy.dtype
        Of the ids: uint16 or uint32.

    Raises
    ------
    InputError
        If the tokenizer has no fast backend.
    """

    def __init__(self, tokenizer: Tokenizer | PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(backend, "encode_batch_fast"):
            raise InputError(f"{type(tokenizer).__name__} is no fast tokenizer", "use one with a tokenizer.json")
        self._tokenizer = Tokenizer.from_str(backend.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self.vocabulary: int = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self.dtype = token_dtype(self.vocabulary)
        halves = [self._ids(text) for text in (_PROBE, _PROBE[:_PROBE_CUT], _PROBE[_PROBE_CUT:])]
        self._cuts = halves[0] == halves[1] + halves[2]

    def encode(self, texts: Iterable[str]) -> Iterator[TokenArray]:
        """Yield the ids of every text, uint16 or uint32 ``[tokens]``; texts are read a batch ahead."""
        for batch in _batches(texts):
            yield from self.encode_batch(batch)

    def encode_batch(self, texts: Sequence[str]) -> list[TokenArray]:
        """Return the ids of every text."""
        pieces = [list(_pieces(text)) if self._cuts else [text] for text in texts]
        flat = list(itertools.chain.from_iterable(pieces))
        encodings = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        found = []
        for parts in pieces:
            ids = [np.array(next(encodings).ids, dtype=self.dtype) for _ in parts]
            found.append(ids[0] if len(ids) == 1 else np.concatenate(ids))
        return found

    @property
    def fingerprint(self) -> str:
        """sha256 of the vocabulary: two tokenizers of one fingerprint mean the same by the same ids."""
        vocabulary = sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])
        return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)


@dataclass(frozen=True)
class TokenFileInfo:
    """What ``stem.json`` says of a token file.

    Parameters
    ----------
    sequences, tokens, skipped : int
        Documents, their tokens, and lines that held no record.
    vocabulary : int
        Number of ids.
    tokenizer : str
        :attr:`BatchEncoder.fingerprint` of the tokenizer.
    sources : list
        ``[name, sha256]`` of every file read.
    """

    sequences: int
    tokens: int
    skipped: int
    vocabulary: int
    tokenizer: str
    sources: list[list[str]]

    @classmethod
    def load(cls, stem: str | Path) -> TokenFileInfo | None:
        """Read ``stem.json``; None if it is not there, or says something else."""
        try:
            return cls(**json.loads(Path(f"{stem}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


def tokenise_files(
    paths: PathsLike, tokenizer: Tokenizer | PreTrainedTokenizerBase, stem: str | Path, *, on_error: OnError = "raise"
) -> TokenFileInfo:
    """Tokenise the documents of files of JSON lines, unless that has been done already.

    Reading, tokenising and writing overlap; a few batches are in memory at a time.

    Parameters
    ----------
    paths : path or iterable of paths
        Documents, as :func:`read_records` takes them.
    tokenizer : tokenizer
        As :class:`BatchEncoder` takes it.
    stem : path
        ``stem.tokens.npy``, ``stem.offsets.npy`` and, last, ``stem.json`` are written. If ``stem.json`` names the
        same files, by content, and the tokenizer, nothing is done.
    on_error : {"raise", "skip"}, optional
        As for :func:`read_records`.

    Raises
    ------
    InputError
        If a record is a question.
    StorageError
        If the files cannot be written.
    """
    encoder = BatchEncoder(tokenizer)
    files, skipped = find_files(paths), Skipped()
    sources = [[file.name, file_digest(file)] for file in files]
    known = TokenFileInfo.load(stem)
    if known is not None and (known.sources, known.tokenizer) == (sources, encoder.fingerprint):
        return known
    description = Path(f"{stem}.json")
    description.unlink(missing_ok=True)
    # Reading and parsing in one thread, tokenising (which lets go of the interpreter) in another, writing in this one.
    with (
        TokenWriter(stem, encoder.dtype) as writer,
        Prefetch(_batches(_texts(files, on_error, skipped)), _BATCHES_AHEAD) as batches,
        Prefetch(map(encoder.encode_batch, batches), _BATCHES_AHEAD) as encoded,
    ):
        for batch in encoded:
            for ids in batch:
                writer.add(ids)
    info = TokenFileInfo(
        writer.sequences, writer.tokens, skipped.count, encoder.vocabulary, encoder.fingerprint, sources
    )
    partial = Path(f"{stem}.json.part")
    try:
        partial.write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
        partial.replace(description)
    except OSError as error:
        raise StorageError(f"{description}: cannot be written ({error.strerror or error})") from error
    return info


def load_token_file(stem: str | Path, tokenizer: Tokenizer | PreTrainedTokenizerBase | None = None) -> TokenSequences:
    """Map a token file.

    Raises
    ------
    InputError
        If it is not there, or was made with another tokenizer than the one given.
    DocumentError
        If it is damaged.
    """
    sequences, info = TokenSequences.load(stem), TokenFileInfo.load(stem)
    if info is None:
        raise InputError(f"{stem}.json: missing or unreadable", "tokenise the texts again")
    if tokenizer is not None and (found := BatchEncoder(tokenizer)).fingerprint != info.tokenizer:
        raise InputError(
            f"{stem} was made with another tokenizer ({info.vocabulary:,} ids; the one given has {found.vocabulary:,})",
            "tokenise the texts again with the model's own tokenizer",
        )
    return sequences


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load ``tokenizer.json``, or the one in a folder.

    Raises
    ------
    CheckpointError
        If there is none, or it cannot be read.
    """
    from tokenizers import Tokenizer

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file", "--tokenizer names a tokenizer.json or a model's folder")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises nothing narrower
        raise CheckpointError(f"{file}: no tokenizer can be made of it ({error})") from error


def _texts(files: PathsLike, on_error: OnError, skipped: Skipped) -> Iterator[str]:
    for record in read_records(files, on_error=on_error, skipped=skipped):
        if not isinstance(record, Document):
            raise InputError(f"{record.place}: a question, where documents are tokenised", "name files of documents")
        yield record.text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text in front of a single space between two letters, where (probed) no token reaches across."""
    start = 0
    while len(text) - start > _LONGEST_PIECE:
        cut = text.rfind(" ", start + 1, start + _LONGEST_PIECE)
        while cut > start and not (text[cut - 1].isalpha() and text[cut + 1].isalpha()):
            cut = text.rfind(" ", start + 1, cut)
        if cut <= start:
            break  # no words: a table, a script without spaces
        yield text[start:cut]
        start = cut
    yield text[start:]
