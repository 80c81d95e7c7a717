"""Rows that are read behind memories of several documents; see :mod:`ctxdocs.training.steps.documents`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ctxdocs.datasets import ContextPool, Question, mix_contexts
from ctxdocs.memory import Memory, SoftPrompt
from ctxdocs.prompts import PromptFormat, encode_text
from ctxdocs.training.data import TrainingData
from ctxdocs.training.examples import Asking, Examples, cut, tokens_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.training.steps.base import Example
    from ctxdocs.training.steps.documents import DocumentsOptions

#: Text in front of the first source, between two, and behind the last, each int64 ``[tokens]``.
Frames: TypeAlias = "tuple[Tensor, Tensor, Tensor]"

_NOTHING = torch.empty(0, dtype=torch.long)


class DocumentRows(Examples):
    """Continuations and reconstructions of documents, and questions with their contexts.

    An example holds its ``own`` documents, ``near`` ones that stand beside them, ``left_out`` ones that must not, a
    ``spare`` one, the ``read`` text whose last ``targets`` tokens count, and the frames a library puts around sources.

    Parameters
    ----------
    data : TrainingData
        Documents and questions.
    options : DocumentsOptions
        Of the objective.
    asking : Asking
        The format of questions.
    """

    def __init__(self, data: TrainingData, options: DocumentsOptions, asking: Asking) -> None:
        self.options, self.asking = options, asking
        self.kinds = [kind for kind in ("continuation", "reconstruction") if getattr(options.weights, kind) > 0]
        self.documents = data.documents
        shortest = min(options.document_tokens) // 2
        self.kept = np.flatnonzero(data.documents.lengths >= shortest) if self.kinds else np.empty(0, np.int64)
        usable = [question for question in data.questions if question.contexts]
        self.questions = usable if options.weights.answers > 0 else []
        self.pool = ContextPool(self.questions)
        self.lengths = np.zeros(len(self.kept) + len(self.questions), dtype=np.int64)
        without = {"template": "{sources}{question}", "memories_end": "", "bos": "tokenizer"}
        plain = frames_of(PromptFormat(**{**asking.prompt_format.to_dict(), **without}), asking)
        self._memory_frames, self._text_frames = plain

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Build a row from a document or a question."""
        asks = index >= len(self.kept)
        if len(self.kept) and self.questions:
            asks = bool(rng.random() < self.options.questions)
            index = int(rng.integers(len(self.questions))) if asks else index % len(self.kept)
        elif asks:
            index -= len(self.kept)
        built = self._question(self.questions[index], rng) if asks else self._document(int(self.kept[index]), rng)
        return {"near": [], "left_out": [], **built, "spare": [self._spare(rng)], "seed": int(rng.integers(2**31))}

    def _document(self, index: int, rng: np.random.Generator) -> Example:
        options = self.options
        document = tokens_of(self.documents[index])
        wanted, read = int(rng.choice(options.document_tokens)), options.read_tokens
        window = min(len(document), wanted + read)
        start = int(rng.integers(len(document) - window + 1))
        stretch = document[start : start + window]
        frames = {"memory_frames": self._memory_frames, "text_frames": self._text_frames}
        kind = self.kinds[int(rng.integers(len(self.kinds)))]
        if kind == "continuation":
            kept = wanted if window == wanted + read else window - max(2, min(read, window // 4))
            behind = stretch[kept:]
            return {"own": [stretch[:kept]], "kind": kind, "read": behind, "targets": len(behind) - 1, **frames}
        own = stretch[:wanted]
        cue = min(int(rng.integers(options.cue[0], options.cue[1] + 1)), len(own) // 2)
        at = int(rng.integers(max(1, len(own) - read + 1)))
        again = own[at : at + read]
        return {"own": [own], "kind": kind, "read": again, "targets": len(again) - cue, **frames}

    def _question(self, question: Question, rng: np.random.Generator) -> Example:
        options = self.options
        mixed = mix_contexts(
            question,
            self.pool,
            contexts=max(1, len(question.relevant) + options.distractors),
            distractors=options.distractor_kind,  # type: ignore[arg-type]  # checked there
            unanswerable=options.unanswerable,
            seed=int(rng.integers(2**31)),
        )
        contexts = [self._context(text, question.answers) for text in mixed.contexts]
        own = [contexts[index] for index in mixed.relevant]
        near = [ids for index, ids in enumerate(contexts) if index not in mixed.relevant]
        left_out = [] if own else [self._context(question.contexts[i], question.answers) for i in question.relevant]
        said = mixed.answers[0] if mixed.answers else options.no_answer
        answer = self.asking.answer(said)[-options.read_tokens :]
        memory_frames, text_frames = frames_of(self.asking.prompt_format, self.asking, question.question)
        return {
            "own": own,
            "near": near,
            "left_out": left_out,
            "kind": "answers",
            "read": answer,
            "targets": len(answer),
            "memory_frames": memory_frames,
            "text_frames": text_frames,
        }

    def _context(self, text: str, answers: Sequence[str]) -> Tensor:
        """Tokenise a context; one that is too long is cut around the answer."""
        found = next((place for answer in answers if (place := text.find(answer)) >= 0), 0)
        ids = encode_text(self.asking.tokenizer, text)
        return cut(ids, found / max(1, len(text)), max(self.options.document_tokens))

    def _spare(self, rng: np.random.Generator) -> Tensor:
        wanted = int(rng.choice(self.options.document_tokens))
        if len(self.kept):
            document = tokens_of(self.documents[int(rng.choice(self.kept))])
            start = int(rng.integers(max(1, len(document) - wanted + 1)))
            return document[start : start + wanted]
        question = self.questions[int(rng.integers(len(self.questions)))]
        return self._context(question.contexts[0], ())[:wanted]


def frames_of(prompt_format: PromptFormat, asking: Asking, question: str = "") -> tuple[Frames, Frames]:
    """Return what stands around memories, and around texts, in the prompt that asks a question."""
    as_text = PromptFormat(**{**prompt_format.to_dict(), "memory": prompt_format.text, "memories_end": ""})
    return _frames(prompt_format, asking.tokenizer, question), _frames(as_text, asking.tokenizer, question)


def _frames(prompt_format: PromptFormat, tokenizer: PreTrainedTokenizerBase, question: str) -> Frames:
    """Build a prompt around two places, and take it apart there."""
    place = SoftPrompt(vectors=torch.empty(0, 1), span=0, source_tokens=0, fingerprint="")
    frames = [_NOTHING, _NOTHING, _NOTHING]
    seen = 0
    for part in prompt_format.build(question, [place, place], tokenizer):
        if isinstance(part, Memory):
            seen += 1
        else:
            frames[seen] = part
    return frames[0], frames[1], frames[2]
