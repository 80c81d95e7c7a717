"""Budgets, and which slots stay within them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctxdocs import InputError
from ctxdocs.compressors.selection import Budget, at_positions, best_of_all, best_per_head, marked

from .conftest import tiny_kv, tiny_model

DOCUMENT = list(range(20, 68))
METHODS = ("kvzip", "expected_attention", "snapkv", "streaming")


@pytest.mark.parametrize(
    ("settings", "tokens", "slots"),
    [
        ({}, 9, 4),
        ({"ratio": 4}, 100, 25),
        ({"ratio": 49}, 49, 1),
        ({"ratio": 3.5}, 7, 2),
        ({"ratio": 8}, 3, 1),
        ({"ratio": 1}, 3, 3),
        ({"slots": 5}, 100, 5),
        ({"slots": 5}, 3, 3),
    ],
)
def test_budgets(settings, tokens, slots):
    assert Budget(**settings).per_head(tokens) == slots


@pytest.mark.parametrize(
    "settings",
    [
        *({"ratio": value} for value in (0.5, 0, -2, float("nan"), float("inf"), "2", True, None)),
        *({"slots": value} for value in (0, -1, 2.0, "3", True)),
        {"share": "fair"},
    ],
)
def test_budgets_that_cannot_be(settings):
    with pytest.raises(InputError):
        Budget(**settings)


@given(st.data())
def test_the_best_stay_and_equals_are_told_apart_by_layer_head_and_position(data):
    layers, heads, tokens = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    values = data.draw(st.lists(st.integers(0, 4), min_size=layers * heads * tokens, max_size=layers * heads * tokens))
    scores = torch.tensor(values, dtype=torch.float32).view(layers, heads, tokens)
    count = data.draw(st.integers(1, tokens))
    for layer, head in ((layer, head) for layer in range(layers) for head in range(heads)):
        ranked = sorted(range(tokens), key=lambda i: (-scores[layer, head, i].item(), i))
        assert best_per_head(scores, count)[layer, head].tolist() == sorted(ranked[:count])
    rank = data.draw(st.integers(1, scores.numel()))
    ranked = sorted(range(scores.numel()), key=lambda i: (-values[i], i))
    assert best_of_all(scores, rank).flatten().nonzero()[:, 0].tolist() == sorted(ranked[: rank - 1])


def test_slots_are_deleted_and_stay_at_their_places_or_close_up():
    keys = torch.randn(1, 2, 5, 4)
    values = torch.randn(1, 2, 5, 3)
    chosen = torch.tensor([[[0, 3], [1, 4]]])
    source = at_positions(keys, values, chosen, "source")
    assert source.keys.equal(torch.stack([keys[0, 0, [0, 3]], keys[0, 1, [1, 4]]])[None])
    assert source.values.equal(torch.stack([values[0, 0, [0, 3]], values[0, 1, [1, 4]]])[None])
    assert (source.positions.tolist(), source.span, source.lengths) == (chosen.tolist(), 5, None)
    compact = at_positions(keys, values, chosen, "compact")
    assert compact.keys.equal(source.keys)
    assert (compact.positions.tolist(), compact.span) == ([0, 1], 2)
    assert at_positions(keys, values, chosen[:, :1].expand(1, 2, 2), "source").positions.tolist() == [0, 3]
    mask = torch.zeros(1, 2, 5, dtype=torch.bool)
    mask[0, 1, [1, 2, 4]] = True
    source = marked(keys, values, mask, "source")
    assert source.keys.equal(keys[0, 1, [1, 2, 4]])
    assert (source.positions.tolist(), source.lengths.tolist(), source.span) == ([1, 2, 4], [[0, 3]], 5)
    compact = marked(keys, values, mask, "compact")
    assert (compact.positions.tolist(), compact.span) == ([0, 1, 2], 3)


@pytest.mark.parametrize("method", METHODS)
def test_options_of_a_call_come_before_settings(method):
    compressor = tiny_kv(method, ratio=4)

    def slots(**options):
        memory = compressor.compress_ids([DOCUMENT], **options)[0]
        return memory.slots, memory.span

    assert slots() == (12, 48)
    assert slots(ratio=2) == (24, 48)
    assert slots(slots=7) == (7, 48)
    assert slots(slots=1000) == (48, 48)
    assert slots(positions="compact") == (12, 12)
    with compressor.configured(slots=9):
        assert slots() == (9, 48)
        assert slots(ratio=3) == (16, 48)
    with compressor.configured(**compressor.settings_at_ratio(8)):
        assert slots() == (6, 48)
    assert tiny_kv(method, slots=5, positions="compact").fingerprint == compressor.fingerprint
    for options, message in (
        ({"ratio": 2, "slots": 3}, "both ratio and slots"),
        ({"ratio": 0.5}, "ratio is 0.5"),
        ({"slots": 0}, "slots is 0"),
        ({"budget": "fair"}, "unknown budget 'fair'"),
        ({"positions": "close"}, "unknown positions 'close'"),
    ):
        with pytest.raises(InputError, match=message):
            compressor.compress_ids([DOCUMENT], **options)
    with pytest.raises(InputError, match=r"slots must be a whole number, got 2\.5"):
        compressor.session(slots=2.5)
    with pytest.raises(InputError, match="prefix of a compressor cannot"), compressor.configured(prefix="none"):
        pass
    for settings in ({"ratio": 0}, {"slots": -1}, {"budget": "x"}, {"positions": "x"}):
        with pytest.raises(InputError):
            tiny_kv(method, **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_a_ratio_of_one_is_the_exact_memory(method, budget):
    exact = tiny_kv(prefix=[3]).compress_ids([DOCUMENT])[0]
    memory = tiny_kv(method, prefix=[3]).compress_ids([DOCUMENT], ratio=1, budget=budget)[0]
    assert memory.lengths is None
    for name, tensor in exact.tensors().items():
        assert tensor.equal(memory.tensors()[name])


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_is_what_was_read(method):
    """Deleting changes no slot that stays: it is the exact memory's."""
    exact = tiny_kv(prefix=[3]).compress_ids([DOCUMENT])[0]
    compressor = tiny_kv(method, prefix=[3])
    kept = compressor.compress_ids([DOCUMENT], ratio=3)[0]
    places = kept.positions.expand(kept.keys.shape[:3])
    index = places[..., None].expand_as(kept.keys)
    assert kept.keys.equal(exact.keys.gather(2, index))
    assert kept.values.equal(exact.values.gather(2, index))
    shared = compressor.compress_ids([DOCUMENT], ratio=3, budget="global")[0]
    assert shared.lengths.sum() == int(4 * len(DOCUMENT) / 3) - 1
    start = 0
    for number, length in enumerate(shared.lengths.flatten().tolist()):
        here = slice(start, start := start + length)
        assert shared.keys[here].equal(exact.keys.flatten(0, 1)[number, shared.positions[here]])


@pytest.mark.parametrize("method", METHODS)
def test_a_position_each(method):
    """Compact or not, the same slots answer: only their places differ."""
    compressor = tiny_kv(method, model=tiny_model(num_hidden_layers=3), prefix=[3])
    for budget in ("uniform", "global"):
        source, compact = (
            compressor.compress_ids([DOCUMENT], ratio=4, budget=budget, positions=places)[0]
            for places in ("source", "compact")
        )
        assert source.keys.equal(compact.keys)
        assert source.values.equal(compact.values)
        lengths = compact.lengths
        assert compact.span == (compact.slots if lengths is None else int(lengths.max()))
        heads = compact.by_head()
        for positions in heads.positions.split(heads.lengths.flatten().tolist()):
            assert positions.tolist() == list(range(len(positions)))
