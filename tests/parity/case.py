"""One golden case: what it holds, which tier it is of, and the outcome of comparing with it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

#: What a call of a gist case says where it neither pads nor rewinds.
CALL = {"len", "beacon_skip_first", "beacon_skip_last"}


class Unsupported(Exception):
    """The case needs a mode that ctxdocs does not have."""


@dataclass
class Case:
    """A folder of the golden schema."""

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

    @property
    def tier(self) -> str:
        if any("query_logits" in name for name in self.tensors):
            return "required"  # the training form and padded rows stand beside the same, row by row
        if not (self.folder / "config.json").is_file():
            return "training"  # masks of a training form, without a model
        trained = any("_grad" in name or "_loss" in name for name in self.tensors)
        if trained and not self.has("expected_logits"):
            return "training"
        mask = self.tensors.get("attention_mask")
        padded = mask is not None and not mask.bool().all()
        return "optional" if padded or self._rarely_used else "required"

    @property
    def _rarely_used(self) -> bool:
        """Whether the settings of a gist case are of a mode that no published checkpoint uses."""
        if self.method not in ("beacon", "ultragist"):
            return False
        gist = {name.removeprefix(f"{self.method}_"): value for name, value in self.settings.items()}
        return (
            gist["attn"] == "segmentation"
            or (gist.get("pos") == "interleave" and gist["attn"] != "full-coverage")
            or gist["ratio_mix"] == "join"
            or gist["stride"] != gist["window"]
            or gist.get("parallel_window", 1) > 1
            or "mlp" in gist["param"]
            or any(set(call) - CALL for call in gist["calls"])
            or any(name.startswith("attention_mask") for name in self.tensors)
        )

    def tolerance(self, name: str) -> float:
        """Largest difference of a tensor's entries; training-free cases have one for each kind of tensor."""
        if not isinstance(self.atol, dict):
            return self.atol
        last = name.rpartition(".")[2]
        kinds = {kind: bound for kinds, bound in self.atol.items() for kind in kinds.split(", ")}
        kinds |= dict.fromkeys(("keys", "values"), kinds["keys_values"])
        return next(bound for kind, bound in kinds.items() if kind in last)

    def has(self, *names: str) -> bool:
        return all(name in self.tensors for name in names)


@dataclass
class Outcome:
    """Errors by kind, and whether generated tokens are equal (None where the case generates nothing)."""

    case: Case
    logits: float = 0.0
    memory: float = 0.0
    equal_ids: bool | None = None
    compared: int = 0
    unsupported: str = ""
    left_out: set[str] = field(default_factory=set)
    differing: list[str] = field(default_factory=list)

    def compare(self, name: str, actual: Tensor, where: Tensor | None = None) -> None:
        """Compare with the expected tensor ``name``, at all entries or where a mask is set."""
        expected = self.case.tensors[name]
        if actual.shape != expected.shape:
            raise AssertionError(f"{name} has shape {tuple(expected.shape)}, got {tuple(actual.shape)}")
        difference = (actual.float() - expected.float()).abs()
        if where is not None:
            difference = difference[where.bool()]
        error = difference.max().item() if difference.numel() else 0.0
        memory = any(part in name for part in ("memory", "cache", ".keys", ".values", ".kept", "scores"))
        kind = "memory" if memory and name != "nomemory.logits" else "logits"
        setattr(self, kind, max(getattr(self, kind), error if error == error else float("inf")))
        self.compared += 1
        if not error <= self.case.tolerance(name):
            self.differing.append(name)

    def compare_relative(self, name: str, actual: Tensor) -> None:
        """Compare gradients: errors count in units of the largest expected entry."""
        largest = self.case.tensors[name].abs().max().item() or 1.0
        self.case.tensors[name] = self.case.tensors[name] / largest
        self.compare(name, actual / largest)

    def compare_ids(self, name: str, actual: list[list[int]]) -> None:
        """Compare generated ids with the expected tensor ``name``."""
        equal = torch.tensor(actual).equal(self.case.tensors[name])
        self.equal_ids = equal and self.equal_ids is not False
        self.compared += 1
        if not equal:
            self.differing.append(name)

    @property
    def verdict(self) -> str:
        if self.unsupported:
            return "UNSUPPORTED"
        return "FAIL" if self.differing or not self.compared else "PASS"

    def line(self) -> str:
        ids = {None: "-", True: "equal", False: "DIFFER"}[self.equal_ids]
        text = (
            f"{self.case.folder.name}  {self.case.tier}  logits {self.logits:.1e}  memory {self.memory:.1e}  "
            f"ids {ids}  {self.verdict}"
        )
        why = self.unsupported or ", ".join(self.differing)
        if not why and self.left_out:
            why = f"not compared: {', '.join(sorted(self.left_out))}"
        return f"{text} ({why})" if why else text
