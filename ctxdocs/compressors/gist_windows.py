"""Token rows read window by window, with gist tokens that take over what each window leaves.

Gist tokens ("beacons" in Activation Beacon) stand between the tokens of a window or behind them. Once a window is full
only their keys and values stay, and the slots close up: keys are kept before the rotary embedding, and a slot's
position is its place among the slots in front of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.compressors.passes import additive_mask
from ctxdocs.modeling.conditional import changed_rows
from ctxdocs.modeling.kv import fill_cache, recorded_keys_values
from ctxdocs.modeling.rotary import rotate_keys

if TYPE_CHECKING:
    from transformers import Cache

    from ctxdocs.compressors.gist import GistCompressor

#: What of :class:`Windows` is no tensor.
_COUNTERS = ("tokens_read", "_tokens_known", "_running", "_remainder", "_at_border", "_before_first_border", "_ratio")


class Windows:
    """Rows of tokens, all in step, and the slots that stand for what was read.

    Slots are tensors ``[2, layers, batch, kv_heads, slots, head_dim]``, keys (before the rotary embedding) and values.
    They are read in the order ``front``, ``sink``, ``gist``, ``raw``.

    Parameters
    ----------
    compressor : GistCompressor
        Its model, settings and gist parameters.
    batch : int
        Number of rows.
    front : torch.Tensor, optional
        Slots of memories that stand in front.
    tokens : int
        Length of the texts, where more of them is known than what is read first.

    Attributes
    ----------
    sink : torch.Tensor
        Of the first tokens.
    gist : torch.Tensor
        Of the gist tokens of finished windows, or of all tokens where the ratio was 0.
    raw : torch.Tensor
        Of everything in the running window.
    """

    def __init__(
        self, compressor: GistCompressor, batch: int = 1, *, front: Tensor | None = None, tokens: int = 0
    ) -> None:
        self.compressor = compressor
        empty = compressor.empty_slots(batch)
        self.front = empty if front is None else front
        self.sink = self.gist = empty
        self.tokens_read = 0
        self._tokens_known = tokens
        self._raw: list[Tensor] = [empty]
        self._raw_is_gist = torch.zeros(0, dtype=torch.bool, device=empty.device)
        self._running = 0  # text tokens in the running window
        self._remainder = 0  # text tokens since the last interleaved gist token
        self._at_border = True  # the last step closed a window
        self._before_first_border = True
        self._ratio: int | None = None
        self._trains = False  # the text is read as in training
        self._kept = False  # a window has been kept as it is
        self._choice = compressor.ratio_choice()
        self._cache: Cache | None = None

    @property
    def raw(self) -> Tensor:
        """Slots of the running window, gist tokens among them where they are interleaved."""
        return torch.cat(self._raw, dim=-2)

    @property
    def slots(self) -> Tensor:
        """All slots, in the order in which they are read."""
        return torch.cat([self.front, self.sink, self.gist, *self._raw], dim=-2)

    @property
    def room(self) -> int:
        """Tokens that the running window still takes."""
        return self.compressor.window - self._running

    @property
    def _raw_slots(self) -> int:
        return len(self._raw_is_gist)

    @property
    def _all_slots(self) -> int:
        return sum(part.shape[-2] for part in (self.front, self.sink, self.gist)) + self._raw_slots

    def read(
        self, ids: Tensor, *, skip_first: int = 0, skip_last: int | None = None, last_window: str = "compressed"
    ) -> Tensor:
        """Read more tokens, compressing every window that is full.

        Parameters
        ----------
        ids : torch.Tensor
            ``[batch, tokens]``, int64.
        skip_first : int
            At the start of a text: keep so many tokens as they are, as its sink.
        skip_last : int, optional
            Keep windows that start at this token of the text or later as they are.
        last_window : str
            ``"plain"`` puts no gist tokens into the window that reaches the end, as in training.

        Returns
        -------
        torch.Tensor
            ``[batch, tokens, width]``: states of the tokens, without those of gist tokens.
        """
        window = self.compressor.window
        self._trains = last_window == "plain"
        self._tokens_known = max(self._tokens_known, self.tokens_read + ids.shape[1])
        states = []
        if skip_first and not self.tokens_read:
            first, ids = ids[:, :skip_first], ids[:, skip_first:]
            hidden, self.sink = self._forward(first, self._no_gists(first), cache=self._fixed_cache())
            self.tokens_read += first.shape[1]
            states.append(hidden)
        while ids.shape[1]:
            start = self.tokens_read - self._running
            is_last = self._trains and start + window >= self._tokens_known
            skipped = skip_last is not None and start >= skip_last
            piece, ids = ids[:, : self.room], ids[:, self.room :]
            states.append(self._read_plain(piece) if is_last or skipped else self._read_window(piece))
            self.tokens_read += piece.shape[1]
        return torch.cat(states, dim=1)

    def close(self, ids: Tensor, lengths: Tensor) -> list[Tensor]:
        """Read what is left of every row and compress the running window as it is; nothing here changes.

        Behind the window stand gist tokens for all of it. Where gist tokens are interleaved, the tokens behind the
        last of them, fewer than the ratio, stay as they are.

        Parameters
        ----------
        ids : torch.Tensor
            ``[batch, tokens]``, int64, padded on the right; fewer tokens than the running window has room for.
        lengths : torch.Tensor
            ``[batch]``, int64: tokens that are no padding.

        Returns
        -------
        list of torch.Tensor
            Each row's slots, ``[2, layers, kv_heads, slots, head_dim]``.
        """
        settings = self.compressor
        choose = self._ratio is None or self._at_border or not settings.interleaves
        ratio = self._choice.fork().draw(self._tokens_known) if choose else self._ratio
        if settings.interleaves:
            is_gist = self._interleaved(ids.shape[1], ratio).expand(len(ids), -1)
            live = lengths + ((self._remainder + lengths) // ratio if ratio else 0)
            inputs, positions, mask = _spread(ids, is_gist), None, None
        else:
            gists = -(-(self._running + lengths) // settings.interval(ratio)) if ratio else torch.zeros_like(lengths)
            live = lengths + gists
            inputs = torch.nn.functional.pad(ids, (0, int(live.max()) - ids.shape[1]))
            place = torch.arange(inputs.shape[1], device=ids.device)
            is_gist = (place >= lengths[:, None]) & (place < live[:, None])
            positions, mask = self._expansion(lengths, inputs.shape[1], ratio)
        in_window = torch.cat([self._raw_is_gist.expand(len(ids), -1), is_gist], dim=1)
        place = torch.arange(in_window.shape[1], device=ids.device)
        is_live = place < self._raw_slots + live[:, None]
        kept, before = self._kept_at_close(in_window & is_live, ratio), [self.front, self.sink, self.gist]
        if settings.sink_size and self._before_first_border:
            # The first tokens are still in the window: taken from there, none is kept twice.
            kept, before = kept | (place < settings.sink_size), [self.front]
        kept &= is_live
        window = self.raw
        if inputs.shape[1]:
            places, is_kept = _gathered(kept[:, self._raw_slots :])
            _, new = self._forward(inputs, is_gist, positions, mask, cache=self._fixed_cache(), kept=places)
            window = torch.cat([window, new], dim=-2)
            kept = torch.cat([kept[:, : self._raw_slots], is_kept], dim=1)
        rows = zip(torch.cat(before, dim=-2).unbind(2), window.unbind(2), kept, strict=True)
        return [torch.cat([done, rest[..., row_kept, :]], dim=-2) for done, rest, row_kept in rows]

    def _kept_at_close(self, is_gist: Tensor, ratio: int | None) -> Tensor:
        """Mark what stays of an unfinished window: gist tokens, and the tokens that none of them stands for."""
        if not ratio:
            return torch.ones_like(is_gist)
        if self.compressor.interleaves:
            # Behind an entry stands no more gist token when as many stand up to it as in all of the row.
            return is_gist | (is_gist.cumsum(1) == is_gist.sum(1, keepdim=True))
        place = torch.arange(is_gist.shape[1], device=is_gist.device)
        return is_gist | (place < self._raw_slots - self._running)

    def positions_for(self, tokens: int) -> int:
        """Return the most positions taken at once while so many more tokens are read, whatever the ratios.

        Counted as the authors count where they choose an ``adapt`` ratio: without the sink, and without the running
        window's own gist tokens.
        """
        settings = self.compressor
        ratios = self._choice.possible(max(self._tokens_known, self.tokens_read + tokens))
        kept = settings.stride if 0 in ratios else -(-settings.window // min(ratios))
        done, running = self.front.shape[-2] + self.gist.shape[-2], self._running
        text = self._raw_slots - int(self._raw_is_gist.sum())
        full, rest = divmod(running + tokens - settings.window, settings.stride)
        if full < 0:
            return done + text + tokens
        # Every further window moves on by the stride; the last one that fills stands behind all the others.
        return max(
            done + text + settings.window - running,
            done + full * kept + settings.window,
            done + (full + 1) * kept + settings.window - settings.stride + rest,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that reading on depends on, as tensors and as JSON-able values."""
        tensors = {"sink": self.sink, "gist": self.gist, "raw": self.raw, "raw_is_gist": self._raw_is_gist}
        values = {name.lstrip("_"): getattr(self, name) for name in _COUNTERS}
        return tensors, {**values, "choice": self._choice.state()}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.sink, self.gist = (tensors[name].to(self.front) for name in ("sink", "gist"))
        self._raw = [tensors["raw"].to(self.front)]
        self._raw_is_gist = tensors["raw_is_gist"].to(self._raw_is_gist)
        for name in _COUNTERS:
            setattr(self, name, values[name.lstrip("_")])
        self._choice.restore(values["choice"])
        self._cache = None

    def take(self, rows: Tensor) -> Windows:
        """Return some of the rows, marked in ``[batch]`` (bool), to be read on their own."""
        taken = copy.copy(self)
        taken.front, taken.sink, taken.gist = (part[:, :, rows] for part in (self.front, self.sink, self.gist))
        taken._raw = [self.raw[:, :, rows]]
        taken._choice = self._choice.fork()
        taken._cache = None
        return taken

    def _read_plain(self, ids: Tensor) -> Tensor:
        """Read tokens without gist tokens; they stay, and belong to no window."""
        is_gist = self._no_gists(ids)
        hidden, new = self._forward(ids, is_gist, cache=self._running_cache())
        self._keep_raw(new, is_gist[0])
        self._at_border = False
        return hidden

    def _read_window(self, ids: Tensor) -> Tensor:
        """Read tokens of one window, up to its end at most."""
        settings, tokens = self.compressor, ids.shape[1]
        fills = self._running + tokens == settings.window
        positions, mask = None, None
        if settings.interleaves:
            if self._at_border or self._ratio is None:
                self._ratio = self._draw()
            is_gist = self._interleaved(tokens, self._ratio)
            if self._ratio:
                self._remainder = (self._remainder + tokens) % self._ratio
        else:
            self._ratio = self._draw() if fills else 0
            gists = settings.stride // self._ratio if self._ratio else 0
            is_gist = torch.arange(tokens + gists, device=ids.device) >= tokens
            if gists:
                lengths = torch.tensor([tokens], device=ids.device)
                positions, mask = self._expansion(lengths, tokens + gists, self._ratio)
        rows = is_gist.expand(len(ids), -1)
        new_sink = settings.sink_size if self._takes_sink else 0
        if fills and self._ratio and settings.stride == settings.window:
            # Of such a window only gist tokens stay, so nothing else is kept until it ends.
            kept = is_gist | (torch.arange(len(is_gist), device=ids.device) < new_sink)
            cache = self._cache or self._fixed_cache()
        else:
            kept, cache = torch.ones_like(is_gist), self._running_cache()
        places = kept.nonzero().T.expand(len(ids), -1)
        hidden, new = self._forward(_spread(ids, rows), rows, positions, mask, cache=cache, kept=places)
        if new_sink:
            self.sink = new[..., :new_sink, :]
            self._cache = None
        self._keep_raw(new, is_gist[kept])
        self._running += tokens
        if fills:
            self._finish_window()
        self._at_border = fills
        return hidden[:, ~is_gist]

    def _draw(self) -> int:
        """Draw the running window's ratio; in training one window at most is kept as it is, and none of the last."""
        settings, left = self.compressor, self._tokens_known - self.tokens_read + self._running
        may_keep = not self._trains or (not self._kept and left >= settings.stride + settings.window)
        ratio = self._choice.draw(self._tokens_known, may_keep=may_keep)
        self._kept |= ratio == 0
        return ratio

    def _finish_window(self) -> None:
        settings, window = self.compressor, self.raw
        kept = window[..., self._raw_is_gist, :] if self._ratio else window[..., : settings.stride, :]
        self.gist = torch.cat([self.gist, kept], dim=-2)
        self._raw = [window[..., settings.stride : settings.window, :]]
        self._running = settings.window - settings.stride
        self._raw_is_gist = self._raw_is_gist.new_zeros(self._running)
        self._before_first_border = False
        self._cache = None

    def _keep_raw(self, new: Tensor, is_gist: Tensor) -> None:
        self._raw.append(new)
        self._raw_is_gist = torch.cat([self._raw_is_gist, is_gist])

    def _forward(
        self,
        inputs: Tensor,
        is_gist: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        cache: Cache | None,
        kept: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run tokens and gist tokens behind all slots; return their states and their own slots.

        Of the slots only those at the places ``kept`` (``[batch, kept]``) are returned; default all.
        """
        backbone = self.compressor.backbone
        embeds = torch.where(is_gist[..., None], self.compressor.embed_gist.weight, backbone.embed(inputs))
        if positions is None:
            first = self._all_slots
            positions = torch.arange(first, first + inputs.shape[1], device=embeds.device)[None]
        # The recorder comes second: its hooks see what the changed rows put out.
        with changed_rows(self.compressor.changes(), is_gist), recorded_keys_values(backbone.model, kept) as recorded:
            hidden = backbone.run(embeds, positions, mask=mask, cache=cache)
        return hidden, torch.stack([recorded.keys, recorded.values])

    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of all slots, each key rotated to its place."""
        keys, values = self.slots
        places = torch.arange(keys.shape[-2], device=keys.device)
        return rotate_keys(self.compressor.model, keys, places), values

    def _fixed_cache(self) -> Cache | None:
        """Return a cache of all slots for one pass."""
        from ctxdocs.modeling.fixed_cache import fixed_cache

        return fixed_cache(*self._rotated())

    def _running_cache(self) -> Cache:
        """Return the cache that grows with the running window, until slots change their places."""
        if self._cache is None:
            self._cache = fill_cache(*self._rotated())
        return self._cache

    @property
    def _takes_sink(self) -> bool:
        """Whether the next tokens of a window begin with what stays as the sink."""
        settings = self.compressor
        return self._before_first_border if settings.renews_sink else not self.tokens_read

    def _no_gists(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids, dtype=torch.bool)

    def _interleaved(self, tokens: int, ratio: int | None) -> Tensor:
        """Mark where gist tokens stand among ``tokens`` tokens: one behind every ``ratio``-th of them."""
        device = self._raw_is_gist.device
        if not ratio:
            return torch.zeros(tokens, dtype=torch.bool, device=device)
        place = torch.arange(tokens, device=device)
        is_gist = torch.ones(tokens + (self._remainder + tokens) // ratio, dtype=torch.bool, device=device)
        is_gist[place + (self._remainder + place) // ratio] = False
        return is_gist

    def _expansion(self, lengths: Tensor, inputs: int, ratio: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Return positions and mask of rows with gist tokens behind their tokens.

        Gist token ``k`` sees everything in front of the window and, of the window, the first ``(k + 1) * interval``
        tokens (step-expansion) or the last ``interval`` of these (segmentation).

        Parameters
        ----------
        lengths : torch.Tensor
            ``[batch]``: tokens in front of each row's gist tokens.
        inputs : int
            Tokens and gist tokens of the longest row.
        ratio : int
            Of the window.

        Returns
        -------
        tuple of (torch.Tensor or None)
            ``[batch, inputs]`` and ``[batch, 1, masked, slots + inputs]``, additive, of the tokens from the first gist
            token on. None where plain causal attention will do.
        """
        settings, past = self.compressor, self._all_slots
        if settings.attention == "full-coverage" or not ratio:
            return None, None
        interval = settings.interval(ratio)
        base = past - self._running
        place = torch.arange(inputs, device=lengths.device)
        number = place - lengths[:, None]  # of the gist token; below 0: a token
        in_window = (self._running + lengths)[:, None]
        upto = torch.minimum(interval * (number + 1), in_window)
        reached = base + upto
        if settings.attention == "segmentation":
            reached = torch.full_like(number, (past if settings.counts_running_tokens else base) + interval)
        positions = torch.where(number >= 0, reached + number * settings.attend_prev, past + place)

        place, number, upto = (part[..., int(lengths.min()) :, None] for part in (place, number, upto))
        first = interval * number if settings.attention == "segmentation" else torch.zeros_like(number)
        column = torch.arange(past + inputs, device=lengths.device) - base  # below 0: in front of the window
        other = column - in_window[..., None]  # number of the gist token in that column
        sees_gist = (other >= 0) & ((other <= number) if settings.attend_prev else (other == number))
        sees = (column < 0) | ((column >= first) & (column < upto)) | sees_gist
        visible = torch.where(number >= 0, sees, column <= past - base + place)
        return positions, additive_mask(visible, settings.backbone.dtype)


def _gathered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places marked in each row of ``[batch, tokens]`` (bool), padded, and which of them are no padding."""
    counts = kept.sum(1)
    most = int(counts.max())
    places = kept.logical_not().argsort(dim=1, stable=True)[:, :most]
    return places, torch.arange(most, device=kept.device) < counts[:, None]


def _spread(ids: Tensor, is_gist: Tensor) -> Tensor:
    """Put tokens where no gist token stands: ``[batch, tokens]`` to ``[batch, tokens and gist tokens]``."""
    inputs = ids.new_zeros(is_gist.shape)
    inputs[~is_gist] = ids.flatten()
    return inputs
