"""Running text of a wanted length in which something is hidden: from given documents, or made up."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ctxdocs.errors import InputError
from ctxdocs.prompts import encode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.evaluation.data import Data

#: Sentences of documents that are kept at hand.
_POOL = 20_000
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

# Neither figures nor names of what tasks hide: nothing here can be taken for the needle.
_WHO = (
    "the harbour master", "an old ferryman", "the miller's wife", "a travelling printer", "the village school",
    "the night watchman", "a party of surveyors", "the lock keeper", "the baker on the corner", "her younger brother",
    "the choir", "a visiting botanist", "the postman", "the town council", "a retired clockmaker", "the stable boy",
)  # fmt: skip
_DID = (
    "spoke at length about", "had quietly given up", "kept a careful record of", "could not agree about",
    "went on mending", "wrote a long letter about", "took great pride in", "was seldom asked about",
    "walked a mile to see", "planned to paint", "grew tired of", "laughed over", "set out to measure", "listened to",
)  # fmt: skip
_WHAT = (
    "the weather on the western moor", "the state of the stone bridge", "last year's apple harvest",
    "the new lamps in the market hall", "a pair of leaking boats", "the sound of the evening bells",
    "the hedges along the lane", "a crate of broken slates", "the colour of the river after rain",
    "the price of good rope", "an unfinished map of the valley", "the geese on the common", "the draughty reading room",
    "a song that nobody finished", "the slow train to the coast", "the wall behind the orchard",
)  # fmt: skip
_WHEN = (
    "in the early spring", "before the first frost", "on most evenings", "while the tide was out", "after the fair",
    "during a long wet week", "as the shops were closing", "late in the summer", "whenever the wind turned",
    "long before breakfast", "to everyone's surprise", "without much hurry",
)  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    """A sentence and its length in tokens."""

    text: str
    tokens: int


class Filler:
    """The sentences that something is hidden among.

    Parameters
    ----------
    kind : {"made-up", "documents"}
        Sentences drawn from a small grammar, or those of the given documents.
    data : Data
        The documents.
    seed : int
        Which of the documents, where there are many.

    Raises
    ------
    InputError
        If the kind is unknown, or there are no documents.
    """

    def __init__(self, kind: str, data: Data, seed: int) -> None:
        if kind not in ("made-up", "documents"):
            raise InputError(f"unknown filler {kind!r}", "choose made-up or documents")
        self._given = list(itertools.islice(_sentences(data, seed), _POOL)) if kind == "documents" else []
        if kind == "documents" and not self._given:
            raise InputError("there are no documents to hide anything in", "give a file of documents with --data")

    def sentences(self, rng: Random) -> Iterator[str]:
        """Yield sentences without end: drawn anew, or on from a random place of the documents."""
        if self._given:
            start = rng.randrange(len(self._given))
            return itertools.chain(self._given[start:], itertools.cycle(self._given))
        return _made_up(rng)


def _made_up(rng: Random) -> Iterator[str]:
    while True:
        sentence = f"{rng.choice(_WHEN)} {rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)}."
        yield sentence[0].upper() + sentence[1:]


def _sentences(data: Data, seed: int) -> Iterator[str]:
    for document in data.documents(seed):
        for sentence in _SENTENCE_END.split(document.text):
            if sentence.strip():
                yield " ".join(sentence.split())


def haystack(sentences: Iterator[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[Sentence]:
    """Take sentences until they hold ``tokens`` tokens; the last one that would not fit is left out."""
    taken: list[Sentence] = []
    room = tokens
    for text in sentences:
        length = len(encode_text(tokenizer, " " + text))
        if length > room:
            return taken
        taken.append(Sentence(text, length))
        room -= length
    return taken


def hidden(sentences: list[Sentence], needle: str, depth: float) -> str:
    """Return the sentences as one text, with the needle put behind the share ``depth`` of their tokens."""
    wanted = depth * sum(sentence.tokens for sentence in sentences)
    before, place = 0, 0
    # At the sentence border nearest to the wanted depth.
    while place < len(sentences) and before + sentences[place].tokens / 2 < wanted:
        before += sentences[place].tokens
        place += 1
    texts = [sentence.text for sentence in sentences]
    return " ".join([*texts[:place], needle, *texts[place:]])
