"""The fingerprint of a compressor: what its memories may be read by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(module: nn.Module, stamp: Mapping[str, Any]) -> str:
    """Return the sha256 (hexadecimal) over a JSON-able stamp and every parameter's name, dtype, shape and bytes.

    Tied parameters count once. Tensors are hashed apart, in threads (hashing releases the interpreter lock), and the
    result is the hash of those hashes in the order of names.
    """
    parameters = sorted(module.named_parameters())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda item: _digest(item[1]), parameters))
    total = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode())
    for (name, parameter), digest in zip(parameters, digests, strict=True):
        total.update(f"{name}|{parameter.dtype}|{tuple(parameter.shape)}|".encode())
        total.update(digest)
    return total.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).digest()
