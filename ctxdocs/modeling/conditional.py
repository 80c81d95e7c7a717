"""Linear layers that put out something else on marked rows: other weights, or a LoRA on for some tokens only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import Tensor, nn

from ctxdocs.modeling.recompute import entered_again

#: From a layer's inputs ``[rows, in]`` and outputs ``[rows, out]`` at the marked rows to its new outputs there.
Change: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def changed_rows(changes: Mapping[nn.Module, Change], marked: Tensor) -> Iterator[None]:
    """Change what layers put out on marked rows while the block runs.

    Outputs are changed in place, so a layer has to put out a tensor of its own. Rows that are not marked keep the
    layer's own outputs, bit for bit. Gradients flow through both.

    Parameters
    ----------
    changes : mapping of torch.nn.Module to callable
        The layers and what they put out instead; layers take ``[batch, tokens, in]``.
    marked : torch.Tensor
        ``[batch, tokens]``, bool. Where nothing is marked, no layer is touched.
    """
    if not bool(marked.any()):
        yield
        return
    # Found once, because every search for marked rows waits for the device.
    rows = marked.flatten().nonzero().squeeze(1)

    def hook_for(change: Change) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            flat_inputs, flat = inputs[0].flatten(0, -2), output.flatten(0, -2)
            new = change(flat_inputs.index_select(0, rows), flat.index_select(0, rows))
            return flat.index_copy_(0, rows, new.to(flat.dtype)).view_as(output)

        return hook

    @contextmanager
    def hooked() -> Iterator[None]:
        hooks = [module.register_forward_hook(hook_for(change)) for module, change in changes.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    with entered_again(hooked):
        yield
