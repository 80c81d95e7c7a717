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
from ctxdocs.integrations.reading import LibraryReader, Request, Search
from ctxdocs.prompts import Piece, begins_with, begun, encode_pieces

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
        self, question: str, turns: Sequence[tuple[str, str]], system: str = "", search: Search | None = None
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
        if session is None:
            session = self.reader.model.compressor.session()
        layout = self.reader.layout(system)
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
        compressor: Any = self.reader.model.compressor
        question, answer = (Piece(self.reader.text_of(text), trusted=False) for text in turn)
        pieces: list[Any] = self.reader.opening_text(layout, system) if is_first else [Piece(layout.between)]
        before, _, after = layout.turn.pieces("")
        ids = encode_pieces(compressor.tokenizer, [*pieces, before, question, after, answer])  # type: ignore[list-item]
        if not is_first:
            return ids
        if compressor.prefix_ids is not None:  # the session begins with it by itself
            return ids[len(compressor.prefix_ids) :] if begins_with(ids, compressor.prefix_ids) else ids
        return torch.cat(begun([ids], compressor.tokenizer)) if layout.adds_bos else ids  # type: ignore[arg-type]


def _key(system: str, turns: Sequence[tuple[str, str]]) -> str:
    return hashlib.sha256(json.dumps([system, *turns]).encode()).hexdigest()
