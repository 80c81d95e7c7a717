"""Formats of answers, as OpenAI's API and the frameworks ask for them, become JSON schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctxdocs.errors import InputError

#: A schema of any JSON object.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_SCHEMA = ("items", "additionalProperties")
_SCHEMAS = ("anyOf", "oneOf", "prefixItems")
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")


def schema_of(response_format: object) -> Mapping[str, Any] | None:
    """Return the JSON schema that a ``response_format`` of OpenAI's API asks for.

    Parameters
    ----------
    response_format : mapping or None
        ``{"type": "text"}``, ``{"type": "json_object"}``, or ``{"type": "json_schema"}`` with the schema in
        ``["json_schema"]["schema"]``; with ``"strict": true`` beside that, its objects are :func:`closed`.

    Returns
    -------
    mapping or None
        None if any text will do.

    Raises
    ------
    InputError
        If it is of another type, or holds no schema. Whether that can be used is seen when it is.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise InputError(f"response_format must be an object, got {type(response_format).__name__}")
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise InputError(f"response_format is of type {kind!r}", "one of: text, json_object, json_schema")
    about = response_format.get("json_schema")
    schema = about.get("schema") if isinstance(about, Mapping) else None
    if not isinstance(about, Mapping) or not isinstance(schema, Mapping):
        raise InputError("response_format holds no schema", "put it into response_format['json_schema']['schema']")
    return closed(schema) if about.get("strict") else schema


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON schema whose objects have no properties but those it names, where it does not say otherwise.

    What a schema leaves open, a model would fill with properties of its own. What stands below ``allOf`` is left as it
    is: there an object is described in parts.

    Raises
    ------
    InputError
        If it is nested too deeply.
    """
    try:
        return _closed(schema)
    except RecursionError as error:
        raise InputError("the JSON schema is nested too deeply") from error


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    copy = dict(schema)
    for key in _SCHEMA:
        if isinstance(copy.get(key), Mapping):
            copy[key] = _closed(copy[key])
    for key in _SCHEMAS:
        if isinstance(copy.get(key), list):
            copy[key] = [_closed(each) if isinstance(each, Mapping) else each for each in copy[key]]
    for key in _NAMED_SCHEMAS:
        if isinstance(copy.get(key), Mapping):
            copy[key] = {name: _closed(each) if isinstance(each, Mapping) else each for name, each in copy[key].items()}
    named = copy.get("properties")
    if isinstance(named, Mapping) and not copy.keys() & {"allOf", "patternProperties"}:
        required = copy.get("required", [])
        if isinstance(required, list) and all(name in named for name in required):
            copy.setdefault("additionalProperties", False)
    return copy
