"""Memories are closed bundles of tensors."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError, KVMemory, LayerStates, Memory, SoftPrompt

STAMP = {"source_tokens": 9, "fingerprint": "f" * 64}


def by_head():
    """Heads of two layers that keep 9, 4, 0, 9, 3 and 5 slots."""
    lengths = torch.tensor([[9, 4, 0], [9, 3, 5]])
    keys = torch.randn(30, 4)
    return KVMemory(keys=keys, values=-keys, positions=torch.arange(30), lengths=lengths, span=40, **STAMP)


def memories():
    keys = torch.randn(2, 3, 5, 4)
    return [
        SoftPrompt(vectors=torch.randn(5, 8), span=5, **STAMP),
        KVMemory(keys=keys, values=keys + 1, positions=torch.arange(5), span=7, **STAMP),
        KVMemory(keys=keys, values=keys + 1, positions=torch.arange(30).view(2, 3, 5), span=30, **STAMP),
        by_head(),
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
        assert tensor.dtype == (torch.int64 if name in ("positions", "lengths") else torch.float16)
    assert (half.span, half.source_tokens, half.fingerprint) == (memory.span, 9, "f" * 64)


def test_wrong_tensors_are_refused():
    with pytest.raises(InputError, match="vectors must be a floating-point tensor of 2 dimensions"):
        SoftPrompt(vectors=torch.zeros(3), span=3, **STAMP)
    with pytest.raises(InputError, match="disagree on their shapes"):
        KVMemory(
            keys=torch.zeros(1, 1, 3, 2), values=torch.zeros(1, 1, 2, 2), positions=torch.arange(3), span=3, **STAMP
        )
    keys = torch.zeros(3, 2)
    for lengths in ([[1, 1]], [[4, -1]]):
        with pytest.raises(InputError, match="disagree on their shapes"):
            KVMemory(keys=keys, values=keys, positions=torch.arange(3), lengths=torch.tensor(lengths), span=3, **STAMP)
    with pytest.raises(InputError, match="known kinds: kv, layer_states, soft_prompt"):
        Memory.from_tensors("pickle", {}, span=0, **STAMP)
    with pytest.raises(InputError, match="'soft_prompt'"):
        Memory.from_tensors("soft_prompt", {"states": torch.zeros(1, 1)}, span=0, **STAMP)


def test_a_memory_by_head_keeps_its_slots_apart():
    memory = memories()[2]
    apart = memory.by_head()
    assert apart.by_head() is apart
    assert apart.lengths.tolist() == [[5] * 3] * 2
    assert torch.equal(apart.keys.view_as(memory.keys), memory.keys)
    assert torch.equal(apart.positions.view(2, 3, 5), memory.positions)
    assert apart.slots == memory.slots
    assert by_head().slots == 5
    assert by_head().nbytes == 30 * (2 * 4 * 4 + 8) + 6 * 8


def test_joined_memories_stand_side_by_side_in_every_head():
    first, second = memories()[1:3]
    joined = KVMemory.join([first, second])
    assert (joined.slots, joined.span, joined.source_tokens) == (10, 37, 18)
    assert torch.equal(joined.keys[1, 2], torch.cat([first.keys[1, 2], second.keys[1, 2]]))
    assert joined.positions[1, 2].tolist() == [*range(5), *range(32, 37)]
    assert KVMemory.join([first, first]).positions.tolist() == [*range(5), *range(7, 12)]
    third = by_head()
    joined = KVMemory.join([third, first])
    assert joined.lengths.tolist() == [[14, 9, 5], [14, 8, 10]]
    assert torch.equal(joined.keys[14:18], third.keys[9:13])
    assert torch.equal(joined.keys[18:23], first.keys[0, 1])
    assert joined.positions[14:23].tolist() == [9, 10, 11, 12, *range(40, 45)]
    for wrong in ([], [first, by_head().__class__(**vars(third) | {"fingerprint": "0" * 64})]):
        with pytest.raises(InputError, match="of one compressor"):
            KVMemory.join(wrong)
