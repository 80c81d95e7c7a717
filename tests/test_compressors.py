"""What holds for every compressor: batches equal their rows, memories compose, bad input is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxdocs import FingerprintMismatch, InputError, KVMemory, SoftPrompt
from ctxdocs.compressors import METHODS, compressor_class
from ctxdocs.compressors.batching import batches_by_length
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.modeling.layers import AddedStates
from ctxdocs.modeling.rotary import rotate_keys

from .conftest import tiny_autocompressor

DOCUMENTS = [[5, 6, 7], list(range(10, 60)), [9], list(range(100, 124)), list(range(30, 79))]
PROMPT = [11, 12, 13, 14]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def same_tensors(first, second):
    tensors = second.tensors()
    return all(torch.equal(tensor, tensors[name]) for name, tensor in first.tensors().items())


def joined(first, second):
    """One memory of the slots of two."""
    if getattr(first, "lengths", None) is not None:
        return KVMemory.join([first, second])
    axes = {"keys": 2, "values": 2, "positions": -1}
    if isinstance(first, KVMemory):
        second = replace(second, positions=first.span + second.positions)
        if first.positions.dim() != second.positions.dim():
            shapes = {memory: memory.keys.shape[:3] for memory in (first, second)}
            first, second = (replace(m, positions=m.positions.expand(shape)) for m, shape in shapes.items())
    others = second.tensors()
    tensors = {
        name: torch.cat([tensor, others[name]], dim=axes.get(name, 0)) for name, tensor in first.tensors().items()
    }
    return replace(first, **tensors, span=first.span + second.span)


def test_every_method_is_registered_under_its_own_name():
    assert all(compressor_class(name).method == name for name in METHODS)
    with pytest.raises(InputError, match="known methods: autocompressor"):
        compressor_class("zip")


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_batch_equals_its_rows(any_compressor, batch_tokens):
    together = any_compressor.compress_ids(DOCUMENTS, batch_tokens=batch_tokens)
    for document, memory in zip(DOCUMENTS, together, strict=True):
        alone = any_compressor.compress_ids([document])[0]
        assert memory.source_tokens == len(document)
        assert memory.slots == alone.slots
        close(memory.tensors(), alone.tensors())


def test_texts_compress_like_their_ids(any_compressor):
    text = "The ferry sails twice a day."
    ids = any_compressor.tokenizer(text, add_special_tokens=False)["input_ids"]
    made, same = any_compressor.compress([text])[0], any_compressor.compress_ids([ids])[0]
    assert same_tensors(made, same)


def test_memories_compose_in_any_order(any_compressor):
    first, second = any_compressor.compress_ids(DOCUMENTS[:2])
    both = any_compressor.logits(PROMPT, [first, second])
    assert both.shape == (len(PROMPT), 400)
    close(both, any_compressor.logits(PROMPT, [joined(first, second)]))
    assert not torch.allclose(both, any_compressor.logits(PROMPT, [second, first]), atol=1e-3)


def test_without_memories_the_model_is_the_base_model(any_compressor):
    plain = any_compressor.model(torch.tensor([PROMPT])).logits[0]
    close(any_compressor.logits(PROMPT), plain)


def test_text_may_stand_in_front_of_a_memory(any_compressor):
    memory = any_compressor.compress_ids([DOCUMENTS[1]])[0]
    row = any_compressor.model_input([torch.tensor([3, 4]), memory, torch.tensor(PROMPT)])
    running = 0 if isinstance(memory, KVMemory) else memory.slots
    assert row.is_text.tolist() == [True] * 2 + [False] * running + [True] * 4
    slots = range(2, 2 + running) if any_compressor.backbone.counts_slots else [-1] * running
    assert row.positions.tolist() == [0, 1, *slots, *range(2 + memory.span, 6 + memory.span)]


def test_a_memory_of_another_compressor_is_refused(compressor):
    other = tiny_autocompressor(seed=1)
    memory = other.compress_ids([[5, 6, 7]])[0]
    with pytest.raises(FingerprintMismatch, match=f"{other.fingerprint[:12]}.*{compressor.fingerprint[:12]}"):
        compressor.logits(PROMPT, [memory])


def test_the_fingerprint_tells_weights_settings_and_dtype_apart(compressor):
    fingerprints = {
        tiny_autocompressor().fingerprint,
        tiny_autocompressor(seed=1).fingerprint,
        tiny_autocompressor(accumulate_summary=False).fingerprint,
        tiny_autocompressor().to(torch.bfloat16).fingerprint,
    }
    assert len(fingerprints) == 4
    assert compressor.fingerprint in fingerprints
    assert tiny_autocompressor(segment_tokens=7).fingerprint == compressor.fingerprint


def test_changed_weights_are_another_compressor_once_it_is_told():
    changed = tiny_autocompressor()
    before = changed.fingerprint
    with torch.no_grad():
        changed.embed_summary.weight.add_(1)
    changed.forget_fingerprint()
    assert changed.fingerprint != before


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([], "holds no documents"),
        ([[1, 2], []], "document 1 is empty"),
        ([[1, 400]], "token id 400, outside the vocabulary of 400"),
        ([[-1]], "token id -1"),
        ([[0.5]], "must be integers"),
        ([[[1]]], "1-D tensor"),
        ([["a"]], "must be integers"),
    ],
)
def test_unusable_documents_are_refused(any_compressor, documents, message):
    with pytest.raises(InputError, match=message):
        any_compressor.compress_ids(documents)


def test_a_single_string_is_not_a_list_of_texts(compressor):
    with pytest.raises(InputError, match=r"compress\(\[text\]\)"):
        compressor.compress("one text")


def test_an_empty_prompt_is_refused(compressor):
    with pytest.raises(InputError, match="prompt is empty"):
        compressor.logits([])


def test_a_prompt_beyond_the_positions_says_by_how_much(tokenizer):
    small = tiny_autocompressor(tokenizer=tokenizer, max_position_embeddings=32, segment_tokens=20)
    memories = small.compress_ids([[5, 6, 7]] * 7)
    with pytest.raises(InputError, match="take 34 positions, 2 more than the model's 32"):
        small.logits([1] * 6, memories)
    with pytest.raises(InputError, match="between 1 and 28 tokens"):
        tiny_autocompressor(max_position_embeddings=32, segment_tokens=29)


def unread(compressor):
    """What of a method's own parameters no prompt reads: the last layer's queries and outputs at its slots."""
    last = len(compressor.backbone.layers) - 1
    if compressor.method == "rcc":
        encoder = "gpt_neox.rcc_encoder.gpt_neox."
        feeding = (
            f"gpt_neox.rcc_encoder2gpt_A_matrix.{last}.",
            f"{encoder}layers.{last}.",
            f"{encoder}final_layer_norm.",
        )
        return {name for name in compressor.own_parameters() if name.startswith(feeding)}
    names = compressor.own_parameters()
    leaves = ("q_proj", "o_proj", "up_proj", "down_proj")
    return {name for name in names if f".{last}." in name and name.endswith("weight") and any(map(name.count, leaves))}


def test_gradients_reach_every_parameter_of_the_method_and_the_text(any_compressor):
    trained = copy.deepcopy(any_compressor).requires_grad_(True)
    memories = trained.compress_ids(DOCUMENTS[:2])
    trained.logits(PROMPT, memories).logsumexp(-1).sum().backward()
    own = trained.own_parameters()
    reached = {name for name, parameter in own.items() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert reached == own.keys() - unread(trained)
    text = trained.encoder_backbone if trained.method == "rcc" else trained.backbone
    assert text.embedding.weight.grad[DOCUMENTS[1][:8]].abs().sum() > 0
    assert not any(module._forward_hooks for module in trained.modules())


def test_bfloat16_stays_bfloat16_and_near_float32(any_compressor):
    half = copy.deepcopy(any_compressor).to(torch.bfloat16)
    half.forget_fingerprint()
    documents = [DOCUMENTS[0], DOCUMENTS[3]]
    memories, expected = half.compress_ids(documents), any_compressor.compress_ids(documents)
    for memory, wanted in zip(memories, expected, strict=True):
        for name, tensor in memory.tensors().items():
            if tensor.is_floating_point():
                assert tensor.dtype == torch.bfloat16
                if any_compressor.method in ("kvzip", "expected_attention", "snapkv"):
                    continue  # rounding may tip which of two slots scores higher
                assert torch.cosine_similarity(tensor.float().flatten(), wanted.tensors()[name].flatten(), 0) > 0.98
    logits = half.logits(PROMPT, memories)
    assert logits.dtype == torch.bfloat16
    wanted = any_compressor.logits(PROMPT, expected)
    assert torch.cosine_similarity(logits.float().flatten(), wanted.flatten(), 0) > 0.95
    session = half.session(memories)
    assert session.feed(PROMPT).isfinite().all()
    assert len(session.generate_ids(3, eos_token_ids=())) == 3
    assert {t.dtype for t in session.memory().tensors().values() if t.is_floating_point()} == {torch.bfloat16}


def read_part_by_part(compressor, prompt):
    """The rule of composition by hand: every part is run, or put into the cache, behind those before it."""
    from transformers import DynamicCache

    backbone, cache, offset, hidden = compressor.backbone, DynamicCache(), 0, None
    for part in prompt:
        added, places = (
            None,
            torch.arange(offset, offset + (len(part) if isinstance(part, torch.Tensor) else part.slots)),
        )
        if isinstance(part, torch.Tensor):
            embeds = backbone.embed(part)
        elif isinstance(part, KVMemory):
            keys = rotate_keys(compressor.model, part.keys, offset + part.positions)
            for layer, (key, value) in enumerate(zip(keys, part.values, strict=True)):
                cache.update(key[None], value[None], layer)
            embeds = None
        elif isinstance(part, SoftPrompt):
            embeds, places = part.vectors, places if part.span else torch.full_like(places, -1)
        else:
            embeds, states = compressor.project(part.states)
            added = AddedStates(states, torch.ones(1, part.slots, dtype=torch.bool))
        if embeds is not None:
            hidden = backbone.run(embeds[None], places[None], cache=cache, added=added)
        offset += len(part) if isinstance(part, torch.Tensor) else part.span
    return backbone.head(hidden[0, -1])


@pytest.mark.parametrize("seed", range(4))
def test_memories_and_texts_compose_in_any_order(any_compressor, seed):
    memories = any_compressor.compress_ids(DOCUMENTS[:4])
    if any(isinstance(memory, KVMemory) and memory.lengths is not None for memory in memories):
        pytest.skip("heads of different lengths are held to masking in tests/test_kv_heads.py")
    parts = [*memories, torch.tensor([7]), torch.arange(60, 71), torch.arange(3, 9)]
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    prompt = [*(parts[index] for index in order), torch.tensor(PROMPT)]
    logits, _ = any_compressor.prefill([prompt, prompt[-2:]])
    close(logits[0], read_part_by_part(any_compressor, prompt))
    close(logits[1], read_part_by_part(any_compressor, prompt[-2:]))


def test_plain_causal_attention_stays_maskless(any_compressor, monkeypatch):
    masks = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, *args, attn_mask=None, **kwargs):
        # Few tokens behind a large cache are better off with a mask.
        if query.shape[2] > key.shape[2] / 2:
            masks.append(attn_mask)
        return attention(query, key, *args, attn_mask=attn_mask, **kwargs)

    memories = any_compressor.compress_ids(DOCUMENTS)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    if getattr(any_compressor, "attention", "full-coverage") == "full-coverage":
        # Behind documents of unequal length, padding has to be hidden from what KVzip reads.
        alone = {"batch_tokens": 1} if any_compressor.method == "kvzip" else {}
        any_compressor.compress_ids(DOCUMENTS, **alone)
    any_compressor.logits(PROMPT, memories)
    any_compressor.prefill([[*memories, torch.tensor(PROMPT)], [torch.tensor(PROMPT)]])
    any_compressor.prefill([[torch.tensor(PROMPT)]])
    assert masks
    assert all(mask is None for mask in masks)


def test_no_more_runs_at_once_than_a_batch_may_hold(any_compressor):
    if any_compressor.method == "rcc":
        pytest.skip("RCC runs whole windows, and as many at once as keep the device busy")
    budget, lengths = 100, [90, 80, 70, 60, 50]
    share = any_compressor.tokens_at_once(max(lengths))
    with mock.patch.object(Backbone, "embed", autospec=True, side_effect=Backbone.embed) as embed:
        any_compressor.compress_ids([list(range(10, 10 + length)) for length in lengths], batch_tokens=budget)
    rows = [call.args[1].shape[0] for call in embed.call_args_list]
    assert max(rows) == max(1, min(len(lengths), budget // share))


def test_sessions_pass_no_mask(any_compressor, monkeypatch):
    if getattr(any_compressor, "attention", "full-coverage") != "full-coverage":
        pytest.skip("its gist tokens need one")
    memories, masks = any_compressor.compress_ids(DOCUMENTS[:2]), []
    if any(isinstance(memory, KVMemory) and memory.lengths is not None for memory in memories):
        pytest.skip("heads of different lengths need one")
    run = type(any_compressor.backbone).run

    def watched(self, *args, mask=None, **options):
        masks.append(mask)
        return run(self, *args, mask=mask, **options)

    monkeypatch.setattr(type(any_compressor.backbone), "run", watched)
    session = any_compressor.session(memories)
    session.feed(DOCUMENTS[1])
    session.generate_ids(2, eos_token_ids=())
    session.memory()
    assert masks
    assert all(mask is None for mask in masks)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 200))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_batches_hold_every_index_once_and_stay_within_the_budget(lengths, budget):
    batches = list(batches_by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
