"""docs/adding-a-method.md keeps its word: one class and one registry line make a method that does everything."""

from __future__ import annotations

import torch

from ctxdocs import Library, SoftPrompt, load_compressor
from ctxdocs.compressors import METHODS
from ctxdocs.compressors.base import Compressor

from .conftest import FakeEmbedder, tiny_model


class Strided(Compressor):
    """Every ``ratio``-th final state, as a soft prompt."""

    method = "strided"

    def __init__(self, model, tokenizer=None, *, ratio=8, prompt_format=None):
        super().__init__(model, tokenizer, prompt_format=prompt_format)
        self.ratio = ratio

    @classmethod
    def recognises(cls, config):
        return "ratio" in config

    @classmethod
    def own_tensors(cls, config):
        return set()

    @classmethod
    def build(cls, model, tokenizer, config, tensors, **settings):
        return cls(model, tokenizer, ratio=config["ratio"], **settings)

    @property
    def format_settings(self):
        return {"ratio": self.ratio}

    @property
    def run_settings(self):
        return {}

    def compress_batch(self, documents):
        lengths = [len(document) for document in documents]
        ids = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
        positions = torch.arange(ids.shape[1], device=self.backbone.device)[None]
        states = self.backbone.run(self.backbone.embed(ids), positions)
        kept = [row[self.ratio - 1 : n : self.ratio].clone() for row, n in zip(states, lengths, strict=True)]
        return [
            SoftPrompt(vectors=v, span=len(v), source_tokens=n, fingerprint=self.fingerprint)
            for v, n in zip(kept, lengths, strict=True)
        ]

    def session(self, memories=(), **options):
        raise NotImplementedError


def test_one_class_and_one_line_are_enough(tokenizer, tmp_path, corpus, monkeypatch):
    monkeypatch.setitem(METHODS, "strided", f"{__name__}:Strided")
    made = Strided(tiny_model(), tokenizer, ratio=4).requires_grad_(False).eval()
    made.save(tmp_path / "strided")
    compressor = load_compressor(tmp_path / "strided")
    assert type(compressor).method == "strided"
    assert compressor.fingerprint == made.fingerprint
    memories = compressor.compress_ids([list(range(10, 42)), [5, 6, 7, 8, 9]])
    assert [memory.slots for memory in memories] == [8, 1]
    alone = compressor.compress_ids([[5, 6, 7, 8, 9]])[0]
    torch.testing.assert_close(memories[1].vectors, alone.vectors)
    assert compressor.logits([1, 2], memories).shape == (2, 400)
    library = Library.create(tmp_path / "library", compressor, FakeEmbedder(), chunk_tokens=32, overlap_tokens=4)
    assert library.add(corpus).documents == 3
    assert library.ask("lighthouse", max_new_tokens=4).memory_slots > 0
