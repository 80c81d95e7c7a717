"""How the tensors of a memory are encoded in a shard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from ctxdocs.errors import InputError

Tensors = dict[str, Tensor]

# The floating-point dtypes a memory may have, by the names they go by in the catalog.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Codec(Protocol):
    """Encodes floating-point tensors for the disk; integer tensors pass unchanged."""

    def encode(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return what is stored: tensors by name, the names of the memory's fields or those with a suffix."""
        ...

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
        """Return the tensors by field name, the floating-point ones in ``dtype``."""
        ...


class Exact:
    """Every tensor as it is: what is read is bit for bit what was written."""

    def encode(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return the tensors themselves."""
        return dict(tensors)

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
        """Return the tensors themselves."""
        return dict(stored)


class HalfPrecision:
    """Floating-point tensors rounded to 16 bits.

    Values beyond the range of the type become its largest (float16: 65 504).
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def encode(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return floating-point tensors in the codec's dtype."""
        return {name: self._round(tensor) for name, tensor in tensors.items()}

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
        """Return floating-point tensors in ``dtype``."""
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in stored.items()}

    def _round(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        largest = min(self._largest, torch.finfo(tensor.dtype).max)
        return tensor.clamp(-largest, largest).to(self._dtype)


class Int8:
    """Floating-point tensors in 8 bits with one float32 scale for each row of the last axis.

    A row ``x`` is stored as ``round(x / scale)`` with ``scale = max|x| / 127``, so that no value moves by more than
    half a scale. The scales of ``field`` are stored as ``field.scale``.
    """

    SUFFIX = ".scale"

    def encode(self, tensors: Mapping[str, Tensor]) -> Tensors:
        """Return int8 tensors and their scales."""
        stored = {}
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                stored[name] = tensor
                continue
            values = tensor.float()
            scale = values.abs().amax(dim=-1, keepdim=True) / 127
            if not scale.isfinite().all():
                raise InputError(f"{name} holds values that are not finite and cannot be stored as int8")
            # The smallest normal number keeps rows of zeros (and of denormals) from being divided by zero.
            scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
            stored[name] = (values / scale).round().to(torch.int8)
            stored[name + self.SUFFIX] = scale
        return stored

    def decode(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensors:
        """Return ``int8 * scale`` in ``dtype``."""
        tensors = {}
        for name, tensor in stored.items():
            scale = stored.get(name + self.SUFFIX)
            if scale is not None:
                tensors[name] = (tensor.float() * scale).to(dtype)
            elif not name.endswith(self.SUFFIX):
                tensors[name] = tensor
        return tensors


CODECS: dict[str, Codec] = {
    "exact": Exact(),
    "bfloat16": HalfPrecision(torch.bfloat16),
    "float16": HalfPrecision(torch.float16),
    "int8": Int8(),
}


def get_codec(name: str) -> Codec:
    """Return the codec registered under ``name``; :class:`InputError` if there is none."""
    try:
        return CODECS[name]
    except KeyError as error:
        raise InputError(f"there is no codec {name!r}", f"codecs: {', '.join(CODECS)}") from error
