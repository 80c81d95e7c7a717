"""A prompt is a list of parts, text or memory; a prompt format says where sources and question go."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ctxdocs.checks import items, one_of
from ctxdocs.errors import InputError
from ctxdocs.memory import Memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What users may write as a part: a string, token ids, or a memory.
PartLike: TypeAlias = "str | Sequence[int] | Tensor | Memory"
#: What models are given: token ids (1-D int64) or a memory.
Part: TypeAlias = "Tensor | Memory"
Prompt: TypeAlias = "list[Tensor | Memory]"

_SOURCE, _SOURCES, _QUESTION = "{source}", "{sources}", "{question}"


@dataclass(frozen=True)
class PromptFormat:
    """Where the sources and the question stand in a prompt.

    Parameters
    ----------
    template : str
        The whole prompt, holding ``{sources}`` and behind it ``{question}`` once. Whatever stands in front of the last
        ``{sources}`` is text, as it is.
    text, memory : str
        One source that is read as raw text, and one that is read as a memory, each holding ``{source}`` once. By
        default texts stand apart and memories side by side, as the published models saw them.
    memories_end : str
        What stands behind the last memory, in front of the question.
    bos : str
        Who puts the beginning-of-sequence token in front where there is no prefix: the ``"tokenizer"``, if it does that
        with texts, or the ``"template"``, as chat templates do if they want one.
    stop : tuple of str
        Strings that end an answer; they are not part of it.
    answer_end : str
        What stands between an answer and the next question, in a conversation.
    """

    template: str = "{sources}Question: {question}\nAnswer:"
    text: str = "{source}\n\n"
    memory: str = "{source}"
    memories_end: str = ""
    bos: str = "tokenizer"
    stop: tuple[str, ...] = ("\nQuestion:", "\n\n")
    answer_end: str = "\n\n"

    def __post_init__(self) -> None:
        _, found, after = self.template.rpartition(_SOURCES)
        frames = self.text.count(_SOURCE) == self.memory.count(_SOURCE) == 1
        if not found or after.count(_QUESTION) != 1 or not frames:
            raise InputError(
                "a prompt format needs {sources} and then {question} in its template, "
                "and {source} in its text and in its memory"
            )
        one_of("bos", self.bos, ("tokenizer", "template"))

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> PromptFormat:
        """Build a format from the JSON form of :meth:`to_dict`; None gives the default format."""
        values = dict(values or {})
        if "stop" in values:
            values["stop"] = tuple(values["stop"])
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"no prompt format can be made of the keys {sorted(values)}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {**asdict(self), "stop": list(self.stop)}

    def build(
        self,
        question: str,
        sources: Sequence[Memory | str],
        tokenizer: PreTrainedTokenizerBase,
        prefix_ids: Tensor | None = None,
    ) -> Prompt:
        """Return the prompt that asks ``question`` about ``sources`` (memories, or their raw texts).

        The template's own text may hold special tokens. Question and sources come from outside: whatever in them
        looks like a special token stays plain text. In front of all stands the compressor's prefix, if it has one.
        """
        pieces = [Piece(self.head), *self.pieces(question, sources)]
        return self.begun(assemble(pieces, tokenizer), tokenizer, prefix_ids)

    def pieces(self, question: str, sources: Sequence[Memory | str] = ()) -> list[Memory | Piece]:
        """Return the pieces of a prompt from its sources on."""
        before_question, _, tail = self.template.rpartition(_SOURCES)[2].partition(_QUESTION)
        pieces: list[Memory | Piece] = []
        for source in sources:
            is_memory = isinstance(source, Memory)
            before, _, after = (self.memory if is_memory else self.text).partition(_SOURCE)
            place = source if isinstance(source, Memory) else Piece(source, trusted=False)
            pieces += [Piece(before), place, Piece(after)]
        if sources and isinstance(sources[-1], Memory):
            pieces.append(Piece(self.memories_end))
        return [*pieces, Piece(before_question), Piece(question, trusted=False), Piece(tail)]

    def build_up_to_question(
        self,
        question: str,
        sources: Sequence[Memory | str],
        tokenizer: PreTrainedTokenizerBase,
        prefix_ids: Tensor | None = None,
    ) -> tuple[Prompt, Tensor]:
        """Return the prompt as far as the question, and the question's own ids, int64 ``[tokens]``.

        Together they are the beginning of what :meth:`build` returns; a token that holds text of both is the
        question's. Where no text stands between the sources and the question, its first token ends the prompt, so
        that there is something to predict the others by.
        """
        pieces = [Piece(self.head), *self.pieces(question, sources)][:-1]
        prompt, front = (self.begun(assemble(some, tokenizer), tokenizer, prefix_ids) for some in (pieces, pieces[:-1]))
        last = prompt.pop()
        if isinstance(last, Memory):
            raise InputError("the question is empty", "ask something")
        same_parts = len(front) == len(prompt) + 1 and not isinstance(front[-1], Memory)
        shared = _common_prefix(front[-1], last) if same_parts else 0  # type: ignore[arg-type]
        if not shared and (not prompt or isinstance(prompt[-1], Memory)):
            shared = 1
        return [*prompt, last[:shared]] if shared else prompt, last[shared:]

    @property
    def head(self) -> str:
        """The template's text in front of the sources."""
        return self.template.rpartition(_SOURCES)[0]

    def begun(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, prefix_ids: Tensor | None) -> Prompt:
        """Put in front of a prompt that begins with the head what has to stand there, unless the head brings it."""
        if prefix_ids is None:
            return prompt if self.bos == "template" else with_bos(prompt, tokenizer)
        head = encode_pieces(tokenizer, [Piece(self.head)])
        if not len(prefix_ids) or not begins_with(head, prefix_ids):
            return with_prefix(prompt, prefix_ids)
        # A text's first token may take in the head's last space; the prefix in front of memories goes without it.
        text: Any = tokenizer.decode(head[len(prefix_ids) :])
        first, second = prompt[:2] if len(prompt) > 1 else (head, head)
        in_front_of_memory = isinstance(second, Memory) and not isinstance(first, Memory) and head.equal(first)
        return [prefix_ids, *prompt[1:]] if in_front_of_memory and not text.strip() else prompt


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt's text; special tokens are recognised in trusted text only."""

    text: str
    trusted: bool = True


def assemble(pieces: Sequence[Memory | Piece], tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Turn pieces into a prompt: adjoining text is tokenised together, and empty text leaves nothing."""
    prompt: Prompt = []
    for is_memory, group in itertools.groupby(pieces, key=lambda piece: isinstance(piece, Memory)):
        if is_memory:
            prompt += group  # type: ignore[arg-type]
        elif len(ids := _encoded(tokenizer, list(group), bool(prompt))):  # type: ignore[arg-type]
            prompt.append(ids)
    return prompt


def _encoded(tokenizer: PreTrainedTokenizerBase, pieces: list[Piece], is_behind_memory: bool) -> Tensor:
    """Tokenise adjoining pieces; a line break behind a memory as one behind text.

    Some tokenizers put a space in front of every text. In front of a line break no text has one.
    """
    if is_behind_memory and "".join(piece.text for piece in pieces).startswith("\n"):
        word = Piece("a")
        ids, before = encode_pieces(tokenizer, [word, *pieces]), encode_pieces(tokenizer, [word])
        if begins_with(ids, before):
            return ids[len(before) :]
    return encode_pieces(tokenizer, pieces)


def _common_prefix(one: Tensor, other: Tensor) -> int:
    """Return how many first ids are the same."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).nonzero()
    return int(differs[0]) if len(differs) else shorter


def encode_pieces(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> Tensor:
    """Tokenise adjoining pieces, as one text wherever that recognises no special token in untrusted text.

    One text tokenises as the model saw text in training; tokenised apart, a question would lose the space in front
    of its first word. Returns int64 ``[tokens]``.
    """
    whole = "".join(piece.text for piece in pieces)
    allowed = "\0".join(piece.text for piece in pieces if piece.trusted)
    if all(whole.count(special) == allowed.count(special) for special in tokenizer.all_special_tokens):
        return torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"], dtype=torch.long)
    return torch.cat(
        [
            torch.tensor(
                tokenizer(piece.text, add_special_tokens=False, split_special_tokens=not piece.trusted)["input_ids"],
                dtype=torch.long,
            )
            for piece in pieces
        ]
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Tokenise text from outside: no special tokens are added, and none are recognised. Returns int64 ``[tokens]``."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def encode_parts(parts: Sequence[PartLike], tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    """Turn what a user wrote into a prompt.

    Raises
    ------
    InputError
        If text is given where there is no tokenizer, or a part is of no known type.
    """
    prompt: Prompt = []
    for part in parts:
        if isinstance(part, Memory):
            prompt.append(part)
        elif isinstance(part, str):
            if tokenizer is None:
                raise InputError("this compressor has no tokenizer", "give token ids instead of text")
            prompt.append(encode_text(tokenizer, part))
        else:
            prompt.append(as_ids(part))
    return prompt


def as_ids(ids: Sequence[int] | Tensor, what: str = "token ids") -> Tensor:
    """Return token ids as a 1-D int64 tensor; anything else is an ``InputError`` about ``what``."""
    wanted = f"{what} must be integers in a list or a 1-D tensor"
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise InputError(f"{wanted}, got {type(ids).__name__}") from error
    integral = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.dim() != 1 or not (integral or tensor.numel() == 0):
        raise InputError(f"{wanted}, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.long()


def as_memories(memories: Sequence[Memory]) -> list[Memory]:
    """Return memories as a list; anything else is an ``InputError``."""
    if isinstance(memories, Memory):
        raise InputError("memories come in a list, got one memory", "write memories=[memory]")
    listed = items("memories", memories)
    for memory in listed:
        if not isinstance(memory, Memory):
            raise InputError(f"a list of memories holds a {type(memory).__name__}", "memories come from compress(...)")
    return listed


def begun(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, prefix_ids: Tensor | None = None) -> Prompt:
    """Put in front of a prompt what it begins with: a compressor's prefix, or else what the tokenizer puts there."""
    return with_bos(prompt, tokenizer) if prefix_ids is None else with_prefix(prompt, prefix_ids)


def with_prefix(prompt: Prompt, prefix_ids: Tensor) -> Prompt:
    """Put token ids ``[tokens]`` in front, of text and of memories, unless the prompt's text begins with them."""
    if not prompt or not len(prefix_ids) or begins_with(prompt[0], prefix_ids):
        return prompt
    return [prefix_ids, *prompt]


def begins_with(part: Part, ids: Tensor) -> bool:
    """Whether a part of a prompt is text that begins with ``ids``."""
    return not isinstance(part, Memory) and part[: len(ids)].equal(ids)


def with_bos(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Put the beginning-of-sequence token in front where the tokenizer would, but never in front of a memory."""
    bos = tokenizer.bos_token_id
    starts_with_text = bool(prompt) and not isinstance(prompt[0], Memory)
    if bos is None or not starts_with_text or tokenizer("")["input_ids"][:1] != [bos]:
        return prompt
    return [torch.tensor([bos]), *prompt]
