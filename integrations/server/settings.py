"""What a server allows, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ctxdocs.checks import number, one_of, whole_number
from ctxdocs.corpus.documents import MAX_BYTES
from ctxdocs.errors import InputError

_MEGABYTE = 2**20


@dataclass(frozen=True)
class Settings:
    """Limits of a server. Whatever goes beyond one of them is refused with an error that names it.

    Parameters
    ----------
    name : str, optional
        What clients call the model; default: the last part of the compressor's name, or its method.
    keys : tuple of str
        API keys, one of which every request has to bring; none: no key is needed.
    access : {"write", "read"}
        Whether clients may add and remove documents.
    hosts : tuple of str
        Host names that requests may be addressed to, besides the loopback ones; ``("*",)`` is any.
    batch_size : int
        Answers that are written at once.
    queue_size : int
        Requests that may wait; one more is told to come again later.
    gather_seconds : float
        How long an idle model waits for requests to answer in one batch.
    request_seconds : float
        How long an answer may take, waiting included.
    head_seconds, body_seconds, upload_seconds : float
        How long a client may take to send a request's head, its body, and a document.
    connections : int
        Connections that may be open at once.
    body_bytes, upload_bytes : int
        Largest body of a request, and largest document.
    max_new_tokens, default_new_tokens : int
        Longest answer that can be asked for, and that of requests which do not say.
    max_sources : int
        Largest ``k``.
    max_prompts : int
        Prompts, or texts to embed, of one request.
    pending_uploads : int
        Documents that may wait to be compressed.
    """

    name: str | None = None
    keys: tuple[str, ...] = ()
    access: Literal["write", "read"] = "write"
    hosts: tuple[str, ...] = ()
    batch_size: int = 16
    queue_size: int = 128
    gather_seconds: float = 0.005
    request_seconds: float = 120.0
    head_seconds: float = 15.0
    body_seconds: float = 30.0
    upload_seconds: float = 600.0
    connections: int = 1024
    body_bytes: int = 2 * _MEGABYTE
    upload_bytes: int = 32 * _MEGABYTE
    max_new_tokens: int = 1024
    default_new_tokens: int = 256
    max_sources: int = 64
    max_prompts: int = 128
    pending_uploads: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_seconds"):
                if number(name, value) <= 0 and name != "gather_seconds":
                    raise InputError(f"{name} must be above 0, got {value}")
            elif name not in ("name", "keys", "access", "hosts") and whole_number(name, value) < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        one_of("access", self.access, ("write", "read"))
        if self.upload_bytes > MAX_BYTES:
            raise InputError(f"documents have at most {MAX_BYTES:,} bytes, got upload_bytes={self.upload_bytes:,}")
        if any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in self.keys):
            raise InputError("an API key is at least 8 ASCII characters without spaces")
