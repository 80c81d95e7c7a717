"""Metrics and intervals, on examples that can be checked by hand."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctxdocs.evaluation import metrics
from ctxdocs.evaluation.statistics import bootstrap
from ctxdocs.evaluation.tasks.infinitebench import _choice, _last_number_is
from ctxdocs.evaluation.tasks.longbench import _class_score, _code_score, _number_score, _paragraph_score


@pytest.mark.parametrize(
    ("found", "wanted", "em", "f1"),
    [
        ("The old Mill!", ["old mill"], 1, 1),
        ("in the old mill", ["old mill"], 0, 0.8),  # in old mill: 2 of 3, 2 of 2
        ("mill mill", ["the mill"], 0, 2 / 3),  # a word counts as often as it is wanted
        ("harbour", ["old mill", "a harbour"], 1, 1),
        ("", [""], 1, 1),
        ("something", [""], 0, 0),
        ("the", ["mill"], 0, 0),
    ],
)
def test_exact_match_and_f1_are_squads(found, wanted, em, f1):
    assert metrics.exact_match(found, wanted) == em
    assert metrics.word_f1(found, wanted) == pytest.approx(f1)


def subsequence_length(one: str, other: str) -> int:
    """The definition: the longest choice of places whose letters are a subsequence of the other text."""

    def is_subsequence(part):
        letters = iter(other)
        return all(letter in letters for letter in part)

    parts = (part for size in range(len(one), -1, -1) for part in itertools.combinations(one, size))
    return len(next(part for part in parts if is_subsequence(part)))


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_common_subsequences_are_the_longest(one, other):
    assert metrics.lcs_length(one, other) == subsequence_length(one, other) == metrics.lcs_length(other, one)


def test_texts_are_compared_by_what_they_share_in_order():
    assert metrics.rouge_l("the cat sat down", "the cat lay down") == pytest.approx(0.75)
    assert metrics.rouge_l_recall("well, the flour bin I think", "the flour bin") == 1
    assert metrics.rouge_l_recall("bin", "the flour bin") == pytest.approx(1 / 3)
    assert metrics.edit_similarity("kitten", "sitting") == pytest.approx(8 / 13)  # 4 of 6 and of 7 letters
    assert metrics.edit_similarity("", "") == metrics.rouge_l("", "") == metrics.rouge_l_recall("x", "") == 1
    assert metrics.contains("It is in The Flour Bin.", "flour bin") == metrics.contains("cabins", "bin") == 1
    assert metrics.says("It is in The Flour-bin, a flour bin.", "the flour bin") == 1
    assert metrics.says("cabins", "bin") == metrics.says("", "bin") == 0


def test_bleu_of_one_word_too_many():
    # All n-grams but one of each length are right: 4/5 · 3/4 · 2/3 · 1/2, to the fourth root.
    assert metrics.bleu("a b c d e", "a b c d") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert metrics.bleu("a b c d", "a b c d") == pytest.approx(1)
    assert metrics.bleu("", "a b c d") == 0


def test_longbenchs_scores():
    classes = ["Food", "Food other", "Place"]
    assert _class_score("Food", "Food", classes) == 1
    assert _class_score("Food other", "Food other", classes) == 1  # a part of the right name does not count
    assert _class_score("Food or Place", "Food", classes) == 0.5
    assert _class_score("Place", "Food", classes) == 0
    assert _number_score("12, or was it 13?", "12") == 0.5
    assert _paragraph_score("Paragraph 3", "Paragraph 3") == 1
    assert _paragraph_score("Paragraph 13", "Paragraph 3") == 0
    assert _code_score("\n```python\n# so\nreturn x\n", "return x") == 1


def test_infinitebenchs_choices():
    options = ["Anna", "Boris", "Carl"]
    assert _choice("B. Boris", options) == _choice("(B)", options) == _choice("it is boris", options) == "Boris"
    assert _choice("Anna or Boris", options) == _choice("D", options) == _choice("Anyone", options) == ""
    assert _last_number_is("8, no: -3", "-3") == 1
    assert _last_number_is("none", "5") == 0


def test_intervals_hold_their_mean_and_shrink():
    values = np.arange(200) % 7
    wide, narrow = bootstrap(values[:20]), bootstrap(values)
    assert wide.low < wide.mean < wide.high
    assert narrow.high - narrow.low < wide.high - wide.low
    assert (wide.mean, wide.count) == (values[:20].mean(), 20)
    assert bootstrap(values) == narrow
    assert bootstrap([2.5]).low == bootstrap([2.5]).high == 2.5


def test_clusters_are_resampled_whole():
    values = [0.0] * 50 + [1.0] * 50
    one_each = bootstrap(values)
    two = bootstrap(values, ["a"] * 50 + ["b"] * 50)
    assert (two.low, two.mean, two.high) == (0, 0.5, 1)
    assert one_each.low > 0.3
    assert bootstrap(values, range(100)) == one_each
    assert bootstrap([1, 2, 3], ["x", "x", "y"]) == bootstrap([1, 2, 3], ["q", "q", "p"])
    uneven = bootstrap([0, 0, 0, 1], ["a", "a", "a", "b"])
    assert uneven.mean == 0.25  # rows count alike, not clusters
    assert bootstrap([0.1, 0.2]).excludes_zero
    assert not bootstrap([-1.0, 1.0]).excludes_zero


def test_a_true_mean_is_covered_as_often_as_promised():
    rng = np.random.default_rng(5)
    covered = [(found := bootstrap(rng.normal(size=60))).low <= 0 <= found.high for _ in range(300)]
    assert 0.9 <= np.mean(covered) <= 0.98


def test_metrics_and_statistics_need_no_torch():
    code = "import sys, ctxdocs.evaluation.metrics, ctxdocs.evaluation.statistics; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
