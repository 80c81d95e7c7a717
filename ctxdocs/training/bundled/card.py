"""The model card, written from measured figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.compressors.autocompressor import AutoCompressor
from ctxdocs.compressors.base import Compressor
from ctxdocs.compressors.gist import GistCompressor
from ctxdocs.training.bundled import sources
from ctxdocs.training.bundled.checkpoint import Progress
from ctxdocs.training.bundled.evaluate import CONTINUATION_TOKENS, DOCUMENT_TOKENS, NOTHING, Figure
from ctxdocs.training.bundled.recipe import PRESETS, Recipe
from ctxdocs.training.bundled.train import count_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CURVE_ROWS = 8
_TABLES = {
    "minilm": "that of all-MiniLM-L6-v2 (Apache-2.0), carried over to this tokenizer; the layers start from scratch",
    "random": "random",
}
_NAMES = {"autocompressor": "AutoCompressor", "beacon": "Activation Beacon", "kvzip": "KVzip"}
_BEHIND = {
    "autocompressor": "; each summary vector\nalso names, through the output head, words of its document",
    "beacon": " into\neverything; the ratio is drawn per step",
    "kvzip": ";\nin training they hold every slot of their document",
}

_CLOZE = """;
{:.0%} of the documents that are asked about come with questions made of running text, a sentence without one of its
names or numbers"""

_CARD = """# The bundled model

A Llama-architecture model of {millions} million parameters with {name} memories, made by
`python -m ctxdocs.training.bundled --preset {preset}`. It makes the first minutes with ctxdocs real without a
network and shows what compression keeps. **It is no assistant**: it has read too little to answer most questions,
from memory or from text. For answers, load a real checkpoint on a GPU.

| | |
|---|---|
| layers x width, heads, feed-forward | {shape} |
| tokenizer | byte-level BPE, {vocabulary} tokens |
| memory | {memory} |
| lengths in training | documents of {lengths} tokens; 1 to {most} memories; plain rows of {plain} tokens |
| initial token table | {table} |
| training | {training} |
| weights | bfloat16 safetensors |

## What a memory is worth

Measured on documents whose titles were kept from training (2 % of them, the test split), with 95 % bootstrap
intervals over documents. {document} tokens of a document stand in front of a continuation of {continuation}; the
loss is that of the continuation but its first token, in nats per token. "other memory" is the memory of another
document, the control: what the right memory saves beyond it is owed to the document's content.

{losses}

Saved against nothing, document by document:

{gains}

By source:

| source | {contexts} | documents |
|---|{columns}
{sources}

Questions about {paragraphs} paragraphs that were kept from training: the loss of the answer's tokens, and F1 of the
words of the greedy answer.

{answer_losses}

{answer_scores}

## Training

Every step mixes plain text, continuations behind 1 to {most} memories (one of them the right one), documents rebuilt
from their memory, and questions behind memories and behind text{cloze}. Gradients flow through the memories{behind}.

{curve}

## Data

The weights were trained on these texts; the texts themselves are not part of the model's folder. Published
development and test sets were not used.{overlap}

| data | training tokens | licence |
|---|---:|---|
{data}
"""


def write_card(
    output: Path, compressor: Compressor, progress: Progress, figures: Mapping[str, Any], prepared: Mapping[str, Any]
) -> None:
    """Write ``README.md`` into the model's folder.

    Parameters
    ----------
    output : Path
        The folder.
    compressor : AutoCompressor
        What was measured.
    progress : Progress
        How it was trained.
    figures : mapping
        What :func:`ctxdocs.training.bundled.evaluate.evaluate` returned for the test split.
    prepared : mapping
        What is in ``prepared.json``, see :func:`ctxdocs.training.bundled.data.prepare`.
    """
    (output / "README.md").write_text(card(compressor, progress, figures, prepared), encoding="utf-8")


def card(compressor: Compressor, progress: Progress, figures: Mapping[str, Any], prepared: Mapping[str, Any]) -> str:
    """Return the model card as markdown."""
    recipe, config = PRESETS[progress.preset], compressor.model.config
    return _CARD.format(
        millions=f"{count_parameters(compressor) / 1e6:.1f}",
        preset=progress.preset,
        shape=_shape(config),
        vocabulary=config.vocab_size,
        name=_NAMES[compressor.method],
        memory=_memory(compressor),
        cloze=_CLOZE.format(recipe.cloze) if recipe.cloze else "",
        behind=_BEHIND[compressor.method],
        lengths=_listed(recipe.document_tokens),
        most=recipe.most_memories,
        plain=_listed(recipe.text_tokens),
        table=_TABLES[recipe.table],
        training=_training(progress),
        document=DOCUMENT_TOKENS,
        continuation=CONTINUATION_TOKENS,
        losses=_table(figures["continuation"], "loss"),
        gains=_table({name: gain for name, gain in figures["gain"].items() if name != NOTHING}, "saved"),
        contexts=" | ".join(figures["continuation"]),
        columns="---:|" * (len(figures["continuation"]) + 1),
        sources=_by_source(figures["continuation_by_source"]),
        paragraphs=figures["answer_loss"][NOTHING].documents,
        answer_losses=_table(figures["answer_loss"], "loss of the answer"),
        answer_scores=_table(figures["answer_f1"], "F1"),
        curve=_curve(progress),
        overlap=_overlap(prepared.get("overlap")),
        data=_data(prepared["tokens"], recipe),
    )


def _memory(compressor: Compressor) -> str:
    if isinstance(compressor, AutoCompressor):
        return f"{compressor.summary_length} summary vectors per segment of up to {compressor.segment_tokens} tokens"
    if isinstance(compressor, GistCompressor):
        return f"keys and values of beacon tokens behind windows of up to {compressor.window} tokens"
    return "a fourth of the keys and values of the document's tokens, those that repeating the document needs most"


def _training(progress: Progress) -> str:
    this = f"{progress.step:,} steps, {_amount(progress.tokens, progress.seconds)} on {progress.device}"
    earlier = [f"{_amount(run['tokens'], run['seconds'])} of an earlier run" for run in progress.before]
    return ", behind ".join([this, *earlier])


def _amount(tokens: int, seconds: float) -> str:
    return f"{tokens:,} slots (tokens and summary slots) in {seconds / 60:.0f} minutes"


def _shape(config: PretrainedConfig) -> str:
    layers, width = config.num_hidden_layers, config.hidden_size
    return f"{layers} x {width}, {config.num_attention_heads}, {config.intermediate_size}"


def _table(figures: Mapping[str, Figure], header: str) -> str:
    rows = [
        f"| {context} | {figure.mean:.3f} | {figure.low:.3f} to {figure.high:.3f} | {figure.documents} |"
        for context, figure in figures.items()
    ]
    return "\n".join([f"| given | {header} | 95 % interval | documents |", "|---|---:|---:|---:|", *rows])


def _by_source(figures: Mapping[str, Mapping[str, Figure]]) -> str:
    return "\n".join(
        f"| {name} | {' | '.join(f'{figure.mean:.3f}' for figure in row.values())} | {row[NOTHING].documents} |"
        for name, row in figures.items()
    )


def _curve(progress: Progress) -> str:
    every = max(1, len(progress.log) // _CURVE_ROWS)
    rows = progress.log[every - 1 :: every]
    if not rows:
        return ""
    header = list(rows[-1])
    lines = [f"| {' | '.join(header)} |", f"|{'---:|' * len(header)}"]
    lines += [f"| {' | '.join(str(row[name]) for name in header)} |" for row in rows]
    return "Training losses over time (nats per token):\n\n" + "\n".join(lines)


def _overlap(found: Mapping[str, int] | None) -> str:
    if found is None:
        return ""
    return (
        f" Of {found['records']:,} training records\n{found['removed']:,} were left out, and {found['shortened']:,} "
        f"lost paragraphs, because they shared {found['words']} words in a row\nwith what is held out."
    )


def _data(tokens: Mapping[str, int], recipe: Recipe) -> str:
    rows = [f"| {s.name} | {tokens[f'train.{s.name}']:,} | {s.licence} |" for s in sources.TEXTS]
    rows.append(
        f"| questions | {tokens['train.questions']:,} | "
        + "; ".join(f"{s.name}: {s.licence}" for s in sources.QUESTIONS)
        + " |"
    )
    if recipe.cloze:
        rows.append(f"| questions made of running text | {tokens['train.cloze']:,} | that of the text |")
    return "\n".join(rows)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
