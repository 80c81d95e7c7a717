"""What stands around the turns of a conversation: a chat template taken apart, or a prompt format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctxdocs.errors import InputError
from ctxdocs.prompts import Piece, PromptFormat, encode_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor

# Stand for the texts of two questions and an answer where a chat template is taken apart.
_FIRST, _ANSWER, _SECOND = "ctxdocs-first", "ctxdocs-answer", "ctxdocs-second"
# Stands for a system text that comes from outside, where an opening is taken apart.
_SYSTEM = "ctxdocs-system"
# Between the sources of a user's text, and between them and the question.
_APART = "\n\n"
# Templates that write today's date are given one that stays, so that memories can be read tomorrow: Llama 3's own.
_TODAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"
# Beginnings of texts that tokenisers take for different tokens, with a space in front and without.
_WORDS = ("The", "a", "7")


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the turns of a conversation.

    Parameters
    ----------
    opening : str
        In front of the first turn.
    between : str
        Between an answer and the next turn.
    turn : PromptFormat
        One turn: sources, question, and where the answer begins.
    """

    opening: str
    between: str
    turn: PromptFormat

    @property
    def first_turn(self) -> PromptFormat:
        """The first turn, with the opening in front."""
        return replace(self.turn, template=self.opening + self.turn.template.removeprefix(self.turn.head))

    @classmethod
    def of(cls, compressor: Compressor, system: str | None = None) -> ChatFormat:
        """Return the format of a model: its chat template, or else its prompt format, turn after turn.

        Parameters
        ----------
        compressor : Compressor
            Its tokenizer and prompt format.
        system : str, optional
            What the model is told before the first turn.

        Raises
        ------
        InputError
            If there is no tokenizer, or its chat template has no place for a system text.
        """
        if compressor.tokenizer is None:
            raise InputError("a conversation needs a tokenizer, and this compressor has none")
        if compressor.tokenizer.chat_template:
            return cls.of_template(compressor.tokenizer, system)
        base = compressor.prompt_format
        opening = base.head + (f"{system}{base.answer_end}" if system else "")
        return cls(opening, base.answer_end, base)

    @classmethod
    def around(cls, compressor: Compressor, system: str) -> ChatFormat:
        """Return the format of a conversation whose system text, if any, comes from outside.

        It is not in the format; :meth:`opening_around` says where it goes.
        """
        return cls.of(compressor, _SYSTEM if system else None)

    def opening_around(self, system: str) -> tuple[Piece, Piece]:
        """Return what stands in front of the system's text and behind it, of a format made by :meth:`around`.

        Raises
        ------
        InputError
            If the chat template has no place for a system text.
        """
        if not system:
            return Piece(self.opening), Piece("")
        before, found, after = self.opening.partition(_SYSTEM)
        if not found:
            raise InputError("the model's chat template has no place for a system text", "leave the system text out")
        return Piece(before), Piece(after)

    @classmethod
    def of_template(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None, **variables: Any) -> ChatFormat:
        """Return the format of a tokenizer's chat template; ``variables`` are the template's own.

        Raises
        ------
        InputError
            If the template cannot be used, has no place for a system text, or changes the order of texts.
        """
        opening, rest = _around(tokenizer, [_FIRST, _ANSWER, _SECOND], system, **variables)
        between, _, tail = rest.partition(_ANSWER)[2].partition(_SECOND)
        return cls(opening, between, _format("", tail))


def asked_in_chat(tokenizer: PreTrainedTokenizerBase | None) -> PromptFormat | None:
    """Return how a tokenizer's chat template has a single question asked: sources and question are the user's text.

    None where there is no template, or none that can be used; such a model is asked in plain text.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        return _format(*_around(tokenizer, [_FIRST]))
    except InputError:
        return None


def header_ids(tokenizer: PreTrainedTokenizerBase, opening: str) -> Tensor:
    """Return the ids of what stands in front of a user's text, int64 ``[tokens]``.

    Where the opening ends in a space that becomes part of the text's first word, and the tokenizer has words begin with
    one by themselves, they go without it: together with the text's own they are those of the whole.
    """
    ids = encode_pieces(tokenizer, [Piece(opening)])
    for header in (ids, ids[:-1]):
        pairs = [[encode_pieces(tokenizer, [Piece(text)]) for text in (word, opening + word)] for word in _WORDS]
        if all(whole.equal(torch.cat([header, word])) for word, whole in pairs):
            return header
    return ids


def _format(opening: str, tail: str) -> PromptFormat:
    template = opening + "{sources}{question}" + tail
    return PromptFormat(template, text="{source}" + _APART, memories_end=_APART, bos="template", stop=())


def _around(
    tokenizer: PreTrainedTokenizerBase, contents: list[str], system: str | None = None, **variables: Any
) -> tuple[str, str]:
    """Return what stands in front of the first of a conversation's texts, and everything behind it."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = _TODAY + template
        text: Any = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **variables
        )
    except Exception as error:  # templates are programs, and raise what they like
        raise InputError(f"the model's chat template cannot be used: {error}", "leave the system text out") from error
    places = [text.find(content) for content in contents]
    if -1 in places or places != sorted(places):
        raise InputError("the chat template does not keep the texts of a conversation in order")
    opening, _, rest = text.partition(contents[0])
    return opening, rest
