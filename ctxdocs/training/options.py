"""Dataclasses whose fields are options: filled from YAML's mappings, compared, and written out with what they mean."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from ctxdocs.errors import InputError

T = TypeVar("T")


def option(default: Any, help: str, *, free: bool = False) -> Any:
    """Declare an option; a run goes on with another value of a ``free`` one."""
    metadata = {"help": help, "free": free}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def from_mapping(cls: type[T], values: Mapping[str, Any], at: str = "") -> T:
    """Build a dataclass of options.

    Parameters
    ----------
    cls : type
        The dataclass; fields that are dataclasses are filled from mappings.
    values : mapping
        Options by name; those left out keep their defaults.
    at : str
        Where the mapping stands, for messages: ``"optimizer."``.

    Raises
    ------
    InputError
        If an option is unknown, or its value is of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{at.rstrip('.') or 'the configuration'} holds {values!r}, not options by name")
    hints = typing.get_type_hints(cls)
    fields = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown(f"{at}{name}", [f"{at}{known}" for known in fields])
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            found[name] = from_mapping(typing.cast("type", hint), {} if value is None else value, f"{at}{name}.")
        else:
            found[name] = _converted(value, hint, f"{at}{name}")
    return cls(**found)


def unknown(name: str, known: Sequence[str], kind: str = "option") -> InputError:
    """Return the error for an option, or something else, that does not exist."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return InputError(
        f"there is no {kind} {name!r}", f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    )


def set_dotted(values: dict[str, Any], name: str, value: Any) -> None:
    """Set ``"optimizer.lr"`` in nested mappings."""
    *parents, leaf = name.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{parent} holds a value and no options", f"set {name} in the configuration file")
    values[leaf] = value


def differing(old: Mapping[str, Any], new: Mapping[str, Any], at: str = "") -> list[str]:
    """Name the options, dotted, that two nested mappings do not agree on."""
    names: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        ours, theirs = old.get(name), new.get(name)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            names += differing(ours, theirs, f"{at}{name}.")
        elif ours != theirs:
            names.append(f"{at}{name}")
    return names


def free_options(cls: type, at: str = "") -> set[str]:
    """Name the options, dotted, that may change when a run goes on."""
    return {name for name, entry, _ in _walk(cls, at) if entry.metadata.get("free")}


def documented(instance: Any) -> list[tuple[str, Any, str]]:
    """Return every option of a dataclass instance: dotted name, value and meaning."""
    return [(name, value, entry.metadata.get("help", "")) for name, entry, value in _walk(type(instance), "", instance)]


def _walk(cls: type, at: str, instance: Any = None) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    for entry in dataclasses.fields(cls):
        value = getattr(instance, entry.name, None)
        if dataclasses.is_dataclass(hints[entry.name]):
            yield from _walk(typing.cast("type", hints[entry.name]), f"{at}{entry.name}.", value)
        else:
            yield f"{at}{entry.name}", entry, value


def _converted(value: Any, hint: Any, name: str) -> Any:
    """Return the value as the type asks for it; what YAML leaves a string (1e-4) may be a number."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin is list:
        (inner,) = typing.get_args(hint)
        items = value if isinstance(value, list | tuple) else [value]
        return [_converted(item, inner, name) for item in items]
    if origin is dict:
        if value is None:
            return {}
        if isinstance(value, Mapping):
            return dict(value)
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint in (int, float):
        try:
            number = float(value)
            if not isinstance(value, bool) and (hint is float or number == int(number)):
                return hint(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif isinstance(value, hint):
        return value
    elif hint is str and value is None:  # NAME= says nothing
        return ""
    wanted = getattr(hint, "__name__", str(hint))
    raise InputError(f"{name} is {value!r}", f"it takes a value of type {wanted}")
