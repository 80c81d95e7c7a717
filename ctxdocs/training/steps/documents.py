"""Texts behind memories of several documents, for every method alike: what retrieval-augmented generation asks of them.

The documents of a batch are compressed all at once, each alone. Every row reads the memories of its own document among
those of others, and then a text: how the document goes on (``continuation``), the document itself behind a cue
(``reconstruction``), or a question and its answer (``answers``). The same rows with the documents' text in place of
their memories can be read too: as plain text that is learnt (``text``), and by a teacher whose distribution over the
next token the row behind memories is to match (``distillation``). The teacher is the model itself, its LoRA off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor

from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.gist import GistCompressor
from ctxdocs.compressors.passes import only_pass
from ctxdocs.compressors.reading import Layout, ModelInput
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory
from ctxdocs.training.config import DataOptions
from ctxdocs.training.data import TrainingData
from ctxdocs.training.distillation import distillation_losses, top_predictions
from ctxdocs.training.document_examples import DocumentRows
from ctxdocs.training.examples import Asking, Examples
from ctxdocs.training.lora import lora_off
from ctxdocs.training.losses import mean_loss, token_losses
from ctxdocs.training.options import option
from ctxdocs.training.steps.base import Batch, Example, Step, StepOptions, StepOutput, output

KINDS = ("continuation", "reconstruction", "answers")


@dataclass
class Weights:
    """How much each loss counts; rows of a kind without weight are not drawn."""

    continuation: float = option(1.0, "how a document goes on")
    reconstruction: float = option(0.5, "a document, behind a cue")
    answers: float = option(1.0, "answers to questions")
    text: float = option(0.0, "the same targets behind the documents' text")
    distillation: float = option(1.0, "the distribution over the next token that the model has behind the text")


@dataclass
class DocumentsOptions(StepOptions):
    """Options of the objective ``documents``."""

    weights: Weights = field(default_factory=Weights)
    memories: list[int] = option([1, 4], "fewest and most memories in front of a row")
    document_tokens: list[int] = option([512], "lengths documents are cut to, one drawn per example")
    read_tokens: int = option(128, "longest text behind the memories")
    cue: list[int] = option([10, 20], "fewest and most tokens of a document that ask for its reconstruction")
    questions: float = option(0.5, "share of rows that are questions, where there are documents too")
    top_k: int = option(64, "tokens of the teacher's distribution that are matched one by one")
    temperature: float = option(1.0, "of both distributions in distillation")
    distractors: int = option(1, "contexts that stand beside a question's own; the others are other rows'")
    distractor_kind: str = option("random", "random, same-title or nearest: where those are drawn from")
    unanswerable: float = option(0.0, "share of questions asked without the contexts that answer them")
    no_answer: str = option("not in the documents", "their answer")


class DocumentsStep(Step[Compressor]):
    """Weighted losses of rows behind memories."""

    Options = DocumentsOptions

    def __init__(self, compressor: Compressor, options: DocumentsOptions) -> None:
        super().__init__(compressor, options)
        self.weights: dict[str, float] = asdict(options.weights)
        if not any(self.weights[kind] > 0 for kind in KINDS):
            raise InputError(f"no row is ever drawn: documents.weights gives none of {', '.join(KINDS)} a weight")
        for name in ("memories", "cue"):
            pair = getattr(options, name)
            if len(pair) != 2 or not 1 <= pair[0] <= pair[1]:
                raise InputError(f"documents.{name} is {pair}", "[fewest, most], at least 1")
        if options.cue[1] >= options.read_tokens:
            raise InputError("documents.cue leaves no token of documents.read_tokens to be written")
        self.options = options

    def check(self, longest: int) -> None:
        """Raise ``InputError`` if rows surely need more positions than the model has."""
        limit, options = self.compressor.backbone.max_positions, self.options
        reads_text = self.weights["text"] or self.weights["distillation"]
        need = max(options.document_tokens) * options.memories[1] * bool(reads_text) + options.read_tokens
        if need > limit:
            raise InputError(
                f"{options.memories[1]} documents of {max(options.document_tokens)} tokens as text and "
                f"{options.read_tokens} more take {need} positions; the model has {limit}",
                "fewer documents.memories, shorter documents.document_tokens, or no weight for text and distillation",
            )

    def examples(self, data: TrainingData, options: DataOptions, asking: Asking, seed: int) -> Examples:
        """Return rows that are read behind memories."""
        return DocumentRows(data, self.options, asking)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Choose the memories of every row: its own documents among its near ones, other rows', and spare ones."""
        rng = np.random.default_rng([example["seed"] for example in examples])
        documents: list[Tensor] = []
        numbers: list[dict[str, list[int]]] = []
        for example in examples:
            numbers.append({})
            for kind in ("own", "near"):
                numbers[-1][kind] = list(range(len(documents), len(documents) + len(example[kind])))
                documents += example[kind]
        shared = len(documents)
        documents += [ids for example in examples for ids in example["spare"]]
        keys = [tuple(ids.tolist()) for ids in documents]
        wanted = int(rng.integers(self.options.memories[0], self.options.memories[1] + 1))
        rows: list[list[int]] = []
        for example, mine in zip(examples, numbers, strict=True):
            without = {tuple(ids.tolist()) for ids in [*example["own"], *example["near"], *example["left_out"]]}
            others = [*rng.permutation(shared).tolist(), *rng.permutation(np.arange(shared, len(documents))).tolist()]
            drawn = [*mine["near"], *{keys[n]: n for n in others if keys[n] not in without}.values()]
            missing = max(not mine["own"], wanted - len(mine["own"]))
            rows.append(rng.permutation([*mine["own"], *drawn[:missing]]).tolist())
        used = sorted({number for row in rows for number in row})
        place = {number: index for index, number in enumerate(used)}
        return {
            "documents": [documents[number] for number in used],
            "rows": [[place[number] for number in row] for row in rows],
            "memory_frames": [example["memory_frames"] for example in examples],
            "text_frames": [example["text_frames"] for example in examples],
            "reads": [example["read"] for example in examples],
            "targets": [example["read"][-example["targets"] :] for example in examples],
            "kinds": [KINDS.index(example["kind"]) for example in examples],
            "ratio": self._ratio(rng),
        }

    def forward(self, batch: Batch, part: int = 0, carried: Tensor | None = None) -> StepOutput:
        """Compress, read, compare."""
        compressor, weights = self.compressor, self.weights
        with _one_ratio(compressor, batch["ratio"]):
            memories: Sequence[Memory | Tensor] = compressor.compress_batch(batch["documents"])
        targets = torch.cat(batch["targets"])
        states = self._states(batch, memories, "memory_frames")
        losses = self._by_kind(batch, token_losses(compressor.backbone, states, targets))
        predicted = None
        if weights["text"]:
            texts = self._states(batch, batch["documents"], "text_frames")
            losses["text"] = mean_loss(compressor.backbone, texts, targets)
            predicted = self._predicted(texts) if weights["distillation"] else None
        elif weights["distillation"]:
            with teaching(compressor):
                predicted = self._predicted(self._states(batch, batch["documents"], "text_frames"))
        if predicted is not None:
            temperature = self.options.temperature
            matched = distillation_losses(compressor.backbone, states, *predicted, temperature=temperature)
            losses["distillation"] = matched.mean()
        return output(torch.stack([weights[name] * loss for name, loss in losses.items()]).sum(), losses)

    def _states(self, batch: Batch, sources: Sequence[Memory | Tensor], frames: str) -> Tensor:
        """Read all rows with their sources; return the states that tell their targets, ``[targets, width]``."""
        compressor = self.compressor
        rows: list[ModelInput] = []
        for (first, between, last), row, read in zip(batch[frames], batch["rows"], batch["reads"], strict=True):
            layout = Layout(compressor.backbone)
            layout.add_text(first)
            for index, number in enumerate(row):
                if index:
                    layout.add_text(between)
                source = sources[number]
                if isinstance(source, Memory):
                    compressor.add_memory(layout, source)
                else:
                    layout.add_text(source)
            layout.add_text(torch.cat([last, read]))
            rows.append(layout.finish())
        states = only_pass(compressor.backbone, rows)
        lengths = torch.tensor([len(row.positions) for row in rows], device=states.device)
        counts = torch.tensor([len(target) for target in batch["targets"]], device=states.device)
        row_of = torch.arange(len(rows), device=states.device).repeat_interleave(counts)
        within = torch.arange(len(row_of), device=states.device) - (counts.cumsum(0) - counts)[row_of]
        return states[row_of, (lengths - 1 - counts)[row_of] + within]

    def _by_kind(self, batch: Batch, losses: Tensor) -> dict[str, Tensor]:
        """Return the mean loss of every kind of row that is there."""
        counts = torch.tensor([len(target) for target in batch["targets"]])
        kinds = torch.tensor(batch["kinds"]).repeat_interleave(counts)
        return {KINDS[kind]: losses[(kinds == kind).to(losses.device)].mean() for kind in kinds.unique().tolist()}

    def _predicted(self, states: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        return top_predictions(self.compressor.backbone, states.detach(), options.top_k, options.temperature)

    def _ratio(self, rng: np.random.Generator) -> int | None:
        """Draw the ratio that a batch's documents are compressed with, for methods that have several."""
        if not isinstance(self.compressor, GistCompressor):
            return None
        return int(rng.choice(self.compressor.ratio_choice().ratios))


@contextmanager
def teaching(compressor: Compressor) -> Iterator[None]:
    """Have the model predict as it would untrained: without gradients and dropout, and with its LoRA off."""
    was_training = compressor.training
    compressor.eval()
    try:
        with torch.no_grad(), lora_off(compressor):
            yield
    finally:
        compressor.train(was_training)


@contextmanager
def _one_ratio(compressor: Compressor, ratio: int | None) -> Iterator[None]:
    if not isinstance(compressor, GistCompressor) or ratio is None:
        yield
        return
    several, compressor.ratio = compressor.ratio, [ratio]
    try:
        yield
    finally:
        compressor.ratio = several
