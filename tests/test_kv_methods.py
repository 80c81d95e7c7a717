"""Expected Attention, SnapKV and streaming against their definitions, written down another way."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ctxdocs import InputError
from ctxdocs.modeling.attention_layers import watched_attention
from ctxdocs.modeling.rotary import mean_rotation, rotate_keys

from .conftest import tiny_kv
from .test_kv import DOCUMENT, PREFIX, close, family
from .test_reading_kv import MODELS

TEXT = PREFIX + DOCUMENT


def attention_weights(model, ids):
    """Attention of every layer, ``[layers, heads, tokens, tokens]``, as the model reports it."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights = torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
    model.set_attn_implementation(before)
    return weights


@pytest.mark.parametrize("name", MODELS)
def test_snapkv_averages_what_the_last_tokens_look_at(name):
    compressor = family(name, "snapkv", window=8, kernel=3)
    scores = compressor.score_ids(DOCUMENT)
    weights = attention_weights(compressor.model, TEXT)[:, :, -8:, :-8].mean(2)
    padded = torch.nn.functional.pad(weights, (1, 1))
    pooled = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    pooled = pooled.unflatten(1, (scores.shape[1], -1)).mean(2)
    close(scores[..., :-8], pooled[..., len(PREFIX) :])
    close(scores[..., -8:], (pooled.amax((1, 2), keepdim=True) + 1).expand(-1, scores.shape[1], 8))


@pytest.mark.parametrize("name", MODELS)
def test_the_mean_rotation_is_the_mean_of_the_rotated(name):
    model = family(name).model
    positions = torch.arange(30, 47)
    vector = torch.randn(model.model.layers[0].self_attn.head_dim if name != "gpt-neox" else 8)
    turned = rotate_keys(model, vector.expand(17, -1), positions)
    close(mean_rotation(model, len(vector), positions) @ vector, turned.mean(0))


@pytest.mark.parametrize("name", ["llama-3", "qwen3-yarn", "phi3-partial", "gpt-neox", "gemma2-sliding"])
@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.02}, {"covariance": "off"}, {"value_norm": "off"}])
def test_expected_attention_is_the_log_of_a_mean_over_gaussian_queries(name, settings):
    """Written down query head by query head, with the moments of the queries that the layers project."""
    compressor = family(name, "expected_attention", future_tokens=40, **settings)
    model, layers, cache = compressor.model, [], DynamicCache()
    with watched_attention(model, layers.append):
        compressor.backbone.run(
            compressor.backbone.embed(torch.tensor([TEXT])), torch.arange(len(TEXT))[None], cache=cache
        )
    expected = []
    for layer, cached in zip(layers, cache.layers, strict=True):
        heads, kv_heads = layer.queries.shape[1], layer.keys.shape[1]
        keys, values = cached.keys[0, :, 4:], cached.values[0, :, 4:]
        rotation = mean_rotation(model, keys.shape[-1], torch.arange(len(TEXT), len(TEXT) + 40))
        attention = []
        for head in range(heads):
            queries = layer.queries[0, head, 4:] @ rotation.T
            own = keys[head * kv_heads // heads]
            exponent = own @ queries.mean(0) * layer.scaling
            if settings.get("covariance") != "off":
                products = (own @ (queries - queries.mean(0)).T) * layer.scaling
                exponent = exponent + products.square().mean(1) / 2
            attention.append(exponent.softmax(0))
        score = torch.stack(attention).view(kv_heads, -1, len(TEXT) - 4).mean(1)
        if settings.get("value_norm") != "off":
            score = (score + settings.get("epsilon", 0)) * values.norm(dim=-1)
        expected.append(torch.cat([(score.max() + 1).expand(kv_heads, 4), score], dim=1))
    close(compressor.score_ids(DOCUMENT), torch.stack(expected)[..., len(PREFIX) :])


def test_streaming_keeps_the_first_and_the_last_in_all_heads():
    compressor = tiny_kv("streaming", prefix=[3], slots=10, sink_tokens=4)
    memory = compressor.compress_ids([DOCUMENT])[0]
    assert memory.positions.tolist() == [0, 1, 2, *range(34, 41)]
    few = compressor.compress_ids([DOCUMENT], slots=2)[0]
    assert few.positions.tolist() == [0, 1]
    assert tiny_kv("streaming", slots=3, sink_tokens=0).compress_ids([DOCUMENT])[0].positions.tolist() == [38, 39, 40]
    shared = compressor.compress_ids([DOCUMENT], budget="global")[0]
    assert shared.lengths.tolist() == [[10, 10], [10, 9]]


def test_a_window_is_no_longer_than_the_budget():
    compressor = tiny_kv("snapkv")
    assert compressor.compress_ids([DOCUMENT], slots=5)[0].positions.tolist() == list(range(36, 41))
    assert compressor.score_ids([5]).tolist() == [[[1], [1]], [[1], [1]]]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("streaming", {"sink_tokens": -1}),
        ("snapkv", {"window": 0}),
        ("snapkv", {"kernel": 4}),
        ("expected_attention", {"future_tokens": 0}),
        ("expected_attention", {"epsilon": -0.1}),
        ("expected_attention", {"covariance": "yes"}),
        ("expected_attention", {"value_norm": True}),
    ],
)
def test_settings_that_cannot_be_used(method, settings):
    with pytest.raises(InputError):
        tiny_kv(method, **settings)
