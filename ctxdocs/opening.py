"""The compressor and the embedder that a library was made with: loaded again, and seen to be the same."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from ctxdocs.embedding import Embedder, load_embedder
from ctxdocs.errors import FingerprintMismatch, InputError, LibraryError

if TYPE_CHECKING:
    from ctxdocs.cache import Store
    from ctxdocs.compressors.base import Compressor


def open_compressor(store: Store, given: Any, device: str) -> Compressor:
    """Return the compressor that made a library's memories.

    Parameters
    ----------
    store : Store
        The library's.
    given : Compressor or str or path, optional
        The compressor, or where it is; None takes what the library says.
    device : str
        Where to load it.

    Raises
    ------
    FingerprintMismatch
        If it is another one.
    LibraryError
        If nobody says where it is.
    """
    from ctxdocs.checkpoints import load_compressor
    from ctxdocs.compressors.base import Compressor

    stored = store.manifest.compressor
    if isinstance(given, Compressor):
        compressor = given
    else:
        source = given if given is not None else stored["name_or_path"]
        if source is None:
            raise LibraryError(
                f"the library {store.path} does not say where its compressor is", "pass compressor=... to open it"
            )
        load = functools.partial(load_compressor, source, method=stored["method"], device=device, dtype=stored["dtype"])
        try:
            compressor = load(**stored["settings"])
        except InputError:
            if given is None:
                raise
            # Another model may not even take the library's settings; its fingerprint says best what is wrong.
            compressor = load()
    if compressor.fingerprint != stored["fingerprint"]:
        raise FingerprintMismatch(
            f"the library {store.path} was made by compressor {stored['fingerprint'][:12]} "
            f"({stored['name_or_path'] or stored['method']}), not by {compressor.fingerprint[:12]} "
            f"({compressor.name_or_path or compressor.method})",
            "open it with the compressor that made it, or compress the documents again into a new library",
        )
    return compressor


def open_embedder(store: Store, given: Any, device: str) -> Embedder:
    """Return the embedder that a library was indexed with; ``given`` is it, its name, or None.

    Raises
    ------
    LibraryError
        If it is another one.
    """
    stored = store.manifest.embedder
    embedder = load_embedder(given if given is not None else stored["name"], None if device == "auto" else device)
    if (embedder.name, embedder.dimension) != (stored["name"], stored["dimension"]):
        raise LibraryError(
            f"the library {store.path} was indexed with {stored['name']} ({stored['dimension']} dimensions), "
            f"not with {embedder.name} ({embedder.dimension})",
            "open it with the embedder that made its index",
        )
    return embedder
