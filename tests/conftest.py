"""Tiny random models, built from config: nothing is downloaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch

TEXT = """The lighthouse on Gannet Rock was built in 1874 from grey granite. Its keeper, Maud Ferris, counted ships by
hand. The tide gauge stands on the north pier; it is read every six hours. In winter the ferry sails twice a day, in
summer five times. Café owners (three of them) sell smoked mackerel. 42 gulls nest on the roof of the old school!
"""


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 400 tokens: any text goes in, and comes back the same."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")


def tiny_model(architecture: str = "llama", **changes):
    """A causal language model with random weights, two layers of width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(changes.pop("seed", 0))
    shared = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 2048}
    shared |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, **changes}
    if architecture == "opt":
        config = OPTConfig(
            ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=16, dropout=0.0, init_std=0.2, **shared
        )
        return OPTForCausalLM(config).eval()
    shared |= {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    if architecture == "mistral":
        return MistralForCausalLM(MistralConfig(sliding_window=None, **shared)).eval()
    return LlamaForCausalLM(LlamaConfig(**shared)).eval()


def tiny_autocompressor(architecture: str = "llama", tokenizer=None, *, summary_length: int = 4, **changes):
    """An AutoCompressor around :func:`tiny_model`, as ``load_compressor`` would return it."""
    from ctxdocs.compressors.autocompressor import AutoCompressor

    settings = {name: changes.pop(name) for name in ("accumulate_summary", "segment_tokens") if name in changes}
    compressor = AutoCompressor(
        tiny_model(architecture, **changes), tokenizer, summary_length=summary_length, **settings
    )
    torch.manual_seed(7)
    torch.nn.init.normal_(compressor.embed_summary.weight, std=0.5)
    compressor.requires_grad_(False)
    return compressor.eval()


def tiny_rcc(tokenizer=None, *, encoder_layers: int = 2, seed: int = 0, **settings):
    """An RCC of two GPT-NeoX models with random weights, width 32, as ``load_compressor`` would return it."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel

    from ctxdocs.compressors.rcc import RCC

    torch.manual_seed(seed)
    shared = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    shared |= {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    positions = settings.pop("max_position_embeddings", 2048)
    decoder = GPTNeoXConfig(num_hidden_layers=2, max_position_embeddings=positions, **shared)
    encoder = GPTNeoXConfig(num_hidden_layers=encoder_layers, max_position_embeddings=2048, **shared)
    settings = {"ratio": 4, "window": 16, **settings}
    compressor = RCC(GPTNeoXForCausalLM(decoder), GPTNeoXModel(encoder), tokenizer, **settings)
    compressor.requires_grad_(False)
    return compressor.eval()


def tiny_ccm(architecture: str = "llama", tokenizer=None, *, num_comp_tokens: int = 2, **changes):
    """A CCM compressor around :func:`tiny_model`, as ``load_compressor`` would return it."""
    from ctxdocs.compressors.ccm import CCM

    names = ("attn_type", "sink", "segment_tokens", "lora_rank")
    settings = {name: changes.pop(name) for name in names if name in changes}
    compressor = CCM(tiny_model(architecture, **changes), tokenizer, num_comp_tokens=num_comp_tokens, **settings)
    torch.manual_seed(7)
    for parameter in compressor.own_parameters().values():
        torch.nn.init.normal_(parameter, std=0.2)
    compressor.requires_grad_(False)
    return compressor.eval()


def tiny_gist(method: str = "beacon", tokenizer=None, *, model=None, **changes):
    """A compressor with gist tokens around :func:`tiny_model`; its own parameters differ from the model's."""
    from ctxdocs.compressors import compressor_class

    settings = {"window": 16, "ratio": 4, **changes}
    compressor = compressor_class(method)(model or tiny_model(), tokenizer, **settings)
    torch.manual_seed(7)
    for parameter in compressor.own_parameters().values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return compressor.requires_grad_(False).eval()


def tiny_kv(method: str = "kv", tokenizer=None, *, model=None, **settings):
    """A compressor without training around :func:`tiny_model`, as ``load_compressor`` would return it."""
    from ctxdocs.compressors import compressor_class

    compressor = compressor_class(method)(model or tiny_model(), tokenizer, **settings)
    return compressor.requires_grad_(False).eval()


TRAINING_FREE = {
    "kv": {},
    "kvzip": {"piece_tokens": 20},
    "kvzip-global": {"budget": "global", "piece_tokens": 20},
    "kvzip-compact": {"positions": "compact", "ratio": 4},
    "expected_attention": {},
    "snapkv": {"window": 8},
    "streaming": {},
}


@pytest.fixture(scope="session")
def compressor(tokenizer):
    """A Llama AutoCompressor with a tokenizer."""
    return tiny_autocompressor(tokenizer=tokenizer)


@pytest.fixture(
    scope="session",
    params=[
        *("llama", "llama-rmt", "opt", "beacon", "ultragist", "rcc", "ccm-concat_recur", "ccm-merge_recur"),
        *TRAINING_FREE,
    ],
)
def any_compressor(request, tokenizer):
    """Every method and architecture in turn: the tests that use it hold for each."""
    if request.param == "rcc":
        return tiny_rcc(tokenizer)
    if request.param in ("beacon", "ultragist"):
        return tiny_gist(request.param, tokenizer)
    if request.param in TRAINING_FREE:
        return tiny_kv(request.param.partition("-")[0], tokenizer, **TRAINING_FREE[request.param])
    architecture, _, variant = request.param.partition("-")
    if architecture == "ccm":
        return tiny_ccm(tokenizer=tokenizer, attn_type=variant, sink=variant == "merge_recur", segment_tokens=24)
    return tiny_autocompressor(architecture, tokenizer, accumulate_summary=variant != "rmt", segment_tokens=24)


@pytest.fixture(scope="session")
def tiny_checkpoint(compressor, tmp_path_factory) -> Path:
    """A saved compressor."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    compressor.save(folder)
    return folder


class FakeEmbedder:
    """Bags of hashed words: texts that share words are near each other."""

    name = "fake-bag-of-words"
    dimension = 64
    reloadable = False

    def embed_documents(self, texts: Sequence[str]) -> np.ndarray:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            for word in text.lower().split():
                digest = hashlib.sha256(word.strip(".,;:!?").encode()).digest()
                vectors[row, digest[0] % self.dimension] += 1
        return vectors

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed_documents(texts)


@pytest.fixture(scope="session")
def embedder() -> FakeEmbedder:
    """An embedder that needs no model."""
    return FakeEmbedder()


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of three small documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "lighthouse.md").write_text("# Lighthouse\n\nThe lighthouse was built in 1874.\n", encoding="utf-8")
    (folder / "ferry.txt").write_text("The ferry sails twice a day in winter.\n", encoding="utf-8")
    (folder / "gauge.rst").write_text("Tide gauge\n==========\n\nIt is read every six hours.\n", encoding="utf-8")
    return folder


@pytest.fixture
def make_library(tmp_path, compressor, embedder) -> Callable[..., object]:
    """Create a library with the tiny compressor and the fake embedder."""
    from ctxdocs import Library

    def make(name: str = "library", **settings):
        settings = {"chunk_tokens": 32, "overlap_tokens": 4, **settings}
        return Library.create(tmp_path / name, compressor, embedder, **settings)

    return make


@pytest.fixture
def prompts(monkeypatch, compressor) -> list[str]:
    """What the tiny compressor is given to read, prompt by prompt: ``<4>`` stands for a memory of four slots."""
    from ctxdocs.memory import Memory

    read: list[str] = []
    prefill, decode = compressor.prefill, compressor.tokenizer.decode

    def shown(part):
        return f"<{part.slots}>" if isinstance(part, Memory) else decode(part)

    def recorded(batch):
        read.extend("".join(map(shown, prompt)) for prompt in batch)
        return prefill(batch)

    monkeypatch.setattr(compressor, "prefill", recorded)
    return read
