"""Which part of the data a record belongs to: training, validation or test; by its title, never by its line."""

from __future__ import annotations

import hashlib
from typing import Literal

from ctxdocs.datasets.records import Document, Record
from ctxdocs.errors import InputError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_STEPS = 10_000


def split_of(title: str, *, seed: int = 0, validation: float = 0.01, test: float = 0.01) -> Split:
    """Return the split that a title belongs to, by its hash: the same on every machine and in every version.

    Parameters
    ----------
    title : str
        Case and surrounding blanks do not matter.
    seed : int, optional
        Another seed holds out other titles.
    validation, test : float, optional
        Shares that are held out, in steps of 1/10,000.

    Raises
    ------
    InputError
        If a share is negative, or both together leave nothing to train on.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise InputError(f"shares of {validation} and {test} cannot be held out", "give two numbers from 0 to below 1")
    name = title.strip().lower() + (f"\0{seed}" if seed else "")
    value = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % _STEPS
    if value < round(validation * _STEPS):
        return "validation"
    return "test" if value < round(validation * _STEPS) + round(test * _STEPS) else "train"


def split_title(record: Record) -> str:
    """Return what a record is split by: its title, or else the text it is about, so that no text is in two splits."""
    if record.title.strip():
        return record.title
    if isinstance(record, Document):
        return record.text
    if not record.contexts:
        return record.question
    return record.contexts[record.relevant[0] if record.relevant else 0]
