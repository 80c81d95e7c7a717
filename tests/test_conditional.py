"""Layers that put out something else on marked rows."""

from __future__ import annotations

import torch
from torch import nn

from ctxdocs.modeling.conditional import changed_rows


def test_marked_rows_use_other_weights_and_the_others_stay_bit_for_bit():
    torch.manual_seed(0)
    layer, other = nn.Linear(4, 6), nn.Linear(4, 6)
    x = torch.randn(2, 5, 4)
    marked = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]).bool()
    plain = layer(x)
    with changed_rows({layer: lambda inputs, outputs: other(inputs)}, marked):
        changed = layer(x)
    assert torch.equal(changed[~marked], plain[~marked])
    torch.testing.assert_close(changed[marked], other(x)[marked])
    assert torch.equal(layer(x), plain)
    with changed_rows({layer: lambda inputs, outputs: other(inputs)}, torch.zeros_like(marked)):
        assert torch.equal(layer(x), plain)


def test_gradients_reach_both_weights_and_hooks_go_with_an_error():
    layer, delta = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    x, marked = torch.randn(1, 3, 4), torch.tensor([[False, True, False]])
    with changed_rows({layer: lambda inputs, outputs: outputs + delta(inputs)}, marked):
        layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad[0], x[0].sum(0))
    torch.testing.assert_close(delta.weight.grad[0], x[0, 1])
    try:
        with changed_rows({layer: lambda inputs, outputs: outputs * 0}, marked):
            raise KeyError
    except KeyError:
        assert not layer._forward_hooks
