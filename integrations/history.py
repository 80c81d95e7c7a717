"""Earlier turns of a conversation as one memory, for frameworks that send the whole conversation with every call."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ctxdocs.chat_format import ChatFormat
from ctxdocs.integrations.contents import Contents
from ctxdocs.integrations.reading import LibraryReader, Request
from ctxdocs.integrations.searching import Search
from ctxdocs.prompts import Piece, begins_with, encode_pieces, with_bos

if TYPE_CHECKING:
    from ctxdocs.compressors.sessions import Session

_KEPT = 8


class CompressedHistory:
    """Sessions that have read the conversations of the last calls; one that goes on is read from where it was.

    Parameters
    ----------
    reader : LibraryReader
        Of the library whose model holds the conversations.
    kept : int
        Conversations to remember, the last ones.
    """

    def __init__(self, reader: LibraryReader, kept: int = _KEPT) -> None:
        self.reader = reader
        self.kept = kept
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def request(
        self, question: str, turns: Sequence[tuple[str, str]], system: str = "", search: Search | Contents | None = None
    ) -> Request:
        """Return the prompt of a question behind the memory of the turns so far.

        What the system's text and the question refer to is read beside the question; what earlier turns refer to is
        not in their memory, which is a memory of what was said.
        """
        session = self._session(turns, system)
        with self.reader.model.lock, torch.no_grad():
            memory = session.memory()
        return self.reader.continued(memory, question, system, search)

    def _session(self, turns: Sequence[tuple[str, str]], system: str) -> Session:
        keys = [_key(system, turns[:count]) for count in range(len(turns) + 1)]
        with self._lock:
            read = next((count for count in range(len(turns), 0, -1) if keys[count] in self._sessions), 0)
            session = self._sessions.pop(keys[read], None)
        layout = self.reader.layout(system)
        if session is None:
            session = self.reader.opened(self.reader.opening_text(layout, system)[0]).session()
        for index in range(read, len(turns)):
            ids = self._ids(layout, system, turns[index], is_first=index == 0)
            with self.reader.model.lock, torch.no_grad():
                session.feed(ids)
        with self._lock:
            self._sessions[keys[-1]] = session
            while len(self._sessions) > self.kept:
                self._sessions.popitem(last=False)
        return session

    def _ids(self, layout: ChatFormat, system: str, turn: tuple[str, str], *, is_first: bool) -> Any:
        """Return the ids of a turn's text, without what it refers to."""
        before, *said = self.reader.opening_text(layout, system)
        compressor: Any = self.reader.opened(before)
        tokenizer = compressor.tokenizer
        question, answer = (Piece(self.reader.text_of(text), trusted=False) for text in turn)
        front, _, behind = layout.turn.pieces("")
        rest: list[Any] = [front, question, behind, answer]
        if not is_first:
            return encode_pieces(tokenizer, [Piece(layout.between), *rest])
        ids, prefix = encode_pieces(tokenizer, [before, *said, *rest]), compressor.prefix_ids
        if prefix is None:
            return ids if layout.turn.bos == "template" else torch.cat(with_bos([ids], tokenizer))  # type: ignore[arg-type]
        # The session begins with the prefix by itself.
        if begins_with(ids, prefix):
            return ids[len(prefix) :]
        opening_is_prefix = begins_with(encode_pieces(tokenizer, [before]), prefix)
        return encode_pieces(tokenizer, [*said, *rest]) if opening_is_prefix else ids


def _key(system: str, turns: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps([system, *turns]).encode()).hexdigest()
