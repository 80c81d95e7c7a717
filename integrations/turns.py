"""A conversation's messages taken apart into the system's text, turns and a question."""

from __future__ import annotations

from collections.abc import Iterable

from ctxdocs.errors import InputError


def turns_of(messages: Iterable[tuple[str, str]]) -> tuple[str, list[tuple[str, str]], str]:
    """Take a conversation apart.

    Messages of one role that follow one another are joined by a blank line.

    Parameters
    ----------
    messages : iterable of (str, str)
        Roles (``system``, ``user``, ``assistant``) and texts: system messages first, then user and assistant in turn,
        a user's last.

    Returns
    -------
    system : str
        The system's text; empty if there is none.
    turns : list of (str, str)
        Questions and answers so far.
    question : str
        The last message.

    Raises
    ------
    InputError
        If there are no messages, or they are out of order.
    """
    runs: list[tuple[str, str]] = []
    for role, text in messages:
        if runs and runs[-1][0] == role:
            text = f"{runs.pop()[1]}\n\n{text}"
        runs.append((role, text))
    system = runs.pop(0)[1] if runs and runs[0][0] == "system" else ""
    roles = [role for role, _ in runs]
    if not roles or roles[-1] != "user":
        raise InputError(
            "the conversation holds no question" if not roles else "the last message is the assistant's",
            "the last message has to be the user's",
        )
    wanted = ["user", "assistant"] * (len(roles) // 2) + ["user"]
    if roles != wanted:
        wrong = next(i for i, role in enumerate(roles) if i >= len(wanted) or role != wanted[i])
        raise InputError(
            f"the messages are out of order: {', '.join(['system'] * bool(system) + roles[: wrong + 1])}",
            "system messages come first, then the user's and the assistant's in turn",
        )
    texts = [text for _, text in runs]
    return system, list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1]
