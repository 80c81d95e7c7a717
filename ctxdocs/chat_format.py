"""What stands around the turns of a conversation: a chat template taken apart, or a prompt format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError
from ctxdocs.prompts import PromptFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor

# Stand for the texts of two questions and an answer where a chat template is taken apart.
_FIRST, _ANSWER, _SECOND = "ctxdocs-first", "ctxdocs-answer", "ctxdocs-second"


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
    adds_bos : bool
        Whether a beginning-of-sequence token has to be put in front of the opening; chat templates bring their own.
    """

    opening: str
    between: str
    turn: PromptFormat
    adds_bos: bool

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
        return cls(opening, base.answer_end, base, adds_bos=True)

    @classmethod
    def of_template(cls, tokenizer: PreTrainedTokenizerBase, system: str | None = None, **variables: Any) -> ChatFormat:
        """Return the format of a tokenizer's chat template; ``variables`` are the template's own.

        Raises
        ------
        InputError
            If the template cannot be used, has no place for a system text, or changes the order of texts.
        """
        start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        turns = [*start, {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}]
        try:
            text: Any = tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": _SECOND}], tokenize=False, add_generation_prompt=True, **variables
            )
            opening, _, rest = text.partition(_FIRST)
            _, _, rest = rest.partition(_ANSWER)
            between, found, tail = rest.partition(_SECOND)
        except Exception as error:  # templates are programs, and raise what they like
            raise InputError(
                f"the model's chat template cannot be used: {error}", "leave the system text out"
            ) from error
        if not found:
            raise InputError("the chat template does not keep the texts of a conversation in order")
        turn = PromptFormat(template="{sources}{question}" + tail, stop=())
        return cls(opening, between, turn, adds_bos=False)
