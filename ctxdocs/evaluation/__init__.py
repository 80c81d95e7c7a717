"""What memories keep: tasks, one way to run them for every method, and reports.

:func:`evaluate` runs tasks with contexts given as memories, as text, or not at all, and returns (and writes) means with
bootstrap intervals. The tasks are in :mod:`ctxdocs.evaluation.tasks`, one file each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctxdocs.evaluation.models import Model as Model
    from ctxdocs.evaluation.runner import Progress as Progress
    from ctxdocs.evaluation.runner import evaluate as evaluate
    from ctxdocs.evaluation.summary import Evaluation as Evaluation

__all__ = ["Evaluation", "Model", "Progress", "evaluate"]

# Statistics and metrics are imported without torch; what runs models is imported when it is first asked for.
_LAZY = {
    "evaluate": "ctxdocs.evaluation.runner",
    "Progress": "ctxdocs.evaluation.runner",
    "Model": "ctxdocs.evaluation.models",
    "Evaluation": "ctxdocs.evaluation.summary",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
