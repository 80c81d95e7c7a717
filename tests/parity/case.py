"""One golden case: what it holds, which tier it is of, and the outcome of comparing with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

#: What a call of a gist case says where it neither pads nor rewinds.
CALL = {"len", "beacon_skip_first", "beacon_skip_last"}


class Unsupported(Exception):
    """The case needs a mode that ctxdocs does not have."""


@dataclass
class Case:
    """A folder of the golden schema.

    Tensors with ``expected_`` in their names hold the authors' numbers, ``baseline_expected_`` those of a method they
    compare with, ``fixedvalue_expected_`` those of their code with a mistake repaired; the others are inputs. Cases of
    methods without training name theirs ``source.mode.share.part`` instead, and have a tolerance for each kind of part.
    """

    folder: Path
    method: str
    settings: dict[str, Any]
    atol: float | dict[str, float]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> Case:
        description = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        return cls(
            folder=folder,
            method=description["method"],
            settings=description["settings"],
            atol=description.get("atol", 1e-4),
            tensors=load_file(folder / "io.safetensors"),
        )

    @classmethod
    def unreadable(cls, folder: Path) -> Case:
        """Stand for a folder that cannot be read."""
        return cls(folder, "", {}, 0.0, {})

    @property
    def tier(self) -> str:
        if not self.method or any("query_logits" in name for name in self.tensors):
            return "required"  # a training form and padded rows stand beside the same, row by row
        if not (self.folder / "config.json").is_file() or self.has("labels"):
            return "training"  # masks of a training form without a model; a training step
        return "optional" if self._pads_prompts or self._rarely_used else "required"

    @property
    def _pads_prompts(self) -> bool:
        """Whether there is padding elsewhere than in documents, whose rows equal their unpadded selves."""
        masks = [tensor for name, tensor in self.tensors.items() if name.startswith("attention_mask")]
        of_documents = self.method == "autocompressor" and self.has("input_ids")
        return not of_documents and any(not mask.bool().all() for mask in masks)

    @property
    def _rarely_used(self) -> bool:
        """Whether the settings of a gist case are of a mode that no published checkpoint uses."""
        if self.method not in ("beacon", "ultragist"):
            return False
        gist = {name.removeprefix(f"{self.method}_"): value for name, value in self.settings.items()}
        return (
            gist.get("attn") == "segmentation"
            or (gist.get("pos") == "interleave" and gist.get("attn") != "full-coverage")
            or gist.get("ratio_mix") == "join"
            or gist.get("stride") != gist.get("window")
            or gist.get("parallel_window", 1) > 1
            or "mlp" in gist.get("param", [])
            or any(set(call) - CALL for call in gist.get("calls", []))
        )

    @property
    def expected(self) -> set[str]:
        """Names of the tensors that hold numbers to compare with."""
        mark = "." if isinstance(self.atol, dict) else "expected_"
        return {name for name in self.tensors if mark in name}

    def tolerance(self, name: str) -> float:
        """Largest difference of a tensor's entries."""
        if not isinstance(self.atol, dict):
            return self.atol
        part = name.rpartition(".")[2]
        bounds = {kind: bound for kinds, bound in self.atol.items() for kind in kinds.split(", ")}
        bounds |= dict.fromkeys(("keys", "values"), bounds["keys_values"])
        return next(bound for kind, bound in bounds.items() if part.endswith(kind))

    def has(self, *names: str) -> bool:
        return all(name in self.tensors for name in names)


@dataclass
class Outcome:
    """Errors by kind, and whether generated tokens are equal (None where the case generates nothing)."""

    case: Case
    logits: float = 0.0
    memory: float = 0.0
    equal_ids: bool | None = None
    unsupported: str = ""
    differing: list[str] = field(default_factory=list)
    #: Names of the expected tensors that were compared.
    compared: set[str] = field(default_factory=set)
    #: Names of those that need not be.
    left: set[str] = field(default_factory=set)

    def compare(self, name: str, actual: Tensor, where: Tensor | None = None, unit: float = 1.0) -> None:
        """Compare with the expected tensor ``name``, at all entries or where a mask is set; errors count in units.

        Where the case holds no such tensor there is nothing to compare.
        """
        if name not in self.case.tensors:
            return
        self.compared.add(name)
        expected = self.case.tensors[name]
        if actual.shape != expected.shape:
            self.differing.append(f"{name} has shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
            return
        difference = (actual.double() - expected.double()).abs() / unit
        if where is not None:
            difference = difference[where.bool()]
        error = difference.max().item() if difference.numel() else 0.0
        marks = ("memory", "cache", ".keys", ".values", ".kept", ".scores")
        kind = "memory" if any(mark in name for mark in marks) and name != "nomemory.logits" else "logits"
        setattr(self, kind, max(getattr(self, kind), error if error == error else float("inf")))
        if not error <= self.case.tolerance(name):
            self.differing.append(name)

    def compare_relative(self, name: str, actual: Tensor) -> None:
        """Compare gradients: errors count in units of the largest expected entry."""
        if name in self.case.tensors:
            self.compare(name, actual, unit=self.case.tensors[name].abs().max().item() or 1.0)

    def compare_ids(self, name: str, actual: Sequence[Any]) -> None:
        """Compare generated ids, or counts, with the expected tensor ``name``; none is no error."""
        if name not in self.case.tensors:
            return
        self.compared.add(name)
        equal = list(actual) == self.case.tensors[name].tolist()
        self.equal_ids = equal and self.equal_ids is not False
        if not equal:
            self.differing.append(name)

    def leave(self, *names: str) -> None:
        """Take note of expected tensors that are not to be compared; the caller says why."""
        self.left.update(names)

    @property
    def not_compared(self) -> list[str]:
        """Expected tensors nobody looked at."""
        return sorted(self.case.expected - self.compared - self.left)

    @property
    def verdict(self) -> str:
        if self.unsupported:
            return "UNSUPPORTED"
        missed = [name for name in self.not_compared if "_train_" not in name and "_grad" not in name]
        return "FAIL" if self.differing or missed or not self.compared else "PASS"

    def line(self) -> str:
        ids = {None: "-", True: "equal", False: "DIFFER"}[self.equal_ids]
        text = (
            f"{self.case.folder.name}  {self.case.tier}  logits {self.logits:.1e}  memory {self.memory:.1e}  "
            f"ids {ids}  {self.verdict}"
        )
        why = [self.unsupported] if self.unsupported else list(self.differing)
        named = self.left if isinstance(self.case.atol, dict) else set()
        missed = [*self.not_compared, *sorted({".".join(name.split(".")[:2]) for name in named})]
        if missed and not self.unsupported:
            more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
            why.append(f"not compared: {', '.join(missed[:4])}{more}")
        return f"{text} ({', '.join(why)})" if why else text
