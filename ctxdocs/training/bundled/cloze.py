"""Questions made of running text: a sentence without one of its names, dates or numbers, which is the answer.

Cloze questions, after Lewis et al., arXiv 1906.04980. They sound wooden and share their words with the text, but there
is no end of them: what they teach is to find the place that a question is about, and to read the answer off there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

#: Stretches of text that questions are about, in characters: what one memory is trained to hold.
CONTEXT_CHARACTERS = 800
_QUESTIONS_OF_CONTEXT = 4
_SENTENCE_WORDS = (6, 40)
_QUESTION_WORDS = 14
#: Words of a sentence that its question leaves out at random, so that it is not the text itself.
_LEFT_OUT = 0.15

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_KINDS = (
    (
        ("When", "In what year", "On what date"),
        re.compile(rf"\b(?:\d{{1,2}} )?{_MONTH}(?: \d{{1,2}},)? \d{{4}}\b|\b(?:1[0-9]|20)\d\d\b"),
    ),
    (
        ("How many", "How much", "What number"),
        re.compile(
            r"\b\d[\d,.]*\d?(?: ?%| (?:percent|million|billion|thousand|km|kg|m|cm|mm|miles|feet|years|days))?\b"
        ),
    ),
    (
        ("Who", "What", "Which"),
        re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+(?: (?:(?:of|the|de|van|von) )*[A-Z][a-z]+){0,3}\b"),
    ),
)
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE = re.compile(r"(?<=[a-z0-9)][.!?]) +(?=[A-Z])")
_MARKUP = re.compile(r"[*_`#|\[\]<>]|\(https?[^)]*\)")
_NO_PROSE = re.compile(r"^\s*(?:#|\||```|    |[-*] |\d+\. |<)")


def cloze_questions(text: str, rng: np.random.Generator) -> Iterator[tuple[str, str, str]]:
    """Yield ``(context, question, answer)``; an answer stands once in its context.

    Parameters
    ----------
    text : str
        A document.
    rng : numpy.random.Generator
        Chooses among what could be asked.
    """
    for context in _contexts(text):
        found = [(wh, sentence, span) for sentence in _SENTENCE.split(context) for wh, span in _spans(sentence)]
        asked = 0
        for index in rng.permutation(len(found)):
            words, sentence, (start, end) = found[index]
            answer = sentence[start:end]
            question = _question(str(rng.choice(words)), sentence[:start], sentence[end:], rng)
            if question and context.count(answer) == 1 and answer not in question:
                yield context, question, answer
                asked += 1
            if asked == _QUESTIONS_OF_CONTEXT:
                break


def _contexts(text: str) -> Iterator[str]:
    """Yield stretches of whole paragraphs of prose; those that are too long are cut behind a sentence."""
    held = ""
    for paragraph in _PARAGRAPH.split(text):
        paragraph = " ".join(paragraph.split()) if not _NO_PROSE.match(paragraph) else ""
        if len(held) + len(paragraph) > CONTEXT_CHARACTERS:
            if held:
                yield held
            held = ""
        if len(paragraph) > CONTEXT_CHARACTERS:
            paragraph = paragraph[:CONTEXT_CHARACTERS].rpartition(". ")[0]
        held = f"{held}\n\n{paragraph}".strip()
    if held:
        yield held


def _spans(sentence: str) -> Iterator[tuple[tuple[str, ...], tuple[int, int]]]:
    """Yield what can be asked for in a sentence: words to ask with, and where the answer stands."""
    if _SENTENCE_WORDS[0] <= sentence.count(" ") + 1 <= _SENTENCE_WORDS[1]:
        taken: set[int] = set()
        for words, pattern in _KINDS:
            for match in pattern.finditer(sentence):
                place = range(*match.span())
                if taken.isdisjoint(place):
                    taken.update(place)
                    yield words, match.span()


def _question(ask: str, before: str, after: str, rng: np.random.Generator) -> str:
    """Ask with the words around the answer, those next to it first; empty if they are too few."""
    behind, ahead = (_MARKUP.sub(" ", part).split() for part in (before, after))
    if behind:
        behind[0] = behind[0][0].lower() + behind[0][1:]
    half = _QUESTION_WORDS // 2
    ahead = ahead[: max(half, _QUESTION_WORDS - len(behind))]
    behind = behind[-(_QUESTION_WORDS - len(ahead)) :] if len(ahead) < _QUESTION_WORDS else []
    words = [word for word in behind + ahead if rng.random() >= _LEFT_OUT]
    return f"{ask} {' '.join(words)}".rstrip(" .,;:!?") + "?" if len(words) > 3 else ""
