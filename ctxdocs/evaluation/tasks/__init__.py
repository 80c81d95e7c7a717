"""Tasks: one file each, and one line here."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

from ctxdocs.errors import InputError

if TYPE_CHECKING:
    from ctxdocs.evaluation.task import Task

#: Every task and where it lives; imported when asked for.
TASKS: dict[str, str] = {
    "perplexity": "ctxdocs.evaluation.tasks.perplexity:Perplexity",
    "streaming": "ctxdocs.evaluation.tasks.streaming:Streaming",
    "reconstruction": "ctxdocs.evaluation.tasks.reconstruction:Reconstruction",
    "qa": "ctxdocs.evaluation.tasks.qa:QuestionAnswering",
    "multidoc": "ctxdocs.evaluation.tasks.multidoc:MultiDocument",
    "rag": "ctxdocs.evaluation.tasks.rag:RetrievalAugmented",
    "reranking": "ctxdocs.evaluation.tasks.reranking:Reranking",
    "classification": "ctxdocs.evaluation.tasks.classification:Classification",
    "passkey": "ctxdocs.evaluation.tasks.passkey:Passkey",
    "needle": "ctxdocs.evaluation.tasks.needle:Needle",
    "topics": "ctxdocs.evaluation.tasks.topics:Topics",
    "longbench": "ctxdocs.evaluation.tasks.longbench:LongBench",
    "ruler": "ctxdocs.evaluation.tasks.ruler:Ruler",
    "infinitebench": "ctxdocs.evaluation.tasks.infinitebench:InfiniteBench",
}


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Raises
    ------
    InputError
        If no task has that name; it names those that are spelt most alike.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else f"known tasks: {', '.join(TASKS)}"
        raise InputError(f"unknown task {name!r}", meant)
    module, _, attribute = TASKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
