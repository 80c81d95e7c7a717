"""What every compressor shares: batching by length, reading prompts with memories, generation, saving, identity.

A method subclasses :class:`Compressor` and says how its checkpoints are recognised and built, what its settings are,
how a batch of token ids becomes memories, and how its session grows. Everything else is written here, once; how a
memory is read follows from its kind.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctxdocs import generation
from ctxdocs.chat_format import asked_in_chat
from ctxdocs.checks import items, whole_number
from ctxdocs.compressors import identity, saving
from ctxdocs.compressors.batching import batches_by_length, default_batch_tokens
from ctxdocs.compressors.passes import ReadState, batch_input, first_pass, next_pass, only_pass
from ctxdocs.compressors.reading import Layout, ModelInput
from ctxdocs.errors import FingerprintMismatch, InputError
from ctxdocs.memory import Memory
from ctxdocs.modeling.backbone import Backbone
from ctxdocs.modeling.lora import Adapter
from ctxdocs.modeling.probe import check_stages
from ctxdocs.prompts import PartLike, Prompt, PromptFormat, as_ids, as_memories, encode_parts, encode_text, with_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctxdocs.compressors.sessions import Session


class Compressor(nn.Module, abc.ABC):
    """A language model that writes documents into memories and reads memories in place of text.

    It is a ``torch.nn.Module``: its parameters are the base model's and the method's own. ``load_compressor`` returns
    it in evaluation mode with gradients off; turn them on (``requires_grad_(True)``) and the same paths train.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The base model, unmodified.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Needed for text; token ids work without.
    prompt_format : PromptFormat, optional
        Where sources and question stand when a library asks. Default: where the tokenizer's chat template, if it has
        one, puts a user's text.
    """

    method: ClassVar[str]
    #: Whether the method has parameters of its own, which training finds.
    is_trained: ClassVar[bool] = True
    #: What texts are read behind wherever prompts are made from text: ``[tokens]``, int64, maybe none. None where the
    #: method has no prefix of its own; then text begins as the tokenizer has it, and memories with themselves.
    prefix_ids: Tensor | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        prompt_format: PromptFormat | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_format = prompt_format or asked_in_chat(tokenizer) or PromptFormat()
        self.backbone = Backbone(model)
        check_stages(self.backbone)
        #: What ``load_compressor`` found it by; None for one built in Python.
        self.name_or_path: str | None = None
        #: Where an adapter's base lies, as ``load_compressor`` needs to be told again: ``base_model``, ``finetune``.
        self.base_places: dict[str, str] = {}
        #: Whether nobody named the method, and nothing about the model did either.
        self.chosen_by_default = False
        self._fingerprint: str | None = None

    # What a method says.

    @classmethod
    @abc.abstractmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint's ``config.json`` belongs to this method."""

    @classmethod
    @abc.abstractmethod
    def own_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """Names of the tensors the method adds to the base model's in a checkpoint with this ``config.json``."""

    @classmethod
    def unused_tensors(cls, config: Mapping[str, Any]) -> set[str]:
        """Names of tensors that published checkpoints may hold and nothing uses; they are dropped."""
        return set()

    @classmethod
    @abc.abstractmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        **settings: Any,
    ) -> Compressor:
        """Build the compressor from a loaded base model, ``config.json`` and the tensors of :meth:`own_tensors`."""

    @classmethod
    def from_base(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any
    ) -> Compressor:
        """Put the method onto a language model, for training; ``settings`` are those of the constructor."""
        return cls(model, tokenizer, **settings)

    @classmethod
    def adapter_settings(cls, adapter: Adapter) -> dict[str, Any]:
        """Return what a LoRA adapter says about the method, as entries of ``config.json``; for most methods nothing."""
        return {}

    @classmethod
    def adapter_tensors(cls, model: PreTrainedModel, adapter: Adapter, own_names: set[str]) -> dict[str, Tensor]:
        """Put a LoRA adapter to use and return the method's own tensors that it holds.

        Unless a method does otherwise, the adapter is merged into the model.
        """
        adapter.merge_into(model)
        prefix = "base_model.model."
        return {name: adapter.tensors[prefix + name] for name in own_names if prefix + name in adapter.tensors}

    @property
    @abc.abstractmethod
    def format_settings(self) -> dict[str, Any]:
        """Settings that decide what a memory is; they are stamped into the fingerprint."""

    @property
    @abc.abstractmethod
    def run_settings(self) -> dict[str, Any]:
        """Settings that may change from call to call (segment lengths ...); saved, but not in the fingerprint."""

    @abc.abstractmethod
    def compress_batch(self, documents: Sequence[Tensor], **options: Any) -> list[Memory]:
        """Compress documents of similar length (1-D int64 ids, none empty) in one batch."""

    @abc.abstractmethod
    def session(self, **options: Any) -> Session:
        """Start a growing context that is compressed as it arrives, behind memories given as ``memories=[...]``."""

    def opened(self, text: str) -> Compressor:
        """Return the compressor as it reads a conversation that begins with this text; for most methods itself."""
        return self

    def streaming_session(self) -> Session:
        """Start a session that reads a stream for as long as the method can; for some that is another kind."""
        return self.session()

    @property
    def ratios(self) -> range:
        """Tokens per slot that run settings can choose; empty where the checkpoint's own ratio is the only one."""
        return range(0)

    def settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        """Return the run settings that keep one slot for every ``ratio`` tokens, for :meth:`configured`.

        Raises
        ------
        InputError
            If ``ratio`` is none of :attr:`ratios`.
        """
        if ratio not in (ratios := self.ratios):
            raise InputError(
                f"this {self.method} compressor cannot keep one slot for every {ratio} tokens",
                f"its ratios are {ratios.start} to {ratios.stop - 1}" if ratios else "its ratio cannot be chosen",
            )
        return self._settings_at_ratio(ratio)

    def _settings_at_ratio(self, ratio: int) -> dict[str, Any]:
        raise NotImplementedError

    @contextmanager
    def configured(self, **settings: Any) -> Iterator[None]:
        """Use other run settings inside the block. They change what is compressed, and not what can be read.

        Raises
        ------
        InputError
            If a setting is none of :attr:`run_settings`.
        """
        if unknown := sorted(settings.keys() - self.run_settings.keys()):
            raise InputError(f"{self.method} has no run setting {unknown[0]!r}", f"it has: {sorted(self.run_settings)}")
        before = {name: getattr(self, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def tokens_at_once(self, tokens: int, **options: Any) -> int:
        """Return how many tokens of a document of ``tokens`` tokens run at once; ``options`` as in compressing.

        Unless a method says otherwise, all of them.
        """
        return tokens

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters the method adds to the base model's, by the names of :meth:`own_tensors`."""
        return {name: parameter for name, parameter in self.named_parameters() if not name.startswith("model.")}

    # Writing memories.

    def compress(self, texts: Sequence[str], **options: Any) -> list[Memory]:
        """Compress texts, batched; see :meth:`compress_ids`."""
        if isinstance(texts, str):
            raise InputError("compress takes a list of texts, got one string", "write compress([text])")
        texts = items("texts", texts)
        if strange := next((text for text in texts if not isinstance(text, str)), None):
            raise InputError(f"a text is a string, got {type(strange).__name__}", "for token ids, use compress_ids")
        tokenizer = self._tokenizer()
        return self.compress_ids([encode_text(tokenizer, text) for text in texts], **options)

    def compress_ids(
        self, documents: Sequence[Sequence[int] | Tensor], *, batch_tokens: int | None = None, **options: Any
    ) -> list[Memory]:
        """Compress documents given as token ids.

        Documents are sorted by length and compressed in batches, so that little is spent on padding; a document's
        memory does not depend on what it was batched with.

        Parameters
        ----------
        documents : sequence of (sequence of int or torch.Tensor)
            Token ids of each document, 1-D.
        batch_tokens : int, optional
            Upper bound of documents x :meth:`tokens_at_once` of the longest one in a batch; where one document is above
            it, it is a batch of its own. Default: what keeps the device busy.
        **options
            The method's own options.

        Returns
        -------
        list of Memory
            In the order of ``documents``.

        Raises
        ------
        InputError
            If there are no documents, one is empty, or ids lie outside the vocabulary.
        """
        documents = items("documents", documents)
        ids = [self.checked_ids(document, f"document {index}") for index, document in enumerate(documents)]
        if not ids:
            raise InputError("there is nothing to compress: the batch holds no documents")
        if batch_tokens is not None and whole_number("batch_tokens", batch_tokens) < 1:
            raise InputError(f"a batch holds at least one token, got batch_tokens={batch_tokens}")
        memories: dict[int, Memory] = {}
        budget = default_batch_tokens(self.backbone.device) if batch_tokens is None else batch_tokens
        for batch in batches_by_length(list(map(len, ids)), budget, partial(self.tokens_at_once, **options)):
            memories.update(zip(batch, self.compress_batch([ids[i] for i in batch], **options), strict=True))
        return [memories[index] for index in range(len(ids))]

    # Reading memories.

    def logits(self, prompt_ids: Sequence[int] | Tensor, memories: Sequence[Memory] = ()) -> Tensor:
        """Return the logits of a prompt's tokens, read behind memories and nothing else, whatever the method's prefix.

        Parameters
        ----------
        prompt_ids : sequence of int or torch.Tensor
            1-D token ids.
        memories : sequence of Memory
            Read in this order, in front of the prompt.

        Returns
        -------
        torch.Tensor
            ``[len(prompt_ids), vocabulary]``.
        """
        row = self.model_input([*as_memories(memories), self.checked_ids(prompt_ids, "the prompt")])
        return self.backbone.head(only_pass(self.backbone, [row])[0, row.is_text])

    def generate_ids(
        self,
        prompt_ids: Sequence[int] | Tensor,
        memories: Sequence[Memory] = (),
        max_new_tokens: int = 64,
        **options: Any,
    ) -> list[int]:
        """Continue a prompt read behind memories and nothing else; greedy unless sampling options are given.

        Parameters
        ----------
        prompt_ids : sequence of int or torch.Tensor
            1-D token ids.
        memories : sequence of Memory
            Read in this order, in front of the prompt.
        max_new_tokens : int
            Upper bound of new tokens.
        **options
            Fields of :class:`ctxdocs.generation.GenerationOptions`.

        Returns
        -------
        list of int
            New tokens only, without the end-of-sequence token.
        """
        prompt: Prompt = [*as_memories(memories), as_ids(prompt_ids, "the prompt")]
        chosen = generation.GenerationOptions(max_new_tokens=max_new_tokens, **options)
        return generation.generate(self, [prompt], chosen)[0].ids

    def generate(
        self,
        prompt: str | Sequence[PartLike],
        memories: Sequence[Memory] = (),
        max_new_tokens: int = 64,
        **options: Any,
    ) -> str:
        """Continue a text prompt (or a list of parts: text, ids, memories) read behind memories; return new text.

        Behind the prefix, where the method has one.
        """
        chosen = generation.GenerationOptions(max_new_tokens=max_new_tokens, **options)
        return generation.generate(self, [self._prompt(prompt, memories)], chosen)[0].text

    def stream(
        self,
        prompt: str | Sequence[PartLike],
        memories: Sequence[Memory] = (),
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Iterator[str]:
        """Like :meth:`generate`, yielding pieces of text as they are decided."""
        chosen = generation.GenerationOptions(max_new_tokens=max_new_tokens, **options)
        return generation.stream(self, self._prompt(prompt, memories), chosen)

    def model_input(self, prompt: Prompt) -> ModelInput:
        """Lay a prompt out as embeddings and positions.

        Raises
        ------
        InputError
            If the prompt is empty, or memories and text need more positions than the model has.
        FingerprintMismatch
            If a memory was made by another compressor.
        """
        layout = Layout(self.backbone)
        for part in prompt:
            if isinstance(part, Memory):
                self.check_memory(part)
                self.add_memory(layout, part)
            else:
                layout.add_text(self.checked_ids(part, "the prompt", may_be_empty=True))
        return layout.finish()

    def add_memory(self, layout: Layout, memory: Memory) -> None:
        """Lay a memory out as part of a prompt; for methods that read memories in a way of their own."""
        layout.add_memory(memory)

    def prefill(self, prompts: Sequence[Prompt]) -> tuple[Tensor, ReadState]:
        """Read a batch of prompts.

        Returns
        -------
        logits : torch.Tensor
            ``[batch, vocabulary]``, of each prompt's last token.
        state : ReadState
            For :meth:`step`.
        """
        rows = [self.model_input(prompt) for prompt in prompts]
        batch = batch_input(self.model, rows)
        hidden = first_pass(self.backbone, batch)
        last = hidden[torch.arange(len(rows), device=hidden.device), batch.lengths - 1]
        following = torch.tensor([row.next_position for row in rows], device=hidden.device)
        return self.backbone.head(last), batch.state(following)

    def step(self, ids: Tensor, state: ReadState) -> Tensor:
        """Read one more token per prompt (``[batch]``, int64), extending ``state``; return ``[batch, vocabulary]``."""
        # A row without room has ended; it is carried along at the last position, and nobody looks at it.
        positions = state.next_position.clamp(max=self.backbone.max_positions - 1)[:, None]
        hidden = next_pass(self.backbone, self.backbone.embed(ids[:, None]), positions, state)
        state.next_position = state.next_position + 1
        return self.backbone.head(hidden[:, -1])

    def room(self, state: ReadState) -> list[int]:
        """Return how many more tokens each prompt's positions leave room for."""
        used = state.next_position
        if self.backbone.slides:
            used = used.clamp(min=state.cache.get_seq_length())
        return (self.backbone.max_positions - used).tolist()

    def check_memory(self, memory: Memory) -> None:
        """Raise ``FingerprintMismatch`` unless this compressor made the memory."""
        if memory.fingerprint != self.fingerprint:
            raise FingerprintMismatch(
                f"a memory made by compressor {memory.fingerprint[:12]} cannot be read by "
                f"{self.method} compressor {self.fingerprint[:12]}",
                "load the compressor that made it, or compress the document again with this one",
            )

    def checked_ids(self, ids: Sequence[int] | Tensor, what: str, *, may_be_empty: bool = False) -> Tensor:
        """Return ids as a 1-D int64 tensor; ``what`` names them in errors.

        Raises
        ------
        InputError
            If there are none, they are no integers, or one lies outside the vocabulary.
        """
        checked = as_ids(ids, what)
        if not len(checked):
            if may_be_empty:
                return checked
            raise InputError(f"{what} is empty", "give at least one token")
        low, high = checked.min().item(), checked.max().item()
        if low < 0 or high >= self.backbone.vocabulary:
            raise InputError(
                f"{what} holds token id {low if low < 0 else high}, outside the vocabulary of "
                f"{self.backbone.vocabulary} tokens",
                "was it tokenised for another model?",
            )
        return checked

    # Identity and saving.

    @property
    def fingerprint(self) -> str:
        """Sha256 over method, settings and weights (hexadecimal); computed once, so load weights before asking."""
        if self._fingerprint is None:
            stamp = {"method": self.method, "settings": self.format_settings}
            self._fingerprint = identity.fingerprint(self, stamp)
        return self._fingerprint

    def forget_fingerprint(self) -> None:
        """Have the fingerprint computed anew; call it after changing weights."""
        self._fingerprint = None

    def save(self, path: str | Path) -> None:
        """Write a folder that ``load_compressor`` loads bit for bit: weights, tokenizer, settings."""
        saving.save(self, Path(path))

    def load_session(self, path: str | Path) -> Session:
        """Return a session that :meth:`Session.save` wrote; it goes on where it was.

        Raises
        ------
        CheckpointError
            If there is no session in the file.
        FingerprintMismatch
            If another compressor held it.
        """
        from ctxdocs.compressors import session_files

        return session_files.load(self, Path(path))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError("this compressor has no tokenizer", "give token ids instead of text")
        return self.tokenizer

    def _prompt(self, prompt: str | Sequence[PartLike], memories: Sequence[Memory]) -> Prompt:
        self._tokenizer()
        parts = [prompt] if isinstance(prompt, str) else list(prompt)
        made = encode_parts([*as_memories(memories), *parts], self.tokenizer)
        return made if self.prefix_ids is None else with_prefix(made, self.prefix_ids)
