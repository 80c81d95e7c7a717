"""What must hold on a CUDA device: the numbers of the CPU, in every precision and attention kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ctxdocs import load_compressor
from ctxdocs.doctor import examine

from .conftest import tiny_autocompressor, tiny_kv, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = "cuda"
DOCUMENTS = [list(range(10, 60)), [5, 6, 7], list(range(100, 124)), [9]]
PROMPT = [11, 12, 13, 14]
KERNELS = ["sdpa", "eager"]
if importlib.util.find_spec("flash_attn"):
    KERNELS.append("flash_attention_2")


@pytest.fixture(scope="module", params=["llama", "opt"])
def on_cpu(request):
    return tiny_autocompressor(request.param, segment_tokens=24)


@pytest.fixture
def on_gpu(on_cpu, tmp_path):
    """The same compressor, loaded onto the device."""
    on_cpu.save(tmp_path)
    return lambda **options: load_compressor(tmp_path, device=DEVICE, **options)


def close(actual, expected, tolerance=1e-4):
    torch.testing.assert_close(actual.cpu().float(), expected, rtol=tolerance, atol=tolerance)


def likeness(actual, expected):
    """Cosine of two memories."""
    return torch.cosine_similarity(actual.cpu().float().flatten(), expected.flatten(), dim=0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_float32_equals_the_cpu(on_cpu, on_gpu, kernel):
    compressor = on_gpu(attn_implementation=kernel)
    for memory, expected in zip(compressor.compress_ids(DOCUMENTS), on_cpu.compress_ids(DOCUMENTS), strict=True):
        assert memory.vectors.device.type == DEVICE
        close(memory.vectors, expected.vectors)
    memories, expected_memories = compressor.compress_ids(DOCUMENTS[:2]), on_cpu.compress_ids(DOCUMENTS[:2])
    close(compressor.logits(PROMPT, memories), on_cpu.logits(PROMPT, expected_memories), 1e-3)


def test_every_method_equals_the_cpu(any_compressor, tmp_path):
    any_compressor.save(tmp_path)
    compressor = load_compressor(tmp_path, device=DEVICE, dtype="float32")
    memories, expected_memories = compressor.compress_ids(DOCUMENTS), any_compressor.compress_ids(DOCUMENTS)
    for memory, expected in zip(memories, expected_memories, strict=True):
        for name, tensor in memory.tensors().items():
            assert tensor.device.type == DEVICE
            close(tensor, expected.tensors()[name].float())
    close(compressor.logits(PROMPT, memories[:2]), any_compressor.logits(PROMPT, expected_memories[:2]), 1e-3)
    sessions = compressor.session(), any_compressor.session()
    close(*(session.feed(DOCUMENTS[0]) for session in sessions), 1e-3)


def test_every_method_compresses_in_bfloat16(any_compressor, tmp_path):
    any_compressor.save(tmp_path)
    compressor = load_compressor(tmp_path, device=DEVICE, dtype="bfloat16")
    for memory, expected in zip(
        compressor.compress_ids(DOCUMENTS), any_compressor.compress_ids(DOCUMENTS), strict=True
    ):
        for name, tensor in memory.tensors().items():
            if tensor.is_floating_point():
                assert likeness(tensor, expected.tensors()[name]) > 0.98
    assert len(compressor.generate_ids(PROMPT, compressor.compress_ids(DOCUMENTS[:2]), 8, eos_token_ids=())) == 8


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_stays_near_float32_with_every_kernel(on_cpu, on_gpu, kernel):
    compressor = on_gpu(dtype="bfloat16", attn_implementation=kernel)
    for memory, expected in zip(compressor.compress_ids(DOCUMENTS), on_cpu.compress_ids(DOCUMENTS), strict=True):
        assert memory.vectors.dtype == torch.bfloat16
        assert likeness(memory.vectors, expected.vectors) > 0.99
    assert len(compressor.generate_ids(PROMPT, compressor.compress_ids(DOCUMENTS[:2]), 8, eos_token_ids=())) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_exact_memories_are_read_as_text_and_blended(tmp_path, dtype, kernel):
    tiny_kv("kvzip", model=tiny_model(num_hidden_layers=4), prefix=[3, 9]).save(tmp_path)
    compressor = load_compressor(tmp_path, device=DEVICE, dtype=dtype, attn_implementation=kernel)
    report = examine(compressor, most=3, document_tokens=40)
    assert not report.failed, report.failed


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_batch_equals_its_rows(on_gpu, batch_tokens):
    compressor = on_gpu()
    for document, memory in zip(DOCUMENTS, compressor.compress_ids(DOCUMENTS, batch_tokens=batch_tokens), strict=True):
        close(memory.vectors, compressor.compress_ids([document])[0].vectors.cpu())


def test_greedy_generation_equals_the_cpu(on_cpu, on_gpu):
    expected = on_cpu.generate_ids(PROMPT, on_cpu.compress_ids(DOCUMENTS[:2]), 12, eos_token_ids=())
    compressor = on_gpu()
    assert compressor.generate_ids(PROMPT, compressor.compress_ids(DOCUMENTS[:2]), 12, eos_token_ids=()) == expected


def test_saving_from_the_device_keeps_every_bit(on_cpu, on_gpu, tmp_path):
    compressor = on_gpu()
    compressor.save(tmp_path / "again")
    loaded = load_compressor(tmp_path / "again", device="cpu")
    assert loaded.fingerprint == compressor.fingerprint == on_cpu.fingerprint
    for name, parameter in on_cpu.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_memory_from_the_cpu_is_read_on_the_device_and_moved_once(on_cpu, on_gpu, monkeypatch):
    compressor = on_gpu()
    memory = on_cpu.compress_ids(DOCUMENTS[:1])[0]
    expected = on_cpu.generate_ids(PROMPT, [memory], 8, eos_token_ids=())
    moved = []
    embed_memory = compressor.embed_memory
    monkeypatch.setattr(compressor, "embed_memory", lambda memory: moved.append(memory) or embed_memory(memory))
    assert compressor.generate_ids(PROMPT, [memory], 8, eos_token_ids=()) == expected
    assert moved == [memory]
    assert memory.vectors.device.type == "cpu"
