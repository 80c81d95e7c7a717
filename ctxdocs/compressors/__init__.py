"""Compressors: one file per method. A compressor writes memories and reads them back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor

#: Every method and where its compressor lives; imported when asked for.
METHODS: dict[str, str] = {
    "autocompressor": "ctxdocs.compressors.autocompressor:AutoCompressor",
    "beacon": "ctxdocs.compressors.gist:ActivationBeacon",
    "ultragist": "ctxdocs.compressors.gist:UltraGist",
    "rcc": "ctxdocs.compressors.rcc:RCC",
    "ccm": "ctxdocs.compressors.ccm:CCM",
    "kv": "ctxdocs.compressors.kv:KVCompressor",
    "kvzip": "ctxdocs.compressors.kvzip:KVzip",
    "expected_attention": "ctxdocs.compressors.expected_attention:ExpectedAttention",
    "snapkv": "ctxdocs.compressors.snapkv:SnapKV",
    "streaming": "ctxdocs.compressors.streaming:Streaming",
}


def compressor_class(method: str) -> type[Compressor]:
    """Return the compressor class of a method.

    Raises
    ------
    InputError
        If no method has that name.
    """
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}", f"known methods: {', '.join(METHODS)}")
    module, _, name = METHODS[method].partition(":")
    return getattr(importlib.import_module(module), name)
