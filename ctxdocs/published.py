"""The model that comes with the package, and every checkpoint that the methods' authors have published.

A table and nothing else. What a row says was read in the authors' repositories, model cards and configurations; what
could not be read there is None. None of these weights could be downloaded where this was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: Name of the model that comes with the package.
BUNDLED = "bundled"
#: Where the authors of CCM keep their adapters: nowhere else.
CCM_DRIVE = "https://drive.google.com/drive/folders/1qutEXBekpUTaE8fJhjKT-5DMzXpN55cx"


def bundled_path() -> Path:
    """Return the folder of the model that comes with the package."""
    return Path(__file__).parent / "models" / BUNDLED


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A checkpoint that ``load_compressor`` reads, found by its name.

    Parameters
    ----------
    name : str
        Its name on the Hugging Face hub, ``owner/model``; of an adapter that is not on the hub, its folder's name.
    method : str
        The method that reads it, a key of ``ctxdocs.compressors.METHODS``.
    base : str
        The language model it was made from, by its name on the hub. An adapter is loaded on top of it.
    slots : int or None
        Memory slots that a segment of text becomes, however long it is; 0 for a baseline without memory, None where
        ``ratios`` say it.
    keeps : str
        What becomes of the segments' slots: ``"all"`` stay, the ``"last"`` ones replace those before, or their
        ``"mean"`` stays.
    ratios : tuple of int
        Text tokens per slot; of several, one is chosen for every text.
    window : int or None
        Text tokens that are compressed at a time, as in training (their mean, where lengths were drawn); None where
        that is a turn or an example, of any length, or nothing is compressed.
    positions : int or None
        Positions the model has; None where its configuration could not be read.
    licence : str or None
        What its model card declares; None where there is none or it could not be read. The licence of ``base`` applies
        as well.
    note : str
        What sets it apart from its neighbours.
    drive : str or None
        Where it lies on ``CCM_DRIVE``; None for a checkpoint on the hub.
    settings : mapping
        What ``load_compressor`` runs it with unless told otherwise. They come before what its configuration says,
        which may be how it was trained.
    """

    name: str
    method: str
    base: str
    slots: int | None = None
    keeps: str = "all"
    ratios: tuple[int, ...] = ()
    window: int | None = None
    positions: int | None = None
    licence: str | None = None
    note: str
    drive: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)


_LLAMA_2, _LLAMA_2_CHAT = "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"
_OPT_LARGE, _OPT_SMALL = "facebook/opt-2.7b", "facebook/opt-1.3b"
_QWEN, _MISTRAL = "Qwen/Qwen2-7B-Instruct", "mistralai/Mistral-7B-Instruct-v0.2"
# Its authors converted Meta's weights themselves; this is a public conversion of the same.
_LLAMA = "huggyllama/llama-7b"


def _autocompressor(model: str, base: str, *, positions: int | None, tokens: int, steps: int) -> PublishedCheckpoint:
    """Describe one of the models of arXiv 2305.14788; all of them declare the same licence."""
    is_rmt, window = model.startswith("RMT"), tokens // steps
    kept = "RMT baseline: keeps the last segment's vectors" if is_rmt else "keeps the vectors of all segments"
    return PublishedCheckpoint(
        name=f"princeton-nlp/{model}",
        method="autocompressor",
        base=base,
        slots=50,
        keeps="last" if is_rmt else "all",
        window=window,
        positions=positions,
        licence="apache-2.0",
        note=f"{kept}; trained on texts of {tokens} tokens",
        # RMT saw segments of this one length, AutoCompressors of many.
        settings={"segment_tokens": window} if is_rmt else {},
    )


def _full_attention(model: str, base: str, *, positions: int | None, tokens: int) -> PublishedCheckpoint:
    """Describe a baseline of the same paper that reads the text itself."""
    return PublishedCheckpoint(
        name=f"princeton-nlp/{model}",
        method="autocompressor",
        base=base,
        slots=0,
        positions=positions,
        licence="apache-2.0",
        note=f"full-attention baseline: no memory; trained on texts of {tokens} tokens",
    )


def _gist(
    name: str,
    method: str,
    base: str,
    *,
    ratios: tuple[int, ...] = (2, 4, 8, 16, 32),
    window: int,
    positions: int,
    licence: str | None = None,
    note: str,
) -> PublishedCheckpoint:
    """Describe one of the models of arXiv 2401.03462 and 2405.16635."""
    return PublishedCheckpoint(
        name=f"namespace-Pt/{name}",
        method=method,
        base=base,
        ratios=ratios,
        window=window,
        positions=positions,
        licence=licence,
        note=note,
        # As they were evaluated: the lowest ratio with which a text and 1024 more tokens fit. A draw per window, which
        # a configuration may ask for, is how they were trained.
        settings={"ratio_mix": "adapt-1024"},
    )


def _ccm(name: str, folder: str, *, slots: int, data: str) -> PublishedCheckpoint:
    """Describe one of the adapters of arXiv 2312.03414, for which no licence is declared apart from the code's."""
    chat = name.startswith("llama-2")
    on_top = "" if chat else "; on top of the LoRA llama-7b-no, which lies in the same dataset's folder"
    return PublishedCheckpoint(
        name=name,
        method="ccm",
        base=_LLAMA_2_CHAT if chat else _LLAMA,
        slots=slots,
        keeps="mean" if "-merge" in name else "all",
        positions=4096 if chat else 2048,
        note=f"adapter, trained on {data}{on_top}",
        drive=f"{folder}/{name}",
    )


_FINE_TUNED = "fine-tuned, with these ratios; its configuration may have more"
_PRETRAINED = "pretrained only; has no model card"
_SINK = "keeps the first token as it is"
_WEB_AND_TASKS = "RedPajama-v2, MetaICL and SODA"
_WEB_CHAT_AND_TASKS = "RedPajama-v2, LMSYS-Chat-1M, MetaICL and SODA"

#: Every published checkpoint, method by method.
PUBLISHED: tuple[PublishedCheckpoint, ...] = (
    _autocompressor("AutoCompressor-Llama-2-7b-6k", _LLAMA_2, positions=4096, tokens=6144, steps=4),
    _full_attention("FullAttention-Llama-2-7b-6k", _LLAMA_2, positions=None, tokens=6144),
    _autocompressor("AutoCompressor-2.7b-6k", _OPT_LARGE, positions=2048, tokens=6144, steps=4),
    _autocompressor("RMT-2.7b-8k", _OPT_LARGE, positions=2048, tokens=8192, steps=4),
    _full_attention("FullAttention-2.7b-4k", _OPT_LARGE, positions=4096, tokens=4096),
    _autocompressor("AutoCompressor-2.7b-30k", _OPT_LARGE, positions=2048, tokens=30720, steps=20),
    _autocompressor("AutoCompressor-1.3b-30k", _OPT_SMALL, positions=2048, tokens=30720, steps=20),
    _autocompressor("RMT-1.3b-30k", _OPT_SMALL, positions=2048, tokens=30720, steps=15),
    # activation-beacon-mistral-7b and activation-beacon-llama2-7b-chat are gone: their author has them no more
    # (FlagEmbedding issue 1431). The latter was of an older form of the method, with lists of strides, which is not
    # read here. No published one for Llama-3 could be found, though its training is described.
    _gist(
        "beacon-qwen-2-7b-instruct", "beacon", _QWEN, ratios=(2, 4, 8), window=2048, positions=32768, note=_FINE_TUNED
    ),
    _gist("beacon-qwen-2-7b-instruct-pretrain", "beacon", _QWEN, window=2048, positions=32768, note=_PRETRAINED),
    _gist(
        "ultragist-llama2-7b-chat", "ultragist", _LLAMA_2_CHAT, window=1024, positions=4096, licence="mit", note=_SINK
    ),
    _gist("ultragist-mistral-7b-inst", "ultragist", _MISTRAL, window=2048, positions=32768, licence="mit", note=_SINK),
    PublishedCheckpoint(
        name="fcyp/RCC_Ins_Reconstruction",
        method="rcc",
        base="EleutherAI/pythia-1.4b",
        ratios=(32,),
        window=2048,
        positions=2048,
        note="encoder and decoder; answers questions, and writes down instructions that were compressed",
        # Its configuration is that of the base model.
        settings={"ratio": 32, "window": 2048},
    ),
    # The drive holds more, those for MetaICL among them; what their folders are called could not be found out.
    _ccm("llama-7b-no-online-concat_recur-ntok2", "unified/finetune", slots=2, data="MetaICL and SODA"),
    _ccm("llama-7b-no-online-merge_recur-ntok8", "unified/finetune", slots=8, data="MetaICL and SODA"),
    _ccm("llama-2-7b-chat-online-concat_recur-ntok2-sink_pajama", "pretrain", slots=2, data=_WEB_AND_TASKS),
    _ccm("llama-2-7b-chat-online-merge_recur-ntok8-sink", "pretrain", slots=8, data=_WEB_CHAT_AND_TASKS),
    _ccm("llama-7b-no-online-concat_recur-ntok2-sink", "pretrain/finetune", slots=2, data=_WEB_CHAT_AND_TASKS),
    _ccm("llama-7b-no-online-merge_recur-ntok2", "dialog", slots=2, data="DailyDialog"),
    _ccm("llama-7b-no-online-merge-ntok4", "lamp/finetune", slots=4, data="LaMP-2"),
)


def find_published(name: str) -> PublishedCheckpoint | None:
    """Find a checkpoint by its hub name, or one that is not on the hub by its folder, wherever that lies."""
    folder = Path(name).name
    return next((row for row in PUBLISHED if row.name == (folder if row.drive else name)), None)
