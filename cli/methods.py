"""Methods and their settings, as options of the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ctxdocs.cli.output import clean
from ctxdocs.errors import InputError

#: Settings that an option of ``ctxdocs compress`` sets; of a library made with ``slots``, the ratio says nothing.
SETTINGS = ("ratio", "slots", "budget", "positions", "prefix", "segment_tokens")


def check_settings(model: str | None, method: str | None, names: Iterable[str]) -> None:
    """Refuse settings that the method does not have, as the options they were given by.

    Raises
    ------
    InputError
        If there is one, or no such method.
    CheckpointError
        If no method is named and there is no checkpoint to ask.
    """
    from ctxdocs.checkpoints import BUNDLED, DEFAULT_METHOD, known_settings, method_of
    from ctxdocs.compressors import compressor_class

    name = method or method_of(model or BUNDLED) or DEFAULT_METHOD
    known = known_settings(compressor_class(name))
    if unknown := sorted(set(names) - known):
        options = ", ".join(_option(setting) for setting in SETTINGS if setting in known)
        raise InputError(
            f"the method {name} has no {' and no '.join(map(_option, unknown))}",
            f"it has: {options}" if options else "leave it out, or choose another --method",
        )


def described_method(compressor: Mapping[str, Any]) -> str:
    """Return a library's method and its main settings, as its manifest has them."""
    settings = dict(compressor["settings"])
    if settings.get("slots") is not None:
        settings.pop("ratio")
    if isinstance(ids := settings.get("prefix"), list):
        settings["prefix"] = f"of {len(ids)} token ids"
    values = {name: settings[name] for name in SETTINGS if settings.get(name) is not None}
    parts = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in values.items()]
    text = ", ".join([compressor["method"], *parts])
    default = " (chosen by default: the model names no method)" if compressor.get("chosen_by_default") else ""
    return clean(text) + default


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " or ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")
