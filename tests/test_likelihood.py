"""How likely texts are behind memories, for every method; and passages ranked by it."""

from __future__ import annotations

import pytest
import torch

from ctxdocs import InputError
from ctxdocs.errors import ContextTooLong
from ctxdocs.likelihood import likelihoods
from ctxdocs.prompts import PromptFormat
from ctxdocs.reranking import question_likelihoods

from .conftest import tiny_autocompressor, tiny_gist

QUESTION = "When was the lighthouse built?"


def ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(2, 400, (count,), generator=torch.Generator().manual_seed(seed))


def test_likelihoods_are_those_of_the_logits_alone_and_in_a_batch(any_compressor):
    memories = any_compressor.compress_ids([ids(20, 0), ids(33, 1)])
    prompts = [[memories[0], ids(3, 2)], [ids(2, 3), *memories, ids(1, 4)], [ids(5, 5)]]
    wanted = [ids(4, 6), ids(1, 7), ids(9, 8)]
    found = likelihoods(any_compressor, prompts, wanted)
    for prompt, target, likelihood in zip(prompts, wanted, found, strict=True):
        alone = likelihoods(any_compressor, [prompt], [target], batch_tokens=1)[0]
        torch.testing.assert_close(alone.log_probabilities, likelihood.log_probabilities, rtol=1e-4, atol=1e-4)
    logits = any_compressor.logits(torch.cat([prompts[0][1], wanted[0]]), [memories[0]])[2:-1].log_softmax(-1)
    torch.testing.assert_close(
        found[0].log_probabilities, logits.gather(1, wanted[0][:, None])[:, 0], rtol=1e-4, atol=1e-4
    )
    assert found[0].greedy.tolist() == (logits.argmax(-1) == wanted[0]).tolist()
    assert found[0].mean == pytest.approx(found[0].total / 4)


def test_what_cannot_be_predicted_is_refused(tokenizer):
    compressor = tiny_gist(tokenizer=tokenizer)
    memory = compressor.compress_ids([ids(20, 0)])[0]
    with pytest.raises(InputError, match="predicts the first token"):
        likelihoods(compressor, [[memory]], [ids(3, 1)])
    with pytest.raises(InputError, match="continuation 1 is empty"):
        likelihoods(compressor, [[ids(2, 0)], [ids(2, 1)]], [ids(3, 2), []])
    with pytest.raises(ContextTooLong, match="more than the model's 2048"):
        likelihoods(compressor, [[ids(2040, 0)]], [ids(9, 1)])


def test_summary_vectors_predict_the_first_token(compressor):
    memory = compressor.compress_ids([ids(20, 0)])[0]
    assert len(likelihoods(compressor, [[memory]], [ids(3, 1)])[0].log_probabilities) == 3


def test_a_question_is_split_off_where_its_tokens_begin(tokenizer, compressor):
    memory = compressor.compress(["The tide gauge stands on the north pier."])[0]
    for prompt_format in (PromptFormat(), PromptFormat(template="{sources}{question}?"), compressor.prompt_format):
        for sources in ([memory], ["The ferry sails."], [memory, memory], []):
            prompt, question = prompt_format.build_up_to_question(QUESTION, sources, tokenizer)
            assert len(question)
            whole = prompt_format.build(QUESTION, sources, tokenizer)
            texts = [torch.cat([p for p in parts if torch.is_tensor(p)]) for parts in ([*prompt, question], whole)]
            assert texts[1][: len(texts[0])].tolist() == texts[0].tolist() or prompt_format.template.endswith("}?")
            assert QUESTION.removeprefix("W").rstrip("?") in tokenizer.decode(question)


def test_passages_are_ranked_by_the_likelihood_of_the_question(compressor):
    passages = ["The lighthouse was built in 1874.", "The ferry sails twice a day in winter."]
    memories = compressor.compress(passages)
    scores = question_likelihoods(compressor, [QUESTION, "Who sails?"], [memories, memories[:1]])
    assert [len(row) for row in scores] == [2, 1]
    prompt, question = compressor.prompt_format.build_up_to_question(QUESTION, memories[:1], compressor.tokenizer)
    assert scores[0][0] == pytest.approx(likelihoods(compressor, [prompt], [question])[0].mean, abs=1e-5)
    assert question_likelihoods(compressor, [QUESTION], [passages])[0] != scores[0]


def test_a_library_searches_and_asks_by_likelihood(make_library, corpus):
    library = make_library()
    library.add(corpus)
    plain = library.search(QUESTION, k=3)
    ranked = library.search(QUESTION, k=3, rerank="likelihood")
    assert sorted(hit.id for hit in plain) == sorted(hit.id for hit in ranked)
    memories = library.store.memories(library.store.chunks([hit.id for hit in ranked]))
    assert [hit.score for hit in ranked] == pytest.approx(
        question_likelihoods(library.compressor, [QUESTION], [memories])[0], abs=1e-5
    )
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)
    best = library.search(QUESTION, k=1, retrieval="lexical", rerank="likelihood")
    assert len(best) == 1
    answer = library.ask(QUESTION, k=2, rerank="likelihood", max_new_tokens=2)
    assert [hit.id for hit in answer.sources] == [hit.id for hit in ranked[:2]]
    with pytest.raises(InputError, match="unknown rerank"):
        library.search(QUESTION, rerank="magic")


def test_ratios_are_kept_inside_a_block_only(any_compressor):
    document = ids(64, 0)
    before = any_compressor.compress_ids([document])[0].slots
    if any_compressor.ratios:
        ratio = min(8, any_compressor.ratios[-1])
        with any_compressor.configured(**any_compressor.settings_at_ratio(ratio)):
            slots = any_compressor.compress_ids([document])[0].slots
        assert 64 // ratio <= slots <= 64 // ratio + 2  # a sink, and a window that is not full
    assert any_compressor.compress_ids([document])[0].slots == before
    with pytest.raises(InputError, match="cannot keep one slot for every 5000 tokens"):
        any_compressor.settings_at_ratio(5000)
    with pytest.raises(InputError, match="no run setting"), any_compressor.configured(colour="red"):
        pass


def test_a_constant_memory_has_no_ratio():
    assert not tiny_autocompressor(accumulate_summary=False).ratios
    assert not tiny_autocompressor(summary_length=0).ratios
