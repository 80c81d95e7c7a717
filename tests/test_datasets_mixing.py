"""Questions about several documents: what stands beside the right one, and what never does."""

from __future__ import annotations

from collections import Counter

import pytest

from ctxdocs.datasets import ContextPool, Question, mix_contexts
from ctxdocs.datasets.drawing import generator, in_random_order
from ctxdocs.datasets.nearest import WordIndex
from ctxdocs.errors import InputError


def question(number, title="", **changes):
    fields = {
        "question": f"What colour is thing{number}?",
        "answers": (f"colour{number}",),
        "contexts": (f"thing{number} is colour{number}",),
        "relevant": (0,),
        "title": title or f"T{number // 2}",
        "source": "set",
        **changes,
    }
    return Question(**fields)


QUESTIONS = [question(number) for number in range(40)]
POOL = ContextPool(QUESTIONS)
TITLES = {asked.contexts[0]: asked.title for asked in QUESTIONS}


def test_the_right_context_stands_among_those_of_other_titles():
    places = Counter()
    for asked in QUESTIONS:
        mixed = mix_contexts(asked, POOL, contexts=4)
        assert len(set(mixed.contexts)) == 4
        assert [mixed.contexts[index] for index in mixed.relevant] == list(asked.contexts)
        assert sum(TITLES[text] == asked.title for text in mixed.contexts) == 1
        assert mixed.answers == asked.answers
        places[mixed.relevant[0]] += 1
    assert len(places) == 4


def test_seed_epoch_and_question_decide_and_nothing_else():
    mixed = [mix_contexts(asked, POOL, unanswerable=0.3) for asked in QUESTIONS]
    assert [mix_contexts(asked, POOL, unanswerable=0.3) for asked in reversed(QUESTIONS)] == mixed[::-1]
    assert [mix_contexts(asked, POOL, unanswerable=0.3, epoch=1) for asked in QUESTIONS] != mixed
    assert [mix_contexts(asked, POOL, unanswerable=0.3, seed=1) for asked in QUESTIONS] != mixed


def test_a_question_whose_context_is_left_out_has_no_answer():
    mixed = [mix_contexts(asked, POOL, contexts=3, unanswerable=0.25, seed=3) for asked in QUESTIONS]
    unanswerable = [new for new in mixed if not new.relevant]
    assert 3 <= len(unanswerable) <= 17
    for asked, new in zip(QUESTIONS, mixed, strict=True):
        assert len(new.contexts) == 3
        if not new.relevant:
            assert new.answers == ()
            assert asked.contexts[0] not in new.contexts


def test_a_context_that_holds_the_answer_is_no_distractor():
    other = question(100, contexts=("thing100 is Colour0, too",), answers=("Colour0",))
    pool = ContextPool([QUESTIONS[0], other, QUESTIONS[2]])
    assert set(mix_contexts(QUESTIONS[0], pool, contexts=9).contexts) == {QUESTIONS[0].contexts[0], "thing2 is colour2"}


def test_hard_distractors_are_of_the_same_title_or_share_words():
    for asked in QUESTIONS:
        mixed = mix_contexts(asked, POOL, contexts=2, distractors="same-title")
        assert [TITLES[text] for text in mixed.contexts] == [asked.title] * 2
    near = question(50, contexts=("which colour is what thing7 has is a question",))
    pool = ContextPool([*QUESTIONS, near])
    assert near.contexts[0] in mix_contexts(QUESTIONS[7], pool, contexts=2, distractors="nearest").contexts
    kinds = Counter(
        TITLES[text] == asked.title
        for asked in QUESTIONS
        for text in mix_contexts(asked, POOL, contexts=2, distractors={"random": 1, "same-title": 1}).contexts
        if text not in asked.contexts
    )
    assert min(kinds.values()) >= 10
    judged = question(8, answers=("yes",))
    beside = set(mix_contexts(judged, POOL, contexts=2, distractors="same-title").contexts) - set(judged.contexts)
    assert [TITLES[text] == judged.title for text in beside] == [False]


def test_a_questions_own_contexts_come_first_and_none_is_lost_that_is_relevant():
    asked = question(0, contexts=("a colour0", "b", "c", "d colour0"), relevant=(0, 3))
    mixed = mix_contexts(asked, POOL, contexts=3)
    assert {mixed.contexts[index] for index in mixed.relevant} == {"a colour0", "d colour0"}
    assert set(mixed.contexts) < set(asked.contexts)
    assert len(mix_contexts(asked, POOL, contexts=1).contexts) == 2
    impossible = question(0, contexts=("b",), relevant=(), answers=())
    mixed = mix_contexts(impossible, POOL, contexts=3)
    assert "b" in mixed.contexts
    assert (len(mixed.contexts), mixed.relevant) == (3, ())
    closed = question(0, contexts=(), relevant=())
    assert mix_contexts(closed, POOL) == closed


def test_other_sources_and_untitled_questions_keep_apart():
    pool = ContextPool([*QUESTIONS, question(99, source="other")])
    assert mix_contexts(question(99, source="other"), pool, contexts=3).contexts == question(99).contexts
    untitled = [question(number, title=" ") for number in range(5)]
    mixed = mix_contexts(untitled[0], ContextPool(untitled), contexts=3)
    assert len(set(mixed.contexts)) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"contexts": 0},
        {"unanswerable": 1.5},
        {"distractors": "near"},
        {"distractors": {}},
        {"distractors": {"random": 0}},
    ],
)
def test_wrong_arguments_are_refused(wrong):
    with pytest.raises(InputError):
        mix_contexts(QUESTIONS[0], POOL, **wrong)


def test_bm25_ranks_by_rare_words_and_short_texts():
    index = WordIndex(["the sea", "the sea and the harbour", "the", "Harbour!", ""])
    assert index.nearest("The HARBOUR", 9) == [3, 1, 2, 0]
    assert index.nearest("harbour", 1) == [3]
    assert index.nearest("nothing", 9) == []
    assert WordIndex([]).nearest("a", 3) == []


def test_a_lazy_order_is_a_whole_one():
    items = list(range(30))
    assert sorted(in_random_order(items, generator(1))) == items
    assert list(in_random_order(items, generator(1))) != list(in_random_order(items, generator(2)))
    firsts = Counter(next(in_random_order([0, 1, 2], generator(seed))) for seed in range(300))
    assert min(firsts.values()) > 60
