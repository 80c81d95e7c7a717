"""Which ratio the next window is compressed with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError

if TYPE_CHECKING:
    import numpy as np

MIXES = ("step-random", "instance-random", "sequence", "adapt-N")


class RatioChoice:
    """Chooses the ratio of one window after another; 0 keeps a window as it is.

    Every text starts anew, so that its memory does not depend on what was compressed before. (The authors' generator
    starts with the model and goes on from text to text. Training passes one that goes on.)

    Parameters
    ----------
    ratios : sequence of int
        To choose from; of several, those that do not divide ``stride`` are left out.
    mix : str
        ``step-random``, ``instance-random`` (one draw per text), ``sequence`` (in turn) or ``adapt-N`` (once per text,
        the smallest ratio whose reach covers the text and ``N`` tokens more).
    stride : int
        Tokens a full window compresses.
    reach : callable
        From a ratio to the longest text that fits the model's positions with it.
    generator : numpy.random.Generator, optional
        Of random draws, in place of a fresh one.
    """

    def __init__(
        self,
        ratios: Sequence[int],
        mix: str,
        stride: int,
        reach: Callable[[int], int],
        generator: np.random.Generator | None = None,
    ) -> None:
        import numpy as np

        if not ratios:
            raise InputError("there is no ratio to choose", "give one, or several")
        usable = list(ratios) if len(ratios) == 1 else [r for r in ratios if r == 0 or (r > 0 and stride % r == 0)]
        if not usable or not 0 <= min(usable) <= max(usable) <= stride:
            raise InputError(
                f"a window of which {stride} tokens are compressed cannot hold ratio {', '.join(map(str, ratios))}",
                f"a ratio lies between 1 and {stride} (0 keeps text as it is); one of several must divide {stride}",
            )
        if not isinstance(mix, str):
            raise InputError(f"unknown ratio mix {mix!r}", f"it is one of: {', '.join(MIXES)}")
        kind, _, ahead = mix.partition("-")
        if mix not in MIXES[:3] and not (kind == "adapt" and ahead.isdigit()):
            raise InputError(f"unknown ratio mix {mix!r}", f"it is one of: {', '.join(MIXES)}")
        self.ratios = usable
        self._mix, self._reach = mix, reach
        self._ahead = int(ahead) if kind == "adapt" else 0
        self._random = np.random.default_rng(42) if generator is None else generator
        self._count = 0
        self._lasting: int | None = None

    def draw(self, tokens: int, *, may_keep: bool = True) -> int:
        """Return the next window's ratio.

        Parameters
        ----------
        tokens : int
            Length of the text as far as it is known.
        may_keep : bool
            Whether 0 may be drawn.
        """
        ratios = [ratio for ratio in self.ratios if ratio or may_keep] or self.ratios
        if len(self.ratios) == 1:
            return ratios[0]
        if self._mix == "sequence":
            self._count += 1
            return ratios[(self._count - 1) % len(ratios)]
        if self._mix == "step-random":
            return int(self._random.choice(ratios))
        if self._lasting is None:
            if self._mix == "instance-random":
                self._lasting = int(self._random.choice(ratios))
            else:
                enough = [ratio for ratio in ratios if self._reach(ratio) >= tokens + self._ahead]
                self._lasting = min(enough, key=self._reach) if enough else max(ratios)
        return self._lasting

    def possible(self, tokens: int) -> list[int]:
        """Return what :meth:`draw` may return for a text of so many tokens."""
        if self._mix in ("step-random", "sequence") or (self._mix == "instance-random" and self._lasting is None):
            return self.ratios
        return [self.fork().draw(tokens)]

    def fork(self) -> RatioChoice:
        """Return a choice that goes on from here by itself."""
        # Not all of it is copied: behind ``_reach`` stands the compressor, and with it the model.
        forked = copy.copy(self)
        forked._random = copy.deepcopy(self._random)
        return forked

    def state(self) -> dict[str, Any]:
        """Return how far the choice has come, as JSON-able values."""
        return {"count": self._count, "lasting": self._lasting, "random": self._random.bit_generator.state}

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self._count, self._lasting = values["count"], values["lasting"]
        self._random.bit_generator.state = values["random"]
