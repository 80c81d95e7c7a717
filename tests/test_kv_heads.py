"""Memories whose heads keep slots of their own number: deleting reads like masking, whatever they are read with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ctxdocs import InputError
from ctxdocs.generation import GenerationOptions, generate
from ctxdocs.modeling.attention_layers import masked_heads
from ctxdocs.modeling.kv import fill_cache
from ctxdocs.modeling.rotary import rotate_keys

from .conftest import tiny_kv, tiny_model
from .test_kv import DOCUMENT, OTHER, PREFIX, PROMPT, close, family
from .test_reading_kv import MODELS


def pruned(compressor, ids, seed=0, keep=0.4):
    """A memory that keeps slots at random, some heads none; and which slots they are, ``[layers, heads, tokens]``."""
    memory = compressor.compress_ids([ids])[0]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(memory.keys.shape[:3], generator=generator) < keep
    kept[0, 0], kept[-1, -1] = False, True
    places = memory.positions.expand(kept.shape)
    parts = {"keys": memory.keys[kept], "values": memory.values[kept], "positions": places[kept]}
    return replace(memory, **parts, lengths=kept.sum(-1)), kept


def masked(compressor, kept, ids, prompt):
    """Logits of a prompt behind the exact cache of prefix and document, in which heads see what they keep."""
    memory = compressor.compress_ids([ids])[0]
    front, model = compressor.prefix_memory(), compressor.model
    keys = torch.cat([front.keys, memory.keys], dim=2)
    text, asked = keys.shape[2], len(prompt)
    cache = fill_cache(
        rotate_keys(model, keys, torch.arange(text))[:, None], torch.cat([front.values, memory.values], dim=2)[:, None]
    )
    groups = model.config.num_attention_heads // kept.shape[1]
    sees = torch.cat([torch.ones(*kept.shape[:2], front.slots, dtype=torch.bool), kept], dim=2)
    sees = sees.repeat_interleave(groups, dim=1)[:, :, None].expand(-1, -1, asked, -1)
    own = torch.ones(asked, asked, dtype=torch.bool).tril().expand(*sees.shape[:2], -1, -1)
    mask = torch.zeros(1).masked_fill(torch.cat([sees, own], dim=3).logical_not(), torch.finfo(torch.float32).min)
    backbone, positions = compressor.backbone, torch.arange(text, text + asked)[None]
    with masked_heads(model, lambda layer: mask[layer][None]):
        hidden = backbone.run(backbone.embed(torch.tensor([prompt])), positions, mask=mask[:1], cache=cache)
    return backbone.head(hidden)[0]


@pytest.fixture(scope="module", params=MODELS)
def exact(request):
    return family(request.param)


def test_deleting_is_masking(exact):
    memory, kept = pruned(exact, DOCUMENT)
    logits = exact.logits(PROMPT, [exact.prefix_memory(), memory])
    close(logits, masked(exact, kept, DOCUMENT, PROMPT))
    assert not torch.allclose(logits, exact.logits(PROMPT, [exact.prefix_memory(), *exact.compress_ids([DOCUMENT])]))


def test_slots_of_equal_number_read_like_a_rectangle(exact):
    first, second = exact.compress_ids([DOCUMENT, OTHER])
    front = exact.prefix_memory()
    together = exact.logits(PROMPT, [front, first, second])
    for memories in ([first.by_head(), second.by_head()], [first, second.by_head()], [first.by_head(), second]):
        close(exact.logits(PROMPT, [front, *memories]), together)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_prompts_of_all_kinds_in_a_batch_are_read_like_each_alone(kernel):
    model = tiny_model(num_hidden_layers=3)
    model.set_attn_implementation(kernel)
    compressor = tiny_kv(model=model, prefix=PREFIX)
    first, second = pruned(compressor, DOCUMENT)[0], pruned(compressor, OTHER, seed=1, keep=0.1)[0]
    whole = compressor.compress_ids([OTHER])[0]
    ids = [torch.tensor(part) for part in ([5, 6, 7, 8], [9], [10, 11])]
    prompts = [
        [compressor.prefix_ids, first, second, ids[0]],
        [ids[1], second, ids[2]],
        [first, ids[1], whole, ids[0], second, ids[2]],
        [whole, ids[0]],
        [ids[0]],
    ]
    options = GenerationOptions(max_new_tokens=8, eos_token_ids=())
    together = [result.ids for result in generate(compressor, prompts, options)]
    for prompt, new in zip(prompts, together, strict=True):
        assert generate(compressor, [prompt], options)[0].ids == new
        # Without the cache: everything is read anew for every token.
        for end in range(len(new)):
            logits, _ = compressor.prefill([[*prompt, torch.tensor(new[:end], dtype=torch.long)]])
            assert int(logits[0].argmax()) == new[end]


def test_a_layer_may_keep_nothing():
    compressor = tiny_kv(prefix="none")
    memory = compressor.compress_ids([DOCUMENT])[0]
    kept = torch.zeros(memory.keys.shape[:3], dtype=torch.bool)
    kept[1, 1, 4:9] = True
    parts = {"keys": memory.keys[kept], "values": memory.values[kept], "positions": torch.arange(4, 9)}
    some = replace(memory, **parts, lengths=kept.sum(-1))
    close(compressor.logits(PROMPT, [some]), masked(compressor, kept, DOCUMENT, PROMPT))
    none = replace(memory, **{name: tensor[:0] for name, tensor in parts.items()}, lengths=torch.zeros(2, 2).long())
    assert (none.slots, none.span) == (0, len(DOCUMENT))
    ids = torch.tensor([PROMPT])
    places = torch.arange(len(DOCUMENT), len(DOCUMENT) + 4)[None]
    close(compressor.logits(PROMPT, [none]), compressor.model(ids, position_ids=places).logits[0])


def test_a_session_goes_on_behind_them():
    compressor = tiny_kv(prefix=PREFIX)
    memory, kept = pruned(compressor, DOCUMENT)
    session = compressor.session([memory])
    fed = torch.cat([session.feed(OTHER[:5]), session.feed(OTHER[5:])])
    close(fed, masked(compressor, kept, DOCUMENT, OTHER))
    closed = session.memory()
    close(
        compressor.logits(PROMPT, [compressor.prefix_memory(), closed]),
        masked(compressor, kept, DOCUMENT, OTHER + PROMPT)[-4:],
    )


def test_a_kernel_without_masks_is_refused_by_name(monkeypatch):
    compressor = tiny_kv(prefix="none")
    memory, _ = pruned(compressor, DOCUMENT)
    monkeypatch.setattr(compressor.model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(InputError, match="need a mask, which flash_attention_2 does not take"):
        compressor.logits(PROMPT, [memory])


def test_hooks_are_removed_whatever_happens():
    compressor = tiny_kv(prefix="none")
    with pytest.raises(ZeroDivisionError), masked_heads(compressor.model, lambda layer: 1 / 0):
        compressor.model(torch.tensor([PROMPT]))
    assert not any(module._forward_pre_hooks for module in compressor.model.modules())
