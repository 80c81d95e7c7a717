"""What a document becomes: small, closed bundles of tensors that a language model reads in its place.

Three kinds cover the published methods. All of them live without a model and without a disk; they know how many
slots they hold, how many positions they span when read, and which compressor made them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ctxdocs.errors import InputError

M = TypeVar("M", bound="Memory")


@dataclass(frozen=True, eq=False, kw_only=True)
class Memory:
    """Base of the three kinds of memory.

    Parameters
    ----------
    span : int
        Positions the memory takes up when it is read: whatever follows continues ``span`` positions later.
    source_tokens : int
        Text tokens that were compressed into it.
    fingerprint : str
        Fingerprint of the compressor that made it (sha256, hexadecimal); no other compressor reads it.
    """

    span: int
    source_tokens: int
    fingerprint: str

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[Memory]]] = {}

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        Memory.kinds[cls.kind] = cls

    @classmethod
    def from_tensors(
        cls, kind: str, tensors: dict[str, Tensor], *, span: int, source_tokens: int, fingerprint: str
    ) -> Memory:
        """Rebuild a memory from its kind and what :meth:`tensors` returned.

        Raises
        ------
        InputError
            If the kind is unknown or the tensors are not those of the kind.
        """
        try:
            return cls.kinds[kind](**tensors, span=span, source_tokens=source_tokens, fingerprint=fingerprint)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"no memory of kind {kind!r} can be built from tensors {sorted(tensors)}",
                f"known kinds: {', '.join(sorted(cls.kinds))}",
            ) from error

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by field name; with the three numbers they are the whole memory."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def slots(self) -> int:
        """Number of slots: what the model attends to instead of ``source_tokens`` tokens."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def to(self: M, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> M:
        """Return the memory on another device or in another floating-point dtype (integers stay integers)."""
        moved = {
            name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slots={self.slots}, span={self.span}, "
            f"source_tokens={self.source_tokens}, fingerprint={self.fingerprint[:12]!r})"
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SoftPrompt(Memory):
    """Summary vectors, read as input embeddings (AutoCompressor, arXiv 2305.14788).

    Parameters
    ----------
    vectors : torch.Tensor
        ``[slots, hidden]``, floating point. ``slots`` may be 0: such a memory says nothing.
    """

    kind: ClassVar[str] = "soft_prompt"

    vectors: Tensor

    def __post_init__(self) -> None:
        _check("vectors", self.vectors, 2)

    @property
    def slots(self) -> int:
        """Number of summary vectors."""
        return self.vectors.shape[0]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class KVMemory(Memory):
    """A short key/value cache without a place of its own.

    Key ``i`` is read at offset ``o`` as ``R(o + positions[i]) @ keys[i]``, with ``R`` the rotary embedding of the
    model, and whatever follows continues at ``o + span``.

    Every head of every layer keeps as many slots as the others, and the tensors are rectangular; or heads keep as many
    as each of them needs, and ``lengths`` says how many. Their slots then stand one behind another, layer by layer,
    head by head, so that nothing is stored for heads that keep little.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``[layers, kv_heads, slots, head_dim]``, floating point; keys before the rotary embedding. With ``lengths``:
        ``[kept, head_dim]``.
    positions : torch.Tensor
        ``[slots]``, or ``[layers, kv_heads, slots]`` where heads keep different tokens, or ``[kept]`` with
        ``lengths``; int64, relative to the place where the memory is read.
    lengths : torch.Tensor, optional
        ``[layers, kv_heads]``, int64: slots of each head, ``kept`` in sum.
    """

    kind: ClassVar[str] = "kv"

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        dimensions = 4 if self.lengths is None else 2
        _check("keys", self.keys, dimensions)
        _check("values", self.values, dimensions)
        by_head = self.lengths is None and self.positions.dim() == 3
        _check("positions", self.positions, 3 if by_head else 1, floating=False)
        slots = self.keys.shape[:-1]
        agree = self.values.shape[:-1] == slots and self.positions.shape == (slots if by_head else slots[-1:])
        if self.lengths is not None:
            _check("lengths", self.lengths, 2, floating=False)
            agree &= bool((self.lengths >= 0).all()) and int(self.lengths.sum()) == slots[0]
        if not agree:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors().items()}
            raise InputError(f"keys, values and positions disagree on their shapes: {shapes}")

    @property
    def slots(self) -> int:
        """Number of cached keys per head; of heads that keep different numbers the mean, rounded up."""
        return self.keys.shape[2] if self.lengths is None else -(-len(self.keys) // max(self.lengths.numel(), 1))

    def by_head(self) -> KVMemory:
        """Return the same memory with ``lengths``, every head's slots for themselves."""
        if self.lengths is not None:
            return self
        layers, heads, slots, _ = self.keys.shape
        return replace(
            self,
            keys=self.keys.flatten(0, 2),
            values=self.values.flatten(0, 2),
            positions=self.positions.expand(layers, heads, slots).flatten(),
            lengths=torch.full((layers, heads), slots, device=self.positions.device),
        )

    @staticmethod
    def join(memories: Sequence[KVMemory]) -> KVMemory:
        """Return one memory that reads like several in this order; all of one compressor.

        Raises
        ------
        InputError
            If there are none, or they are of different compressors.
        """
        if len({memory.fingerprint for memory in memories}) != 1:
            raise InputError("only memories of one compressor, at least one, can be joined")
        if any(memory.lengths is not None for memory in memories):
            memories = [memory.by_head() for memory in memories]
            lengths = [memory.lengths for memory in memories if memory.lengths is not None]
            order: Tensor | slice = order_by_head(lengths)
            axis = 0
        else:
            lengths, order, axis = [], slice(None), 2
        starts = [0, *itertools.accumulate(memory.span for memory in memories)]
        positions = [start + memory.positions for start, memory in zip(starts, memories, strict=False)]
        if any(each.dim() == 3 for each in positions):
            positions = [each.expand(memory.keys.shape[:3]) for each, memory in zip(positions, memories, strict=True)]
        return replace(
            memories[0],
            keys=torch.cat([memory.keys for memory in memories], dim=axis)[order],
            values=torch.cat([memory.values for memory in memories], dim=axis)[order],
            positions=torch.cat(positions, dim=-1)[order],
            lengths=torch.stack(lengths).sum(0) if lengths else None,
            span=starts[-1],
            source_tokens=sum(memory.source_tokens for memory in memories),
        )


def order_by_head(lengths: Sequence[Tensor]) -> Tensor:
    """Return the order that puts slots of several memories side by side in every head.

    Parameters
    ----------
    lengths : sequence of torch.Tensor
        Of each memory ``[layers, kv_heads]``, int64.

    Returns
    -------
    torch.Tensor
        ``[kept by all]``, int64: indices into the slots of the memories, one memory behind another.
    """
    heads = [torch.arange(each.numel(), device=each.device).repeat_interleave(each.flatten()) for each in lengths]
    return torch.cat(heads).argsort(stable=True)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LayerStates(Memory):
    """Hidden states of every layer at the memory slots (RCC, arXiv 2406.06110).

    Parameters
    ----------
    states : torch.Tensor
        ``[slots, layers + 1, hidden]``, floating point: the input embedding, then each layer's output.
    """

    kind: ClassVar[str] = "layer_states"

    states: Tensor

    def __post_init__(self) -> None:
        _check("states", self.states, 3)

    @property
    def slots(self) -> int:
        """Number of memory slots."""
        return self.states.shape[0]


def _check(name: str, tensor: Tensor, dimensions: int, *, floating: bool = True) -> None:
    if tensor.dim() != dimensions or tensor.is_floating_point() != floating:
        wanted = "floating-point" if floating else "integer"
        raise InputError(
            f"{name} must be a {wanted} tensor of {dimensions} dimensions, got {tensor.dtype} {tuple(tensor.shape)}"
        )
