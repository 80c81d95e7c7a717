"""Activation Beacon and UltraGist, slowly: every step reads everything anew, with masks and positions written out.

It shares nothing with the package but the parameters: attention is spelled out, keys are turned here, and the token
rows, masks, positions and bookkeeping follow the authors' rules one by one. Llama only, one row.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn.functional import silu

GIST = -1


class ByTheBook:
    """Reads calls of one text and keeps ``sink``, ``gist`` and ``raw`` per layer: lists of pairs of keys and values."""

    def __init__(self, compressor):
        self.compressor, self.model = compressor, compressor.model
        self.own = dict(zip(compressor.replaced, compressor.replacements, strict=True))
        self.window, self.stride = compressor.window, compressor.stride
        self.random, self.turn, self.lasting = np.random.default_rng(42), 0, None
        self.tokens, self.start, self.end = [], 0, 0
        self.ratio, self.counted, self.at_border, self.is_first = 0, 0, True, True
        self.flags = []
        head_dim = self.model.config.hidden_size // self.model.config.num_attention_heads
        empty = torch.zeros(2, self.model.config.num_key_value_heads, 0, head_dim)
        layers = range(self.model.config.num_hidden_layers)
        self.sink, self.gist, self.raw = ([empty for _ in layers] for _ in range(3))

    def call(self, ids, skip_first=0, skip_last=None):
        """Read more tokens; return their logits."""
        self.tokens += ids
        logits = []
        while self.end < len(self.tokens):
            if skip_first and not self.end:
                logits.append(self._keep_as_sink(skip_first))
            elif skip_last is not None and self.start >= skip_last:
                logits.append(self._keep_plain())
            else:
                logits.append(self._step())
        return torch.cat(logits)

    def _keep_as_sink(self, tokens):
        logits, self.sink = self._run(self.tokens[:tokens])
        self.start = self.end = tokens
        self.is_first = False
        return logits

    def _keep_plain(self):
        stop = min(self.start + self.window, len(self.tokens))
        logits, new = self._run(self.tokens[self.end : stop])
        self.raw = joined(self.raw, new)
        self.flags += [False] * (stop - self.end)
        self.start = self.end = stop
        self.at_border = False
        return logits

    def _step(self):
        stop = min(self.start + self.window, len(self.tokens))
        is_full = self.start + self.window <= len(self.tokens)
        row, ratio = self._row(self.tokens[self.end : stop], is_full)
        logits, new = self._run(row, ratio if GIST in row else None)
        compressor, size = self.compressor, self.compressor.sink_size
        if size and (not self.gist[0].shape[2] if compressor.renews_sink else self.is_first):
            self.sink = [layer[:, :, :size] for layer in new]
        self.is_first = False
        self.raw, self.flags = joined(self.raw, new), self.flags + [token == GIST for token in row]
        if is_full:
            flags = torch.tensor(self.flags)
            kept = [layer[:, :, flags] if ratio else layer[:, :, : self.stride] for layer in self.raw]
            self.gist = joined(self.gist, kept)
            self.raw = [layer[:, :, self.stride : self.window] for layer in self.raw]
            self.flags = [False] * (self.window - self.stride)
            self.start += self.stride
        self.at_border, self.end = is_full, stop
        return logits[torch.tensor([token != GIST for token in row])]

    def _row(self, tokens, is_full):
        """The tokens of a step with gist tokens among or behind them, and the window's ratio."""
        if not self.compressor.interleaves:
            ratio = self._draw() if is_full else 0
            return tokens + [GIST] * (self.stride // ratio if ratio else 0), ratio
        if self.at_border:
            self.ratio = self._draw()
        row = []
        for token in tokens:
            row.append(token)
            self.counted += bool(self.ratio)
            if self.ratio and self.counted == self.ratio:
                row.append(GIST)
                self.counted = 0
        return row, self.ratio

    def _draw(self):
        compressor, mix = self.compressor, self.compressor.ratio_mix
        ratios = compressor.ratio
        if len(ratios) == 1:
            return ratios[0]
        ratios = [ratio for ratio in ratios if not ratio or (ratio <= self.stride and self.stride % ratio == 0)]
        if mix == "sequence":
            self.turn += 1
            return ratios[(self.turn - 1) % len(ratios)]
        if mix == "step-random":
            return int(self.random.choice(ratios))
        if self.lasting is None and mix == "instance-random":
            self.lasting = int(self.random.choice(ratios))
        if self.lasting is None:
            positions = self.model.config.max_position_embeddings
            reach = {ratio: (positions - self.window) * ratio + self.window if ratio else positions for ratio in ratios}
            enough = [ratio for ratio in ratios if reach[ratio] >= len(self.tokens) + int(mix.partition("-")[2])]
            self.lasting = min(enough, key=reach.get) if enough else max(ratios)
        return self.lasting

    def _run(self, row, ratio=None):
        """One pass over a row; return all logits, and every layer's new keys (not turned) and values."""
        past = joined(self.sink, self.gist, self.raw)
        seen, size = past[0].shape[2], len(row)
        visible, positions = self._mask_and_positions(row, seen, ratio)
        is_gist = torch.tensor([token == GIST for token in row])[:, None]
        table = self.model.model.embed_tokens(torch.tensor([max(token, 0) for token in row]))
        states, new = torch.where(is_gist, self.compressor.embed_gist.weight, table), []

        def project(name, inputs):
            output = self.model.get_submodule(name)(inputs)
            return torch.where(is_gist, self.own[name](inputs), output) if name in self.own else output

        for index, layer in enumerate(self.model.model.layers):
            inputs, name = layer.input_layernorm(states), f"model.layers.{index}.self_attn."
            query, key, value = (
                project(f"{name}{kind}_proj", inputs).unflatten(1, (-1, past[0].shape[3])).transpose(0, 1)
                for kind in "qkv"
            )
            new.append(torch.stack([key, value]))
            keys, values = torch.cat([past[index], new[-1]], dim=2)
            keys = self._turned(keys, torch.cat([torch.arange(seen), positions]))
            groups = len(query) // len(keys)
            keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
            scores = self._turned(query, positions) @ keys.transpose(1, 2) / math.sqrt(keys.shape[2])
            found = scores.masked_fill(~visible, -math.inf).softmax(-1) @ values
            states = states + project(f"{name}o_proj", found.transpose(0, 1).reshape(size, -1))
            inputs, name = layer.post_attention_layernorm(states), f"model.layers.{index}.mlp."
            states = states + project(
                f"{name}down_proj", silu(project(f"{name}gate_proj", inputs)) * project(f"{name}up_proj", inputs)
            )
        return self.model.lm_head(self.model.model.norm(states)), new

    def _mask_and_positions(self, row, seen, ratio):
        size, gists, compressor = len(row), row.count(GIST), self.compressor
        visible, positions = torch.ones(size, seen + size).tril(seen).bool(), torch.arange(seen, seen + size)
        if not ratio or compressor.attention == "full-coverage":
            return visible, positions
        is_beacon = compressor.method == "beacon"
        interval = ratio if is_beacon else self.stride // gists
        first_gist = seen + size - gists
        base = first_gist - self.window
        for number in range(gists):
            sees, upto = visible[size - gists + number], interval * (number + 1)
            sees[base:] = False
            begin = 0 if compressor.attention == "step-expansion" else interval * number
            sees[base + begin : base + min(upto, self.window)] = True
            sees[first_gist + (0 if compressor.attend_prev else number) : first_gist + number + 1] = True
            origin = base + upto
            if compressor.attention == "segmentation":
                origin = (seen if is_beacon else base) + interval
            positions[size - gists + number] = origin + number * compressor.attend_prev
        return visible, positions

    def _turned(self, vectors, positions):
        cos, sin = (angles[0] for angles in self.model.model.rotary_emb(torch.zeros(1), positions[None]))
        first, second = vectors.chunk(2, dim=-1)
        return vectors * cos + torch.cat([-second, first], dim=-1) * sin


def joined(*parts):
    """Join slots layer by layer."""
    return [torch.cat(layers, dim=2) for layers in zip(*parts, strict=True)]
