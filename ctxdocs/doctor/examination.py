"""An examination from the first line to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ctxdocs.checks import whole_number
from ctxdocs.compressors.kv import KVCompressor
from ctxdocs.compressors.pruning import PruningCompressor
from ctxdocs.doctor.costs import check_size, check_time
from ctxdocs.doctor.exactness import check_blending, check_exactness
from ctxdocs.doctor.material import Material, material
from ctxdocs.doctor.quality import check_composition, check_ratio
from ctxdocs.doctor.report import Check, Report
from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.library import Library
    from ctxdocs.memory import Memory

#: Numbers of documents that are read together, and ratios, that an examination measures.
COUNTS = (2, 4, 8)
RATIOS = (2, 4, 8)
DOCUMENT_TOKENS = 128


def examine(
    compressor: Compressor,
    documents: Sequence[str] | Library | None = None,
    *,
    most: int = COUNTS[-1],
    document_tokens: int = DOCUMENT_TOKENS,
    on_check: Callable[[Check], None] | None = None,
) -> Report:
    """Examine how a model reads memories.

    Parameters
    ----------
    compressor : Compressor
        Of a method without training (see :func:`ctxdocs.doctor.examined`); ratios are measured with its own scores.
    documents : sequence of str, or Library, optional
        What to read: texts, or a library, whose chunks are compressed anew. Default: made-up texts.
    most : int
        Documents that are read together at most; 2, 4 and 8 of them are, as far as they go.
    document_tokens : int
        Tokens of a document at most.
    on_check : callable, optional
        Called with every line as soon as it is found.

    Returns
    -------
    Report
        It has failed if an exact memory is not read as the text.

    Raises
    ------
    InputError
        If the compressor is none of a method without training, there is no text, or a number is out of range.
    ContextTooLong
        If not even one document fits the model.
    """
    if not isinstance(compressor, KVCompressor):
        raise InputError(
            f"{compressor.method} has memories that no prefill can be compared with",
            "load its model with a method without training: load_compressor(name, method='kvzip')",
        )
    for name, value, option in (
        ("most", most, "--documents"),
        ("document_tokens", document_tokens, "--document-tokens"),
    ):
        if whole_number(name, value) < 1:
            raise InputError(f"{name} is {value}, and must be at least 1", f"on the command line it is {option}")
    checks: list[Check] = []
    with torch.no_grad():
        for check in _checks(compressor, material(compressor, documents, most, document_tokens), most):
            checks.append(check)
            if on_check is not None:
                on_check(check)
    return Report(checks)


def _checks(compressor: KVCompressor, texts: Material, most: int) -> Iterator[Check]:
    fitting = texts.fitting(compressor, most)
    yield _about(compressor, texts, fitting, most)
    exact = _compressed(compressor, texts, fitting, 1)
    exactness = check_exactness(compressor, texts, exact)
    yield from exactness
    if Report(exactness).failed:
        yield Check("rest", "note", "not measured, for memories that are not read as their texts")
        return
    counts = [count for count in COUNTS if count < fitting] + [fitting] * (fitting > 1)
    if counts:
        yield check_blending(compressor, texts, exact[: counts[0]])
    composed = []
    for count in counts:
        composed.append(check_composition(compressor, texts, exact[:count]))
        yield composed[-1]
    by_ratio: dict[int, float] = {}
    if isinstance(compressor, PruningCompressor):
        for check in _ratios(compressor, texts, exact, counts or [1]):
            if "ratio" in check.values:
                by_ratio[check.values["ratio"]] = check.values["bytes_per_token"]
            yield check
    yield check_size(exact, by_ratio)
    blends = all(check.values["blended"] for check in composed)
    yield check_time(compressor, texts, exact, "measured" if blends else "left out")


def _about(compressor: KVCompressor, texts: Material, fitting: int, most: int) -> Check:
    model = compressor.backbone
    documents = texts.documents(fitting)
    longest = max(map(len, documents))
    values: dict[str, Any] = {
        "model": compressor.name_or_path or type(compressor.model).__name__,
        "model_type": compressor.model.config.model_type,
        "layers": len(model.layers),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "method": compressor.method,
        "prefix_tokens": len(compressor.prefix_ids),
        "source": texts.source,
        "documents": fitting,
        "document_tokens": longest,
    }
    message = (
        f"{values['model_type']} of {values['layers']} layers, {values['dtype']}, {values['device']}; "
        f"{fitting} {'document' if fitting == 1 else 'documents'} of up to {longest} tokens, {texts.source}"
    )
    if fitting == most:
        return Check("model", "ok", message, values)
    why = f"no more than {fitting} fit {model.limit} positions" if fitting < texts.most else "there are no more"
    return Check("model", "note", f"{message}; {most} were wanted, {why}", values)


def _ratios(
    compressor: PruningCompressor, texts: Material, exact: Sequence[Memory], counts: Sequence[int]
) -> Iterator[Check]:
    for ratio in RATIOS:
        try:
            pruned = _compressed(compressor, texts, counts[-1], ratio)
        except InputError as error:  # the repetition does not fit, or the model's queries are not plain
            yield Check(f"ratio {ratio}", "note", f"not measured: {error}")
        else:
            yield check_ratio(compressor, texts, ratio, exact, pruned, counts)


def _compressed(compressor: KVCompressor, texts: Material, count: int, ratio: int) -> list[Memory]:
    options: dict[str, Any] = {}
    if isinstance(compressor, PruningCompressor):
        options = {"ratio": ratio, "budget": "uniform", "positions": "source"}
    return compressor.compress_ids(texts.documents(count), **options)
