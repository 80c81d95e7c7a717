"""How right an answer is. Every score lies between 0 and 1, and more is better."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

from ctxdocs.errors import MissingDependency

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Return the text as SQuAD compares it: lower case, without punctuation and articles, blanks collapsed."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(found: str, wanted: Sequence[str]) -> float:
    """Return 1 if the answer is one of those wanted, normalised, and else 0 (SQuAD, arXiv 1606.05250)."""
    return float(normalised(found) in {normalised(answer) for answer in wanted})


def word_f1(found: str, wanted: Sequence[str]) -> float:
    """Return the F1 of the normalised answer's words, against the wanted answer it fits best (SQuAD).

    Two answers without words are alike; one without is unlike every other.
    """
    return max(_f1(normalised(found).split(), normalised(answer).split()) for answer in wanted)


def contains(found: str, wanted: str) -> float:
    """Return 1 if what is wanted stands somewhere in the answer, be it in a word, in capitals or not, and else 0."""
    return float(wanted.strip().lower() in found.lower())


def says(found: str, wanted: str) -> float:
    """Return 1 if the wanted words, normalised, stand in the answer one behind the other, and else 0."""
    return float(f" {normalised(wanted)} " in f" {normalised(found)} ")


def rouge_l(found: str, wanted: str) -> float:
    """Return the F1 of the longest common subsequence of words (ROUGE-L, Lin 2004; without stemming)."""
    here, there = _words(found), _words(wanted)
    if not here or not there:
        return float(here == there)
    return 2 * lcs_length(here, there) / (len(here) + len(there))


def rouge_l_recall(found: str, wanted: str) -> float:
    """Return the share of the wanted words that stand in the answer in their order (ROUGE-L recall)."""
    there = _words(wanted)
    return lcs_length(_words(found), there) / len(there) if there else 1.0


def edit_similarity(found: str, wanted: str) -> float:
    """Return how alike two texts are, by the insertions and deletions between them.

    1 minus the edits over the characters of both: what LongBench's code sets are scored by.
    """
    total = len(found) + len(wanted)
    return 2 * lcs_length(found, wanted) / total if total else 1.0


def bleu(found: str, wanted: str) -> float:
    """Return BLEU-4 of one text against one reference, by sacrebleu's defaults for sentences, from 0 to 1.

    Raises
    ------
    MissingDependency
        If sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise MissingDependency("BLEU is counted by sacrebleu", "pip install ctxdocs[eval]") from error
    return BLEU(effective_order=True).sentence_score(found, [wanted]).score / 100


def lcs_length(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence, a whole row of the table at a time (Hyyrö 2004)."""
    places: dict[Hashable, int] = defaultdict(int)
    for index, item in enumerate(one):
        places[item] |= 1 << index
    everything = row = (1 << len(one)) - 1
    for item in other:
        hits = row & places.get(item, 0)
        row = ((row + hits) | (row - hits)) & everything
    return len(one) - row.bit_count()


def _f1(here: Sequence[str], there: Sequence[str]) -> float:
    if not here or not there:
        return float(here == there)
    common = (Counter(here) & Counter(there)).total()
    return 2 * common / (len(here) + len(there))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
