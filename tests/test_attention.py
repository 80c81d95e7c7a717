"""Causal attention without a mask, behind a cache and in front of tokens that have one."""

from __future__ import annotations

import pytest
import torch

from ctxdocs.modeling.attention import causal_kernels, mask_of_all
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.modeling.fixed_cache import fixed_cache
from ctxdocs.modeling.kv import recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys

from .conftest import tiny_model, tiny_rcc

TOKENS, SLOTS = 20, 6


@pytest.fixture(params=["llama", "gpt_neox", "sliding window"])
def backbone(request):
    if request.param == "gpt_neox":
        return Backbone(tiny_rcc().model)
    model = tiny_model("mistral" if request.param == "sliding window" else "llama")
    if request.param == "sliding window":
        model.config.sliding_window = TOKENS + 1  # beyond a window nothing is read: tests/test_families.py
    return Backbone(model)


@pytest.fixture
def embeds(backbone):
    torch.manual_seed(3)
    return backbone.embed(torch.randint(400, (2, TOKENS)))


def place(start, stop):
    return torch.arange(start, stop)[None]


def behind(backbone, embeds):
    """A cache of the first tokens."""
    with recorded_keys_values(backbone.model) as recorded:
        backbone.run(embeds[:, :SLOTS], place(0, SLOTS))
    return fixed_cache(rotate_keys(backbone.model, recorded.keys, torch.arange(SLOTS)), recorded.values)


@pytest.fixture
def masks(monkeypatch):
    """The masks that reach the kernel."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **options):
        seen.append(attn_mask)
        return attention(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    return seen


def test_behind_a_cache_attention_is_causal_and_maskless(backbone, embeds, masks):
    whole = backbone.run(embeds, place(0, TOKENS))
    cache = behind(backbone, embeds)
    masks.clear()
    rest = backbone.run(embeds[:, SLOTS:], place(SLOTS, TOKENS), cache=cache)
    torch.testing.assert_close(rest, whole[:, SLOTS:], rtol=1e-4, atol=1e-5)
    assert masks
    assert all(mask is None for mask in masks)
    assert cache.get_seq_length() == SLOTS  # nothing was kept


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("slots", [0, SLOTS, TOKENS - 4])
def test_a_mask_of_the_last_tokens_leaves_the_others_causal(kernel, slots, embeds, backbone):
    model, masked, tokens = backbone.model, 3, TOKENS - slots
    model.set_attn_implementation(kernel)
    visible = torch.rand(1, 1, masked, TOKENS) > 0.5
    visible[..., 0] = True
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)

    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    size = model.config.hidden_size // model.config.num_attention_heads
    cache = fixed_cache(*torch.randn(2, len(backbone.layers), 2, heads, slots, size))

    def states(mask):
        return backbone.run(embeds[:, slots:], place(slots, TOKENS), mask=mask, cache=cache)

    complete = mask_of_all(mask, tokens)
    assert complete.shape == (1, 1, tokens, TOKENS)
    torch.testing.assert_close(states(mask), states(complete), rtol=1e-4, atol=1e-5)
    if slots == 0:
        assert not torch.allclose(states(mask), states(None), atol=1e-3)


def test_the_implementation_is_put_back_after_an_error():
    model = tiny_model()
    with pytest.raises(KeyError), causal_kernels(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"
