"""ctxdocs: compress documents once into memories that a language model reads instead of their text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxdocs.errors import (
    CheckpointError,
    CtxdocsError,
    DocumentError,
    FingerprintMismatch,
    InputError,
    LibraryError,
    MissingDependency,
    StorageError,
)

if TYPE_CHECKING:
    from ctxdocs.checkpoints import load_compressor as load_compressor
    from ctxdocs.library import Library as Library
    from ctxdocs.memory import KVMemory as KVMemory
    from ctxdocs.memory import LayerStates as LayerStates
    from ctxdocs.memory import Memory as Memory
    from ctxdocs.memory import SoftPrompt as SoftPrompt

__version__ = "0.1.0"

# What needs torch is imported when it is first asked for, so that `import ctxdocs` stays instant.
_LAZY = {
    "load_compressor": "ctxdocs.checkpoints",
    "Library": "ctxdocs.library",
    "Memory": "ctxdocs.memory",
    "SoftPrompt": "ctxdocs.memory",
    "KVMemory": "ctxdocs.memory",
    "LayerStates": "ctxdocs.memory",
}

__all__ = [
    "CheckpointError",
    "CtxdocsError",
    "DocumentError",
    "FingerprintMismatch",
    "InputError",
    "KVMemory",
    "LayerStates",
    "Library",
    "LibraryError",
    "Memory",
    "MissingDependency",
    "SoftPrompt",
    "StorageError",
    "load_compressor",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ctxdocs' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
