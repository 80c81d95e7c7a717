"""What the processor of this machine can do."""

from __future__ import annotations

from typing import Any


def multiplies_bfloat16() -> bool:
    """Return whether bfloat16 matrices have instructions of their own; where not, float32 is several times faster."""
    import torch

    # Older releases of torch do not tell.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
