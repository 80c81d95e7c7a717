"""Names of an adapter's package, imported when they are first used; without the framework they say what to install."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from ctxdocs.errors import MissingDependency


def load(package: str, modules: Mapping[str, str], name: str, *, framework: str, extra: str) -> Any:
    """Return what a package calls ``name``.

    Parameters
    ----------
    package : str
        The package.
    modules : mapping of str to str
        In which of its modules each name is.
    name : str
        The name.
    framework : str
        The module that has to be there.
    extra : str
        The extra of ctxdocs that installs it.

    Raises
    ------
    AttributeError
        If there is no such name.
    MissingDependency
        If the framework is not installed.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        importlib.import_module(framework)
    except ImportError as error:
        distribution = re.sub(r"[._]", "-", framework)
        raise MissingDependency(f"{name} needs {distribution}", f"pip install 'ctxdocs[{extra}]'") from error
    return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)
