"""Memories are closed bundles of tensors."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError, KVMemory, LayerStates, Memory, SoftPrompt

STAMP = {"source_tokens": 9, "fingerprint": "f" * 64}


def memories():
    keys = torch.randn(2, 3, 5, 4)
    return [
        SoftPrompt(vectors=torch.randn(5, 8), span=5, **STAMP),
        KVMemory(keys=keys, values=keys + 1, positions=torch.arange(5), span=7, **STAMP),
        LayerStates(states=torch.randn(5, 3, 8), span=5, **STAMP),
    ]


@pytest.mark.parametrize("memory", memories(), ids=lambda memory: memory.kind)
def test_tensors_rebuild_the_memory(memory):
    again = Memory.from_tensors(memory.kind, memory.tensors(), span=memory.span, **STAMP)
    assert type(again) is type(memory)
    assert again.slots == memory.slots == 5
    assert again.nbytes == sum(tensor.nbytes for tensor in memory.tensors().values())
    assert all(torch.equal(tensor, memory.tensors()[name]) for name, tensor in again.tensors().items())


@pytest.mark.parametrize("memory", memories(), ids=lambda memory: memory.kind)
def test_moving_changes_only_floating_point_tensors(memory):
    half = memory.to(dtype=torch.float16)
    for name, tensor in half.tensors().items():
        assert tensor.dtype == (torch.int64 if name == "positions" else torch.float16)
    assert (half.span, half.source_tokens, half.fingerprint) == (memory.span, 9, "f" * 64)


def test_wrong_tensors_are_refused():
    with pytest.raises(InputError, match="vectors must be a floating-point tensor of 2 dimensions"):
        SoftPrompt(vectors=torch.zeros(3), span=3, **STAMP)
    with pytest.raises(InputError, match="disagree on their shapes"):
        KVMemory(
            keys=torch.zeros(1, 1, 3, 2), values=torch.zeros(1, 1, 2, 2), positions=torch.arange(3), span=3, **STAMP
        )
    with pytest.raises(InputError, match="known kinds: kv, layer_states, soft_prompt"):
        Memory.from_tensors("pickle", {}, span=0, **STAMP)
    with pytest.raises(InputError, match="'soft_prompt'"):
        Memory.from_tensors("soft_prompt", {"states": torch.zeros(1, 1)}, span=0, **STAMP)
