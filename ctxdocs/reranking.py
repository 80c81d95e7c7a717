"""Passages ranked anew: by how likely the model finds the question behind each passage's memory.

A passage that answers a question makes it likely (AutoCompressor, arXiv 2305.14788, section on re-ranking). With
memories that costs a few slots per passage, whatever its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.memory import Memory


def question_likelihoods(
    compressor: Compressor, questions: Sequence[str], passages: Sequence[Sequence[Memory | str]]
) -> list[list[float]]:
    """Return how likely each question is behind each of its passages: mean log-probability of its tokens, in nats.

    Parameters
    ----------
    compressor : Compressor
        Reads; its prompt format says what stands between a passage and a question.
    questions : sequence of str
        None of them blank.
    passages : sequence of sequences of (Memory or str)
        For every question its passages, as memories or as raw texts.

    Returns
    -------
    list of list of float
        One value per passage, in the order of ``passages``.
    """
    from ctxdocs.likelihood import likelihoods

    prompts, targets = [], []
    for question, candidates in zip(questions, passages, strict=True):
        for passage in candidates:
            prompt, ids = compressor.prompt_format.build_up_to_question(
                question,
                [passage],
                compressor.tokenizer,  # type: ignore[arg-type]
                compressor.prefix_ids,
            )
            prompts.append(prompt)
            targets.append(ids)
    told = [index for index, ids in enumerate(targets) if len(ids)]
    found = likelihoods(compressor, [prompts[i] for i in told], [targets[i] for i in told])
    # A question of one token that nothing stands in front of is as likely behind one passage as behind another.
    means = dict.fromkeys(range(len(targets)), 0.0) | {i: one.mean for i, one in zip(told, found, strict=True)}
    values = iter(means.values())
    return [[next(values) for _ in candidates] for candidates in passages]
