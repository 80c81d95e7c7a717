"""Sessions on disk: one safetensors file with everything a session needs to go on.

Tensors are the session's state (``state.*``) and those of the memories it started from (``memory.<n>.*``); the
metadata hold the rest as JSON. The file belongs to one compressor, as memories do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ctxdocs.errors import CheckpointError, FingerprintMismatch, StorageError
from ctxdocs.memory import Memory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ctxdocs.compressors.base import Compressor
    from ctxdocs.compressors.sessions import Session

FORMAT = "ctxdocs-session-1"


def save(session: Session, path: Path) -> None:
    """Write a session; the file is replaced at once or, on an error, not at all.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
    from safetensors.torch import save_file

    state, values = session.state()
    tensors = {f"state.{name}": tensor for name, tensor in state.items()}
    memories = []
    for number, memory in enumerate(session.memories):
        tensors |= {f"memory.{number}.{name}": tensor for name, tensor in memory.tensors().items()}
        memories.append({"kind": memory.kind, "span": memory.span, "source_tokens": memory.source_tokens})
    metadata = {
        "format": FORMAT,
        "method": session.compressor.method,
        "fingerprint": session.compressor.fingerprint,
        "options": json.dumps(session.options),
        "values": json.dumps(values),
        "memories": json.dumps(memories),
        "note": json.dumps(session.note),
    }
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    except Exception as error:  # safetensors wraps the system's errors in its own
        temporary.unlink(missing_ok=True)
        raise StorageError(f"the session could not be written to {path}: {error}", "choose another place") from error


def load(compressor: Compressor, path: Path) -> Session:
    """Return the session in a file.

    Raises
    ------
    CheckpointError
        If the file is missing, damaged, or no session.
    FingerprintMismatch
        If another compressor made it.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, "pt", device=str(compressor.backbone.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:  # the reader raises kinds of its own; every one means a file that cannot be read
        raise CheckpointError(f"{path} cannot be read as a session: {error}", "give a file that /save wrote") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} holds no session", "give a file that a session's save() wrote")
    if metadata["fingerprint"] != compressor.fingerprint:
        raise FingerprintMismatch(
            f"the session in {path} was held with {metadata['method']} compressor {metadata['fingerprint'][:12]}, "
            f"not with {compressor.method} compressor {compressor.fingerprint[:12]}",
            "load the compressor it was held with",
        )
    try:
        memories = [
            Memory.from_tensors(
                entry.pop("kind"), _below(tensors, f"memory.{number}."), fingerprint=compressor.fingerprint, **entry
            )
            for number, entry in enumerate(json.loads(metadata["memories"]))
        ]
        session = compressor.session(memories=memories, **json.loads(metadata["options"]))
        session.restore(_below(tensors, "state."), json.loads(metadata["values"]))
        session.note = json.loads(metadata["note"])
        return session
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the session in {path} is damaged: {error}") from error


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
