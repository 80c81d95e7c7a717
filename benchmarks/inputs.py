"""What benchmarks run on: models with random weights of real shapes, and generated pages nobody has seen before."""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ctxdocs.checkpoints import BUNDLED, load_compressor
from ctxdocs.compressors import compressor_class
from ctxdocs.corpus import Chunker, find_files, load_document

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor

#: Every method as published: its name and its settings, where those are not the defaults.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "autocompressor": ("autocompressor", {"summary_length": 50}),
    "beacon": ("beacon", {"ratio": 8}),
    "ultragist": ("ultragist", {"ratio": 8}),
    "ccm-concat": ("ccm", {"attn_type": "concat_recur", "num_comp_tokens": 2}),
    "ccm-merge": ("ccm", {"attn_type": "merge_recur", "num_comp_tokens": 8}),
    "rcc": ("rcc", {}),
}

#: Llama configurations: a toy, GPT-2 small's size, TinyLlama 1.1B, Llama 2 7B, Llama 3.1 8B.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
    "0.1b": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
_POSITIONS = 65536
_COMMON_WORDS = [
    *("the", "of", "and", "to", "in", "is", "that", "for", "with", "as", "on", "by", "at", "from", "it", "are", "be"),
    *("this", "which", "or", "an", "was", "not", "have", "can"),
]
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstv" for vowel in "aeiou"]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`compressor_from` reads."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default=BUNDLED, help="a model folder or hub name (default: the bundled model)")
    model.add_argument("--shape", choices=SHAPES, help="random weights of this size instead; nothing is downloaded")
    add_run_arguments(parser)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where and how a model runs, and where figures go."""
    parser.add_argument("--device", default="auto", help="cpu, cuda ... (default: a GPU where there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="bfloat16, float32 ... (default: the model's; shapes: bfloat16 on a GPU)"
    )
    parser.add_argument("--attention", default="auto", help="sdpa, eager, flash_attention_2 (default: transformers')")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights and generated text")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")


def compressor_from(options: argparse.Namespace) -> Compressor:
    """Load or build the compressor that the command line asks for."""
    if options.shape is None:
        return load_compressor(
            options.model, device=options.device, dtype=options.dtype, attn_implementation=options.attention
        )
    return random_compressor("autocompressor", options.shape, options)


def random_compressor(method: str, shape: str, options: argparse.Namespace) -> Compressor:
    """Build a compressor with random weights, straight on the device; ``method`` is one of ``METHODS``, or ``"kv"``."""
    from transformers import AutoModel, AutoModelForCausalLM

    name, settings = METHODS.get(method, (method, {}))
    config = _neox_config(shape) if name == "rcc" else _llama_config(shape)
    device = device_of(options)
    chosen: dict[str, Any] = {"dtype": options.dtype}
    if options.dtype == "auto":
        chosen["dtype"] = "float32" if device.type == "cpu" else "bfloat16"
    if options.attention != "auto":
        chosen["attn_implementation"] = options.attention
    torch.manual_seed(options.seed)
    with device:
        models = [AutoModelForCausalLM.from_config(config, **chosen)]
        if name == "rcc":
            models.append(AutoModel.from_config(config, **chosen))
    build: Any = compressor_class(name)
    compressor = build(*models, tokenizer=_tokenizer(config.vocab_size), **settings)
    compressor.requires_grad_(False)
    return compressor.eval()


def training_free(
    methods: Sequence[str], shape: str, options: argparse.Namespace, ratio: float
) -> dict[str, Compressor]:
    """Build compressors of methods without training around one model with random weights, ``"kv"`` among them."""
    base = random_compressor("kv", shape, options)
    made: dict[str, Compressor] = {}
    for method in methods:
        build: Any = compressor_class(method)
        made[method] = build(base.model, base.tokenizer, **({} if method == "kv" else {"ratio": ratio})).eval()
        made[method]._fingerprint = method  # hashing gigabytes of random weights would tell nobody anything
    return made


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that the command line asks for."""
    if options.device != "auto":
        return torch.device(options.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(compressor: Compressor, name: str | None) -> dict[str, Any]:
    """Return what the compressor is, as JSON-able values; ``name`` is that of a shape."""
    return {
        "name": name or compressor.name_or_path,
        "method": compressor.method,
        "parameters": sum(parameter.numel() for parameter in compressor.parameters()),
        "dtype": str(compressor.backbone.dtype).removeprefix("torch."),
        "attention": compressor.model.config._attn_implementation,
        **compressor.format_settings,
        **compressor.run_settings,
    }


def write_pages(folder: Path, count: int, seed: int) -> Path:
    """Write ``count`` markdown pages; return the folder."""
    folder.mkdir(parents=True)
    for number, text in enumerate(itertools.islice(pages(seed), count)):
        (folder / f"page-{number:05}.md").write_text(text, encoding="utf-8")
    return folder


def copy_quarter(corpus: Path, folder: Path) -> Path:
    """Copy every fourth document of a corpus; return the folder."""
    folder.mkdir(parents=True)
    for number, source in enumerate(find_files([corpus])[::4]):
        shutil.copyfile(source.path, folder / f"{number:05}{source.path.suffix}")
    return folder


def pages(seed: int | str) -> Iterator[str]:
    """Yield markdown pages without end: headings, paragraphs and lists, from a hundred to a few thousand words."""
    spell, choose = random.Random("words"), random.Random(seed)  # one language, different pages
    rare = ["".join(spell.choices(_SYLLABLES, k=spell.randint(2, 4))) for _ in range(5000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(rare) + 1)))

    def sentence() -> str:
        count = choose.randint(6, 20)
        drawn = iter(choose.choices(rare, cum_weights=weights, k=count))
        words = [choose.choice(_COMMON_WORDS) if choose.random() < 0.45 else next(drawn) for _ in range(count)]
        return " ".join(words).capitalize() + "."

    def section() -> str:
        title = " ".join(choose.choices(rare, k=3)).title()
        paragraphs = [" ".join(sentence() for _ in range(choose.randint(2, 6))) for _ in range(choose.randint(1, 3))]
        if choose.random() < 0.4:
            paragraphs.append("\n".join(f"- {sentence()}" for _ in range(choose.randint(2, 6))))
        return "\n\n".join([f"## {title}", *paragraphs])

    while True:
        sections = [section() for _ in range(round(choose.lognormvariate(1.4, 0.7)) + 1)]
        yield "\n\n".join([f"# {' '.join(choose.choices(rare, k=2)).title()}", *sections]) + "\n"


def chunks_of(corpus: Path, compressor: Compressor, chunk_tokens: int, overlap_tokens: int) -> Iterator[torch.Tensor]:
    """Yield the token ids of every chunk of a folder's documents, cut as a library cuts them."""
    chunker = Chunker(compressor.tokenizer, chunk_tokens, overlap_tokens)
    for source in find_files([corpus]):
        for chunk in chunker(load_document(source).text):
            yield torch.tensor(chunk.ids)


def stretches(compressor: Compressor, lengths: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Return generated token ids of exactly these lengths, 1-D int64 each."""
    encode: Any = compressor.tokenizer
    texts = (encode(text, add_special_tokens=False)["input_ids"] for text in pages(seed))
    endless = itertools.chain.from_iterable(texts)
    return [torch.tensor(list(itertools.islice(endless, length))) for length in lengths]


def _llama_config(shape: str) -> PreTrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], max_position_embeddings=_POSITIONS, tie_word_embeddings=False)


def _neox_config(shape: str) -> PreTrainedConfig:
    """Return a GPT-NeoX of the same size: its MLP has two matrices in place of three, and they are wider."""
    from transformers import GPTNeoXConfig

    sizes = {name: value for name, value in SHAPES[shape].items() if name != "num_key_value_heads"}
    sizes["intermediate_size"] = 4 * sizes["hidden_size"]
    return GPTNeoXConfig(**sizes, max_position_embeddings=_POSITIONS, tie_word_embeddings=False)


@functools.cache
def _tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on generated pages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.islice(pages("tokenizer"), 200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
