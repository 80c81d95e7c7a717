"""Key/value memories: what a forward computed, put back behind any prefix and in any order, is what it would see."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError, KVMemory, LayerStates
from ctxdocs.compressors.kv import KVCompressor as Exact
from ctxdocs.generation import GenerationOptions, generate
from ctxdocs.modeling.rotary import rotate_keys

DOCUMENT = list(range(20, 37))
OTHER = list(range(60, 71))
PROMPT = [5, 6, 7, 8]
TINY = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GQA = {"num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
HALF = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MODELS = {
    "llama": ("LlamaConfig", GQA),
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-3": ("LlamaConfig", {**GQA, "rope_parameters": LLAMA3}),
    "mistral": ("MistralConfig", {**GQA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", {**GQA, "head_dim": 16}),
    "qwen3-yarn": ("Qwen3Config", {**GQA, "head_dim": 8, "rope_parameters": YARN}),
    "phi3": ("Phi3Config", GQA),
    "phi3-partial": ("Phi3Config", {**GQA, "rope_parameters": HALF}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gemma2-sliding": ("Gemma2Config", {**GQA, "head_dim": 16, "sliding_window": 256}),
}


@pytest.fixture(scope="module", params=MODELS)
def exact(request):
    import transformers

    name, settings = MODELS[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, name)(**{**TINY, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Exact(model).requires_grad_(False)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def plain(compressor, ids):
    return compressor.model(torch.tensor([ids])).logits[0]


def test_an_exact_memory_equals_the_text(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    assert memory.slots == memory.span == memory.source_tokens == len(DOCUMENT)
    close(exact.logits(PROMPT, [memory]), plain(exact, DOCUMENT + PROMPT)[len(DOCUMENT) :])


def test_only_the_distance_between_positions_counts(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    shifted = KVMemory(
        keys=memory.keys,
        values=memory.values,
        positions=memory.positions + 40,
        span=memory.span + 40,
        source_tokens=17,
        fingerprint=exact.fingerprint,
    )
    close(exact.logits(PROMPT, [shifted]), exact.logits(PROMPT, [memory]))


def test_text_in_front_of_a_memory_neither_sees_it_nor_is_lost(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    row = exact.model_input([torch.tensor(OTHER), memory, torch.tensor(PROMPT)])
    assert row.positions.tolist() == [*range(11), *range(28, 32)]
    logits, _ = exact.prefill([[torch.tensor(OTHER), memory, torch.tensor(PROMPT)]])
    # The same by hand: both parts as memories made alone, each at its place.
    parts = exact.compress_ids([OTHER, DOCUMENT])
    close(logits[0], exact.logits(PROMPT, parts)[-1])
    before, _ = exact.prefill([[torch.tensor(OTHER), memory, torch.tensor(PROMPT)], [torch.tensor(OTHER)]])
    close(before[1], plain(exact, OTHER)[-1])


def test_generation_from_a_batch_of_unequal_memories_equals_each_alone(exact):
    first, second = exact.compress_ids([DOCUMENT, OTHER])
    prompts = [
        [first, second, torch.tensor(PROMPT)],
        [second, torch.tensor(PROMPT[:2])],
        [torch.tensor([9, 10, 11, 12, 13, 14])],
        [torch.tensor([9]), first, torch.tensor(PROMPT)],
    ]
    options = GenerationOptions(max_new_tokens=6, eos_token_ids=())
    together = [result.ids for result in generate(exact, prompts, options)]
    assert together == [generate(exact, [prompt], options)[0].ids for prompt in prompts]
    text = OTHER + PROMPT[:2]
    for token in together[1]:
        assert token == int(plain(exact, text)[-1].argmax())
        text = [*text, token]


def test_a_memory_in_front_keeps_the_pass_maskless(exact, monkeypatch):
    seen = []
    run = type(exact.backbone).run
    monkeypatch.setattr(
        type(exact.backbone),
        "run",
        lambda self, *args, mask=None, **options: (seen.append(mask), run(self, *args, mask=mask, **options))[1],
    )
    memories = exact.compress_ids([DOCUMENT, OTHER])
    exact.logits(PROMPT, memories)
    exact.prefill([[*memories, torch.tensor(PROMPT)], [*memories, torch.tensor(PROMPT[:2])]])
    assert seen
    assert all(mask is None for mask in seen)


def test_rotating_to_zero_changes_nothing(exact):
    memory = exact.compress_ids([DOCUMENT])[0]
    turned = rotate_keys(exact.model, memory.keys, torch.zeros(len(DOCUMENT), dtype=torch.long))
    # YaRN scales the turning dimensions beside turning them.
    close(turned, memory.keys * exact.model.base_model.rotary_emb.attention_scaling)


def test_a_model_without_rotary_embedding_and_a_memory_without_a_place_are_refused():
    from .conftest import tiny_autocompressor, tiny_model

    with pytest.raises(InputError, match="OPTForCausalLM has no rotary embedding"):
        rotate_keys(tiny_model("opt"), torch.zeros(1, 2, 3, 4), torch.arange(3))
    compressor = tiny_autocompressor()
    states = LayerStates(states=torch.zeros(1, 3, 32), span=1, source_tokens=1, fingerprint=compressor.fingerprint)
    with pytest.raises(InputError, match="kind layer_states cannot be read"):
        compressor.logits(PROMPT, [states])
