"""The texts and questions of a run, tokenised once: documents in a mapped file beside the output, questions as text."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ctxdocs.datasets import Document, Question, Skipped, read_records, split_of, split_title
from ctxdocs.datasets.files import find_files
from ctxdocs.datasets.tokenising import BatchEncoder, load_token_file
from ctxdocs.datasets.tokens import TokenSequences, TokenWriter
from ctxdocs.errors import InputError, StorageError
from ctxdocs.training.config import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKEN_FILE = ".tokens.npy"


@dataclass
class FileCounts:
    """What a file held."""

    documents: int = 0
    questions: int = 0
    tokens: int = 0


@dataclass
class TrainingData:
    """What one split of the data holds.

    Parameters
    ----------
    documents : TokenSequences
        Documents, without special tokens.
    questions : list of Question
        As they were read.
    files : dict of str to FileCounts
        By the file's name, for the model card; tokens are those of documents.
    skipped : int
        Lines that held no record.
    """

    documents: TokenSequences
    questions: list[Question] = field(default_factory=list)
    files: dict[str, FileCounts] = field(default_factory=dict)
    skipped: int = 0


def load_data(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, folder: Path, seed: int
) -> tuple[TrainingData, TrainingData | None]:
    """Read and tokenise what is trained on and, if anything is held out, what is measured.

    Parameters
    ----------
    options : DataOptions
        Which files, and what of them.
    tokenizer : transformers tokenizer
        With a fast backend.
    folder : Path
        Receives token files; what is there already, from the same files and tokenizer, is used again.
    seed : int
        Decides which titles are held out.

    Raises
    ------
    InputError
        If a file is missing, or nothing is left to train on.
    DocumentError
        ``"file:line: what"``, for a line that holds no record.
    """
    share = options.validation_share
    if not 0 <= share < 1:
        raise InputError(f"data.validation_share is {share}", "from 0 to below 1")
    train = _load(options.files, options, tokenizer, folder / "train", seed, share, held_out=False)
    if not len(train.documents) and not train.questions:
        raise InputError(
            f"nothing is left to train on in {', '.join(options.files)}", "check data.splits and data.validation_share"
        )
    parts = []
    if share:
        parts.append(_load(options.files, options, tokenizer, folder / "held-out", seed, share, held_out=True))
    if options.validation_files:
        stem = folder / "validation"
        parts.append(_load(options.validation_files, options, tokenizer, stem, seed, 0.0, held_out=False))
    return train, _joined(parts)


def _load(
    names: Sequence[str],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    stem: Path,
    seed: int,
    share: float,
    *,
    held_out: bool,
) -> TrainingData:
    token_files = [name for name in names if str(name).endswith(_TOKEN_FILE)]
    parts = [_from_token_file(name, tokenizer) for name in token_files if not held_out]
    if others := [name for name in names if name not in token_files]:
        stem.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{stem}.lock"):  # of several processes one tokenises, and the others find it done
            parts.append(_from_records(others, options, tokenizer, stem, seed, share, held_out=held_out))
    joined = _joined(parts)
    return joined or TrainingData(TokenSequences.pack([]))


def _from_token_file(name: str, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    sequences = load_token_file(name.removesuffix(_TOKEN_FILE), tokenizer)
    counts = FileCounts(documents=len(sequences), tokens=int(sequences.offsets[-1]))
    return TrainingData(sequences, files={Path(name).name: counts})


def _from_records(
    names: Sequence[str],
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    stem: Path,
    seed: int,
    share: float,
    *,
    held_out: bool,
) -> TrainingData:
    encoder, files = BatchEncoder(tokenizer), find_files(names)
    made_from: dict[str, Any] = {
        "files": [[file.name, file.stat().st_size] for file in files],
        "tokenizer": encoder.fingerprint,
        "seed": seed,
        "share": share,
        "splits": options.splits,
        "held_out": held_out,
    }
    if (known := _known(stem, made_from)) is not None:
        return known
    data = TrainingData(TokenSequences.pack([]))
    skipped = Skipped()

    def texts() -> Iterator[str]:
        for file in files:
            counts = data.files.setdefault(file.name, FileCounts())
            for record in read_records(file, on_error=options.on_error, skipped=skipped):  # type: ignore[arg-type]
                is_held_out = (
                    share > 0 and split_of(split_title(record), seed=seed, validation=share, test=0.0) != "train"
                )
                if is_held_out != held_out:
                    continue
                if isinstance(record, Document):
                    counts.documents += 1
                    yield record.text
                elif not options.splits or record.split in options.splits:
                    counts.questions += 1
                    data.questions.append(record)

    with TokenWriter(stem, encoder.dtype) as writer:
        for ids in encoder.encode(texts()):
            writer.add(ids)
    data.documents, data.skipped = TokenSequences.load(stem), skipped.count
    _count_tokens(data)
    description = {"made_from": made_from, "files": {name: asdict(counts) for name, counts in data.files.items()}}
    try:
        Path(f"{stem}.json").write_text(
            json.dumps({**description, "skipped": data.skipped}, indent=1), encoding="utf-8"
        )
    except OSError as error:
        raise StorageError(f"{stem}.json: cannot be written ({error.strerror or error})") from error
    return data


def _count_tokens(data: TrainingData) -> None:
    """Count the tokens of every file's documents, which lie one file after another."""
    lengths, start = data.documents.lengths, 0
    for counts in data.files.values():
        counts.tokens = int(lengths[start : start + counts.documents].sum())
        start += counts.documents


def _known(stem: Path, made_from: dict[str, Any]) -> TrainingData | None:
    """Return what an earlier run tokenised from the same; questions are not kept, so None where there are some."""
    try:
        description = json.loads(Path(f"{stem}.json").read_text(encoding="utf-8"))
        files = {name: FileCounts(**counts) for name, counts in description["files"].items()}
        if description["made_from"] != made_from or any(counts.questions for counts in files.values()):
            return None
        return TrainingData(TokenSequences.load(stem), [], files, description["skipped"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _joined(parts: Sequence[TrainingData]) -> TrainingData | None:
    if len(parts) <= 1:
        return parts[0] if parts else None
    sequences = [part.documents for part in parts]
    widest = max(part.tokens.dtype for part in sequences)
    documents = TokenSequences.pack(_each(sequences), widest)
    questions = [question for part in parts for question in part.questions]
    files = {name: counts for part in parts for name, counts in part.files.items()}
    return TrainingData(documents, questions, files, sum(part.skipped for part in parts))


def _each(parts: Iterable[TokenSequences]) -> Iterator[Any]:
    for sequences in parts:
        for index in range(len(sequences)):
            yield sequences[index]
