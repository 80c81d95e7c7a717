"""What documents are read behind: a chat template's header, a beginning-of-sequence token, given ids, or nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctxdocs.chat_format import ChatFormat, header_ids
from ctxdocs.errors import InputError
from ctxdocs.prompts import PromptFormat

PREFIXES = ("auto", "none", "bos", "chat")


def prefix_kind(prefix: str, tokenizer: Any, prompt_format: PromptFormat, chat: PromptFormat | None) -> str:
    """Return which prefix a word stands for.

    Parameters
    ----------
    prefix : str
        One of ``PREFIXES``.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        The model's.
    prompt_format : PromptFormat
        How questions are asked.
    chat : PromptFormat or None
        How the tokenizer's chat template would have them asked.

    Returns
    -------
    str
        The same, ``"auto"`` as what it comes to.

    Raises
    ------
    InputError
        If the word is none of them.
    """
    if prefix not in PREFIXES:
        raise InputError(f"unknown prefix {prefix!r}", f"one of: {', '.join(PREFIXES)}; or token ids")
    if prefix != "auto":
        return prefix
    if chat is not None and prompt_format.head == chat.head:
        return "chat"
    bos = None if tokenizer is None else tokenizer.bos_token_id
    return "bos" if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else "none"


def prefix_ids(kind: str, tokenizer: Any, bos: int | None, chat: PromptFormat | None) -> Tensor:
    """Return the token ids of a prefix, int64 ``[tokens]``.

    Parameters
    ----------
    kind : str
        ``"chat"``, ``"bos"`` or ``"none"``.
    tokenizer : transformers.PreTrainedTokenizerBase or None
        The model's.
    bos : int or None
        The beginning-of-sequence token of the model's config, where the tokenizer has none.
    chat : PromptFormat or None
        How the tokenizer's chat template has questions asked.

    Raises
    ------
    InputError
        If there is no usable chat template, or no such token.
    """
    if kind == "chat":
        if tokenizer is None or not tokenizer.chat_template:
            raise InputError("prefix='chat' needs a tokenizer with a chat template", "use prefix='auto'")
        # Of a template that cannot be used, the other one says why.
        return header_ids(tokenizer, chat.head if chat else ChatFormat.of_template(tokenizer).opening)
    if kind == "none":
        return torch.empty(0, dtype=torch.long)
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        bos = tokenizer.bos_token_id
    if bos is None:
        raise InputError("the model has no beginning-of-sequence token", "use prefix='none'")
    return torch.tensor([bos])
