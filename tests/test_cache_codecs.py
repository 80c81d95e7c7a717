from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctxdocs.cache import CODECS
from ctxdocs.errors import InputError
from tests.cache_samples import STAMP, chunk, create, memory

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def through(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    return CODECS[codec].decode(CODECS[codec].encode({"x": tensor}), tensor.dtype)["x"]


values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6).map(
    lambda numbers: torch.tensor(numbers, dtype=torch.float32).reshape(2, 3)
)


@given(values)
@settings(deadline=None)
def test_exact_changes_nothing(tensor):
    assert torch.equal(through("exact", tensor), tensor)


@given(values, st.sampled_from([("bfloat16", 2**-8), ("float16", 2**-11)]))
@settings(deadline=None)
def test_half_precision_is_off_by_half_a_unit_in_the_last_place(tensor, codec):
    name, relative = codec
    smallest = torch.finfo(getattr(torch, name)).smallest_normal
    assert torch.all((through(name, tensor) - tensor).abs() <= tensor.abs() * relative + smallest)


@given(values)
@settings(deadline=None)
def test_int8_is_off_by_half_a_step_of_its_row(tensor):
    step = (tensor.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    assert torch.all((through("int8", tensor) - tensor).abs() <= step * 0.5001)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_codec_gives_back_dtypes_shapes_and_integers(codec, dtype):
    tensors = memory(0, "kv", dtype).tensors() | {"empty": torch.zeros(0, 4, dtype=dtype)}
    decoded = CODECS[codec].decode(CODECS[codec].encode(tensors), dtype)
    assert decoded.keys() == tensors.keys()
    assert all(one.dtype == tensors[name].dtype and one.shape == tensors[name].shape for name, one in decoded.items())
    assert torch.equal(decoded["positions"], tensors["positions"])


def test_float16_keeps_large_values_finite():
    assert through("float16", torch.tensor([[1e6, -1e6]])).tolist() == [[65504.0, -65504.0]]


def test_int8_refuses_what_has_no_scale():
    with pytest.raises(InputError, match="not finite"):
        through("int8", torch.tensor([[1.0, float("inf")]]))


@pytest.mark.parametrize(("codec", "share"), [("exact", 1), ("bfloat16", 1 / 2), ("int8", 1 / 4 + 1 / 16)])
@pytest.mark.parametrize("kind", ["soft_prompt", "layer_states"])
def test_a_library_stores_memories_by_its_codec(tmp_path, codec, share, kind):
    made = memory(1, kind)
    width = next(iter(made.tensors().values())).shape[-1]
    if codec == "int8":
        share = (1 + 4 / width) / 4
    with create(tmp_path / "library", codec=codec) as store:
        with store.writer() as writer:
            document = writer.begin("a", "1")
            writer.write([chunk(document, "x", 0, made)], [document])
        (stored,) = store.chunks([1])
        (read,) = store.memories([stored])
    assert stored.nbytes == share * made.nbytes
    assert (read.span, read.source_tokens, read.fingerprint) == tuple(STAMP.values())
    for name, tensor in made.tensors().items():
        assert torch.equal(read.tensors()[name], through(codec, tensor))
