"""Training steps: how each method computes its loss on a batch, one file per method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ctxdocs.training.options import from_mapping

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor
    from ctxdocs.training.steps.base import Step, StepOptions

#: The objective that each method was published with, and where its step lives.
PUBLISHED: dict[str, str] = {
    "autocompressor": "ctxdocs.training.steps.autocompressor:AutoCompressorStep",
    "beacon": "ctxdocs.training.steps.gist:GistStep",
    "ultragist": "ctxdocs.training.steps.gist:GistStep",
    "rcc": "ctxdocs.training.steps.rcc:RCCStep",
    "ccm": "ctxdocs.training.steps.ccm:CCMStep",
}
#: Objectives of any method.
GENERAL: dict[str, str] = {
    "documents": "ctxdocs.training.steps.documents:DocumentsStep",
    "text": "ctxdocs.training.steps.text:TextStep",
}


def step_class(method: str, objective: str) -> type[Step[Any]]:
    """Return the step of a method under an objective: ``published``, or one of :data:`GENERAL`."""
    module, _, name = (PUBLISHED[method] if objective == "published" else GENERAL[objective]).partition(":")
    return getattr(importlib.import_module(module), name)


def options_class(method: str, objective: str) -> type[StepOptions]:
    """Return the class of an objective's options."""
    return step_class(method, objective).Options


def build_step(compressor: Compressor, objective: str, options: dict[str, Any]) -> Step[Any]:
    """Build a step; ``options`` are those of the objective, by name.

    Raises
    ------
    InputError
        If an option is unknown, or its value cannot be used.
    """
    cls = step_class(compressor.method, objective)
    return cls(compressor, from_mapping(cls.Options, options, f"{objective}."))
