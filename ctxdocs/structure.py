"""JSON that keeps to a schema: while it is written, tokens that its grammar does not allow are masked.

Grammars and masks are llguidance's. Its limits hold, so that a schema from outside costs a bounded amount of time and
memory: what is too large or too intricate is refused before anything is read.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ctxdocs.closing import Bits, Closing, Endings
from ctxdocs.errors import InputError, MissingDependency

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Bytes of a schema that is written as JSON.
MOST_SCHEMA_BYTES = 65536

# Written as Python's json.dumps writes: where white space is free, a model at a loss writes it until its tokens end.
_JSON = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
# By this key a schema could change them, and have llguidance pass over what no grammar can express.
_OWN_OPTIONS = "x-guidance"
# The time to get a grammar ready grows with the square of its symbols; so many are an object of some 1,500 properties,
# at most. A state takes about 2 kB, for every value that is written; few schemas need hundreds.
_MOST_SYMBOLS = 10_000
_MOST_LEXER_STATES = 50_000
_CACHED_GRAMMARS = 64


def checked_schema(schema: object) -> str:
    """Return a JSON schema as JSON, its keys in their order.

    Parameters
    ----------
    schema : mapping
        The schema. An object's properties are written in the order they have here.

    Raises
    ------
    InputError
        If it is no schema, or says what no grammar can hold a model to; the message names it.
    MissingDependency
        If llguidance is not installed.
    """
    if not isinstance(schema, Mapping):
        raise InputError(f"schema must be a JSON schema, a mapping, got {type(schema).__name__}")
    try:
        text = json.dumps({key: value for key, value in schema.items() if key != _OWN_OPTIONS}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema cannot be written as JSON: {error}") from error
    if len(text) > MOST_SCHEMA_BYTES:
        raise InputError(f"the JSON schema takes {len(text)} bytes; at most {MOST_SCHEMA_BYTES} are read")
    _grammar(text)
    return text


class StructuredText:
    """A JSON value that a model writes, a token at a time.

    Parameters
    ----------
    schema : mapping
        The JSON schema the value keeps to.
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer whose tokens are bytes of text: byte-level, or with bytes to fall back on.
    eos_token_ids : collection of int
        Tokens that end a value which could go on, as a number can.

    Attributes
    ----------
    eos_token_ids : set of int
        Those of them that the tokenizer has.
    is_stuck : bool
        Whether no token can follow: the grammar has become too intricate, or the tokenizer lacks what it wants.

    Raises
    ------
    InputError
        If the schema or the tokenizer cannot be used.
    MissingDependency
        If llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, eos_token_ids: set[int]) -> None:
        text = checked_schema(schema)
        self._vocabulary = _vocabulary(tokenizer, eos_token_ids)
        self._matcher = self._vocabulary.matcher(text).deep_copy()
        self._bytes = b""
        self._closing = Closing(self._vocabulary.endings)
        self.eos_token_ids = self._vocabulary.eos_token_ids
        self.is_stuck = False

    @property
    def is_complete(self) -> bool:
        """Whether the value is there and nothing can be added to it."""
        return not self.is_stuck and self._matcher.is_stopped()

    @property
    def text(self) -> str:
        """What has been written."""
        return self._bytes.decode(errors="replace")

    def add(self, token: int) -> None:
        """Write a token that is allowed."""
        if self._matcher.consume_token(token):
            written = self._vocabulary.tokens.decode_bytes([token])
            self._bytes += written
            self._closing.add(written)
        else:
            self.is_stuck = True

    def allowed(self, room: int) -> Bits:
        """Return which tokens may follow, where ``room`` tokens may be written in all."""
        bits = _bits(self._matcher)
        self.is_stuck = self.is_stuck or self._matcher.is_error() or not bits.any()
        return bits if self.is_stuck else self._closing.narrowed(bits, self._matcher, room)


def masked(logits: Tensor, texts: Sequence[StructuredText | None], room: Sequence[int]) -> Tensor:
    """Return logits with minus infinity in place of tokens that must not follow.

    Parameters
    ----------
    logits : torch.Tensor
        ``[batch, vocabulary]``.
    texts : sequence of StructuredText or None
        What each row writes; None where it is free. Rows that are free, or stuck, are left as they are.
    room : sequence of int
        How many more tokens each row may write.
    """
    width = logits.shape[-1]
    bits = np.full((len(texts), -(-width // 8)), 0xFF, dtype=np.uint8)
    for row, text, left in zip(bits, texts, room, strict=True):
        if text is None:
            continue
        allowed = text.allowed(left)[: len(row)]
        if not text.is_stuck:
            row[: len(allowed)] = allowed
            row[len(allowed) :] = 0  # rows of the embedding that are no tokens
    forbidden = np.unpackbits(bits, axis=1, count=width, bitorder="little") == 0
    return logits.masked_fill(torch.from_numpy(forbidden).to(logits.device), float("-inf"))


class _Vocabulary:
    """A tokenizer as grammars see it, and the grammars that are ready for it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: set[int]) -> None:
        _llguidance()
        from llguidance.hf import from_tokenizer

        what = "structured answers need a fast tokenizer whose tokens are bytes of text, and an end-of-sequence token"
        self.eos_token_ids = {token for token in eos_token_ids if 0 <= token < len(tokenizer)}
        if not self.eos_token_ids:
            raise InputError(what, "the model's generation config and tokenizer name no token that ends an answer")
        try:
            self.tokens = from_tokenizer(tokenizer, eos_token=sorted(self.eos_token_ids))  # type: ignore[arg-type]
        except Exception as error:
            raise InputError(what, f"{type(tokenizer).__name__}: {error}") from error
        self.endings = Endings(self.tokens, self.eos_token_ids)
        self.matcher = functools.lru_cache(maxsize=_CACHED_GRAMMARS)(self._matcher)

    def _matcher(self, schema: str) -> Any:
        """Return where values of a schema begin; to be copied."""
        llguidance = _llguidance()
        matcher = llguidance.LLMatcher(self.tokens, _grammar(schema), limits=_limits(), log_level=0)
        begins = bool(_bits(matcher).any())
        if matcher.is_error():
            raise _unusable(matcher.get_error())
        if not begins:
            raise InputError("the tokenizer has no token with which a value of the JSON schema could begin")
        return matcher


_vocabularies: WeakKeyDictionary[Any, dict[Any, _Vocabulary]] = WeakKeyDictionary()
_vocabularies_lock = threading.Lock()


def _vocabulary(tokenizer: PreTrainedTokenizerBase, eos_token_ids: set[int]) -> _Vocabulary:
    """Return a tokenizer's vocabulary, made once."""
    with _vocabularies_lock:
        known = _vocabularies.setdefault(tokenizer, {})
        key = len(tokenizer), frozenset(eos_token_ids)  # tokens may have been added since
        if key not in known:
            known[key] = _Vocabulary(tokenizer, eos_token_ids)
        return known[key]


@functools.lru_cache(maxsize=_CACHED_GRAMMARS)
def _grammar(schema: str) -> str:
    llguidance = _llguidance()
    try:
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON)
    except ValueError as error:  # nested too deeply
        raise _unusable(str(error)) from error
    is_wrong, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    if is_wrong:
        raise _unusable(messages[0])
    return grammar


def _unusable(message: str) -> InputError:
    return InputError(f"the JSON schema cannot be used: {' '.join(message.split())}", "see docs/structured.md")


def _bits(matcher: Any) -> Bits:
    return np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)


def _limits() -> Any:
    return _llguidance().LLParserLimits(
        max_grammar_size=_MOST_SYMBOLS, max_lexer_states=_MOST_LEXER_STATES, verbose_errors=False
    )


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependency("structured answers need llguidance", "pip install 'ctxdocs[structured]'") from error
    return llguidance
