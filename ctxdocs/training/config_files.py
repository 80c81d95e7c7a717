"""Configurations as YAML: read, overridden option by option, written out with what every option means; and recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError, MissingDependency, StorageError
from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.options import documented, from_mapping, set_dotted, unknown

if TYPE_CHECKING:
    from types import ModuleType

_RECIPES = Path(__file__).parent / "recipes"


def load_config(
    path: str | Path | None = None, *, recipe: str | None = None, changes: Sequence[str] = (), **given: Any
) -> TrainingConfig:
    """Put a configuration together: a recipe, then a file, then what is given, then dotted changes.

    Parameters
    ----------
    path : path, optional
        YAML.
    recipe : str, optional
        One of :func:`recipes`.
    changes : sequence of str
        ``"optimizer.lr=1e-4"``; values are YAML.
    **given
        Options of the first level; ``data.files`` as ``data_files``. None says nothing.

    Raises
    ------
    InputError
        If an option is unknown, or a value is of the wrong type.
    """
    values: dict[str, Any] = {}
    for source in ([_recipe(recipe)] if recipe else []) + ([Path(path)] if path else []):
        _merge(values, read_yaml(source))
    for name, value in given.items():
        if value not in (None, (), []):
            set_dotted(values, name.replace("data_files", "data.files"), value)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise InputError(f"{change!r} sets nothing", "write NAME=VALUE, such as optimizer.lr=1e-4")
        set_dotted(values, name.strip(), parse(text))
    return resolve(TrainingConfig.from_mapping(values))


def resolve(config: TrainingConfig) -> TrainingConfig:
    """Fill in the options of the method's objective, so that all of them are there to be read and compared."""
    from ctxdocs.training.steps import options_class

    config.check_choices()
    for objective in ("published", "documents"):
        cls = options_class(config.method, objective)
        values = from_mapping(cls, getattr(config, objective), f"{objective}.")
        setattr(config, objective, asdict(values) if config.objective == objective else {})
    return config


def recipes() -> dict[str, str]:
    """Return the recipes that come with the package, by name, and what each is for: its first comment."""
    found = {}
    for path in sorted(_RECIPES.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        found[path.stem] = first.lstrip("# ").strip()
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises
    ------
    InputError
        If it is missing, is no YAML, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    values = parse(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no options by name")
    return values


def parse(text: str, where: str = "the value") -> Any:
    """Parse YAML; objects of any other kind than its own are refused."""
    yaml = _yaml()
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is no YAML: {' '.join(str(error).split())}") from error


def write_config(config: TrainingConfig, path: Path) -> None:
    """Write every option with its value and what it means."""
    try:
        path.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error})") from error


def dump_config(config: TrainingConfig) -> str:
    """Return a configuration as YAML, every option with what it means."""
    from ctxdocs.training.steps import options_class

    meanings = {name: help for name, _, help in documented(config)}
    options = options_class(config.method, config.objective)() if config.method else None
    if options is not None:
        meanings |= {f"{config.objective}.{name}": help for name, _, help in documented(options)}
    return "".join(_lines(config.to_mapping(), meanings))


def _lines(values: dict[str, Any], meanings: dict[str, str], at: str = "") -> list[str]:
    yaml = _yaml()
    indent = "  " * at.count(".")
    lines = []
    for name, value in values.items():
        dotted = f"{at}{name}"
        comment = f"{indent}# {meanings[dotted]}\n" if meanings.get(dotted) else ""
        if isinstance(value, dict) and any(known.startswith(f"{dotted}.") for known in meanings):
            lines += [comment, f"{indent}{name}:\n", *_lines(value, meanings, f"{dotted}.")]
        else:
            text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n")
            lines.append(f"{comment}{indent}{name}: {text.rstrip()}\n")
    return lines


def _merge(values: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _recipe(name: str) -> Path:
    known = recipes()
    if name not in known:
        raise InputError(
            unknown(name, list(known)).message.replace("option", "recipe"), unknown(name, list(known)).hint
        )
    return _RECIPES / f"{name}.yaml"


def _yaml() -> ModuleType:
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency("configurations are YAML and need PyYAML", "pip install ctxdocs[train]") from error
    return yaml
