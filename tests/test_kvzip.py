"""KVzip's scores against the attention that the model itself reports; its requests, its batches, its size."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctxdocs import InputError
from ctxdocs.compressors import kvzip
from ctxdocs.compressors.kvzip import FIRST_REQUEST, NEXT_REQUEST, QUOTED_TOKENS
from ctxdocs.errors import ContextTooLong

from .conftest import tiny_kv, tiny_model
from .test_conversation import CHATML
from .test_kv import DOCUMENT, PREFIX, BosTokenizer, close, family
from .test_reading_kv import MODELS

REQUEST = {"first": [100, 101, 102], "next": [103, 104], "suffix": [105]}


def by_the_models_own_attention(compressor, document, pieces):
    """Score as the definition has it, from attention weights over the whole context, made anew over a part of it."""
    model, start = compressor.model, len(PREFIX)
    model.set_attn_implementation("eager")
    scores = []
    for number, piece in enumerate(pieces):
        front = REQUEST["next"] + pieces[number - 1][-8:] if number else REQUEST["first"]
        asked = front + REQUEST["suffix"] + piece
        whole = PREFIX + document + asked
        weights = torch.stack(model(torch.tensor([whole]), output_attentions=True).attentions)[:, 0]
        first = start + sum(map(len, pieces[:number]))
        last, own = first + len(piece), len(whole) - len(asked)
        seen = [*range(start), *range(first, last), *range(own, len(whole))]
        rows = weights[:, :, own:, seen]
        rows = rows / rows.sum(-1, keepdim=True)
        best = rows[..., start : start + len(piece)].amax(2)
        groups = (
            weights.shape[1] // model.config.num_key_value_heads if hasattr(model.config, "num_key_value_heads") else 1
        )
        scores.append(best.unflatten(1, (-1, groups)).amax(2))
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    return torch.cat(scores, dim=2)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_models_attention_over_prefix_piece_and_repetition(name):
    compressor = family(name, "kvzip", piece_tokens=17, request=REQUEST)
    pieces = [DOCUMENT[:17], DOCUMENT[17:34], DOCUMENT[34:]]
    scores = compressor.score_ids(DOCUMENT)
    assert scores.dtype == torch.float32
    close(scores, by_the_models_own_attention(compressor, DOCUMENT, pieces))


def test_however_the_rows_are_cut_scores_are_the_same(monkeypatch):
    compressor = tiny_kv("kvzip", prefix=PREFIX, request=REQUEST)
    at_once = compressor.score_ids(DOCUMENT)
    for entries in (1, 700, 2000):
        monkeypatch.setitem(kvzip._AT_ONCE, "cpu", entries)
        close(compressor.score_ids(DOCUMENT), at_once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("budget", ["uniform", "global"])
def test_a_batch_of_unequal_documents_equals_its_rows(budget):
    compressor = tiny_kv("kvzip", prefix=PREFIX, piece_tokens=16, budget=budget)
    documents = [DOCUMENT, DOCUMENT[:33], DOCUMENT[3:20], DOCUMENT[5:10], DOCUMENT[:32]]
    together = compressor.compress_ids(documents, batch_tokens=10_000)
    for document, memory in zip(documents, together, strict=True):
        alone = compressor.compress_ids([document])[0]
        assert memory.positions.equal(alone.positions)
        close(memory.tensors(), alone.tensors())


def test_scoring_leaves_the_cache_as_it_was():
    compressor = tiny_kv("kvzip", prefix=PREFIX, piece_tokens=16)
    documents = [torch.tensor(DOCUMENT[:20]), torch.tensor(DOCUMENT[:19])]
    reading, _ = compressor.scored(documents, (), [10, 9])
    untouched = compressor.read(documents)
    assert reading.batch.cache.get_seq_length() == untouched.batch.cache.get_seq_length() == len(PREFIX) + 20
    for layer, other in zip(reading.batch.cache.layers, untouched.batch.cache.layers, strict=True):
        assert layer.keys.equal(other.keys)
        assert layer.values.equal(other.values)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in compressor.model.modules())


class Largest(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def test_the_largest_tensor_grows_with_the_document_and_not_with_its_square():
    compressor = tiny_kv("kvzip", prefix=PREFIX, piece_tokens=32)
    sizes = {}
    for tokens in (256, 1024):
        with Largest() as largest:
            compressor.compress_ids([[token % 390 for token in range(tokens)]])
        sizes[tokens] = largest.entries
    assert sizes[1024] <= 4 * sizes[256]
    assert sizes[1024] < 1024 * 1024  # nor is one head's attention ever whole


def test_the_model_is_asked_in_words(tokenizer):
    compressor = tiny_kv("kvzip", tokenizer=BosTokenizer(tokenizer, CHATML), prefix="bos", piece_tokens=20)
    pieces = torch.tensor(DOCUMENT).split(20)

    def asked(number):
        return tokenizer.decode(compressor.request_ids().for_piece(pieces, number))

    text = [tokenizer.decode(piece) for piece in pieces]
    assert asked(0) == f"{FIRST_REQUEST}\n{text[0]}"
    quoted = tokenizer.decode(pieces[1][-QUOTED_TOKENS:])
    assert asked(2) == f"{NEXT_REQUEST}{quoted}\n{text[2]}"
    compressor = tiny_kv("kvzip", tokenizer=BosTokenizer(tokenizer, CHATML), piece_tokens=20)
    assert asked(0) == f"{FIRST_REQUEST}<|im_end|>\n<|im_start|>assistant\n{text[0]}"


def test_a_thinking_model_answers_at_once(tokenizer):
    thinks = CHATML.replace(
        "<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}"
        "{% endif %}{% endif %}",
    )
    compressor = tiny_kv("kvzip", tokenizer=BosTokenizer(tokenizer, thinks), prefix="chat")
    assert tokenizer.decode(compressor.request_ids().suffix).endswith("assistant\n<think></think>")


def test_without_a_tokenizer_the_model_repeats_unasked():
    compressor = tiny_kv("kvzip", piece_tokens=20)
    pieces = torch.tensor(DOCUMENT).split(20)
    assert compressor.request_ids().for_piece(pieces, 0).equal(pieces[0])
    assert compressor.request_ids().for_piece(pieces, 1).equal(torch.cat([pieces[0][-8:], pieces[1]]))
    assert compressor.run_settings["request"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"piece_tokens": 0}, "at least one token"),
        ({"request": {"first": [1]}}, "ids for first, next, suffix, not for first"),
        ({"request": {**REQUEST, "next": [400]}}, "token id 400"),
    ],
)
def test_settings_that_cannot_be_used(settings, message):
    with pytest.raises(InputError, match=message):
        tiny_kv("kvzip", **settings)


def test_the_repetition_has_to_fit_too():
    small = tiny_kv("kvzip", model=tiny_model(max_position_embeddings=64), request=REQUEST)
    with pytest.raises(ContextTooLong, match="a document and its repetition take 66 positions, 2 more"):
        small.compress_ids([list(range(31))])
    assert small.compress_ids([list(range(30))])[0].slots == 15
    with small.configured(piece_tokens=10):
        assert small.compress_ids([list(range(40))])[0].slots == 20
    # What keeps everything is not asked for.
    assert small.compress_ids([list(range(60))], ratio=1)[0].slots == 60


def test_queries_of_another_kind_are_refused(monkeypatch):
    compressor = tiny_kv("kvzip")
    monkeypatch.setattr(compressor.model.config, "num_attention_heads", 8)
    with pytest.raises(InputError, match="something beside, or other than, plain queries"):
        compressor.compress_ids([DOCUMENT])


def test_a_session_is_scored_behind_what_it_started_from():
    for budget in ("uniform", "global"):
        compressor = tiny_kv("kvzip", prefix=PREFIX, piece_tokens=16, budget=budget)
        memory = compressor.compress_ids([DOCUMENT])[0]
        session = compressor.session([memory], ratio=4)
        session.feed(DOCUMENT[::-1])
        closed = session.memory()
        assert closed.span == 2 * len(DOCUMENT)
        kept = closed.by_head().lengths - memory.by_head().lengths
        expected = int(4 * len(DOCUMENT) / 4) - 1 if budget == "global" else 4 * (len(DOCUMENT) // 4)
        assert int(kept.sum()) == expected
        # Behind nothing it is the document's memory.
        session = compressor.session(ratio=4)
        session.feed(DOCUMENT)
        alone = compressor.compress_ids([DOCUMENT], ratio=4)[0]
        close(session.memory().tensors(), alone.tensors())
