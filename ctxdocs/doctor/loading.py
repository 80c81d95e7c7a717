"""Which compressor is examined for a model or a library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctxdocs.checkpoints import DEFAULT_METHOD, load_compressor, method_of
from ctxdocs.compressors import compressor_class
from ctxdocs.errors import LibraryError
from ctxdocs.published import BUNDLED

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.library import Library

# Where the base of an adapter lies is told to every method alike.
_PLACES = ("base_model", "finetune")


def examined(
    name_or_path: str | None = None, library: Library | None = None, *, device: str = "auto", dtype: str = "auto"
) -> tuple[Compressor, str | None]:
    """Load what to examine: a model, or the one that a library was made with, under a method without training.

    Memories of a trained method are no part of a prefill, and nothing about them has to be exact. Of such a model the
    base is examined, whose keys and values they are read with.

    Parameters
    ----------
    name_or_path : str, optional
        A checkpoint. Default: the library's, or else the bundled model.
    library : Library, optional
        Says the method, its settings and the dtype, where those are not given otherwise.
    device, dtype : str
        As for ``load_compressor``; ``"auto"`` is the library's dtype.

    Returns
    -------
    compressor : Compressor
        Of a method without training.
    trained : str or None
        The trained method whose base model this is.

    Raises
    ------
    LibraryError
        If the library does not say where its compressor is.
    CheckpointError, InputError
        Of ``load_compressor``.
    """
    settings: dict[str, Any] = {}
    if library is None:
        name = name_or_path or BUNDLED
        made_with = method_of(name)
    else:
        stored = library.store.manifest.compressor
        name, made_with, settings = name_or_path or stored["name_or_path"], stored["method"], stored["settings"]
        dtype = stored["dtype"] if dtype == "auto" else dtype
        if name is None:
            raise LibraryError(f"the library {library.path} does not say where its compressor is", "name the model")
    method, trained = _without_training(made_with)
    if trained:
        settings = {place: settings[place] for place in _PLACES if place in settings}
    return load_compressor(name, method=method, device=device, dtype=dtype, **settings), trained


def _without_training(method: str | None) -> tuple[str, str | None]:
    """Return the method to examine a model under, and the trained one it stands in for."""
    if method is None:
        return DEFAULT_METHOD, None
    if compressor_class(method).is_trained:
        return DEFAULT_METHOD, method
    return (DEFAULT_METHOD if method == "kv" else method), None
