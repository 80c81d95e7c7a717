"""A published checkpoint, a saved one or the bundled one becomes the right compressor."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.checkpoint_files import ADAPTER_CONFIG, WEIGHTS, first_line, listed, read_adapter, read_json, read_weights
from ctxdocs.compressors import METHODS, compressor_class
from ctxdocs.compressors.saving import ENCODER_CONFIG, read_card
from ctxdocs.cpu import multiplies_bfloat16
from ctxdocs.errors import CheckpointError, InputError
from ctxdocs.hub import download, download_tokenizer
from ctxdocs.prompts import PromptFormat
from ctxdocs.published import BUNDLED, CCM_DRIVE, PublishedCheckpoint, bundled_path, find_published
from ctxdocs.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor
    from ctxdocs.modeling.lora import Adapter

#: Method of a plain causal language model, where none is named.
DEFAULT_METHOD = "kvzip"

_PLACES: tuple[str, ...] = ("base_model", "finetune")


def load_compressor(
    name_or_path: str | os.PathLike[str] | None = None,
    method: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    **settings: Any,
) -> Compressor:
    """Load a compressor, in evaluation mode and with gradients off.

    Parameters
    ----------
    name_or_path : str or path, optional
        A folder in the authors' checkpoint format or saved by :meth:`Compressor.save`, or a name on the Hugging Face
        hub. None, or ``"bundled"``, is the small model that comes with the package. What a published checkpoint does
        not say of itself is known by its name (``ctxdocs.published``).
    method : str, optional
        Method of the checkpoint; found from its name or its configuration when left out. A plain causal language
        model gets ``"kvzip"``, which needs no training (and ``chosen_by_default`` of the compressor says so). Methods
        without training also take the base model of another method's checkpoint.
    device : str or torch.device
        ``"auto"`` is the first CUDA device, or the CPU.
    dtype : str or torch.dtype
        ``"auto"`` is the dtype the checkpoint was saved in; for the bundled model on a processor that has no
        instructions for it, float32. A name like ``"bfloat16"`` works too.
    attn_implementation : str
        ``"auto"`` lets transformers choose; ``"sdpa"``, ``"eager"``, ``"flash_attention_2"`` force one.
    **settings
        The method's run settings, for example ``segment_tokens=512``; they replace what the checkpoint says. Those
        that are left out are, for a published Activation Beacon or UltraGist, not those it was trained with: it chooses
        the lowest ratio with which a text and 1024 more tokens fit (``ratio_mix="adapt-1024"``), as in its evaluation.
        For a LoRA adapter without its base beside it, ``base_model`` names the base; where it was trained on top of
        another adapter, ``finetune`` names that one, which is merged into the base first.

    Returns
    -------
    Compressor
        Ready to compress and to read.

    Raises
    ------
    CheckpointError
        If there is no checkpoint there, it or its base is out of reach or incomplete, or its method cannot be told.
    InputError
        If the device cannot be used, or the method does not have a setting.
    """
    name_or_path = BUNDLED if name_or_path is None else str(name_or_path)
    device = _device(device)
    if name_or_path == BUNDLED and dtype == "auto" and str(device) == "cpu" and not multiplies_bfloat16():
        dtype = "float32"
    published = find_published(name_or_path)
    folder = _folder(bundled_path() if name_or_path == BUNDLED else name_or_path)
    card = read_card(folder)
    told = {name: settings.pop(name, None) for name in _PLACES}
    places = {name: _place(where) for name, where in told.items() if where is not None}
    adapter = read_adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    config = read_json(folder / "config.json", may_lack=adapter is not None)
    if (folder / ENCODER_CONFIG).is_file():
        config["encoder_config"] = read_json(folder / ENCODER_CONFIG)
    base = None
    if method is None:
        method = card["method"] if card else published.method if published else None
    if method is None:
        base = _base_folder(folder, places.get("base_model"), published)
        method = _recognising({**read_json(base / "config.json"), **config}, adapter)
    by_default = method is None and adapter is None
    if method is None and not by_default:
        raise _no_method(folder, "its adapter is none of a method's either")
    cls = compressor_class(method or DEFAULT_METHOD)
    source: Any = card or ({"method": published.method, "settings": published.settings} if published else None)
    defaults = source["settings"] if source and source["method"] == cls.method else {}
    run_settings = _settings(cls, {**defaults, **settings})
    adapter_settings = cls.adapter_settings(adapter) if adapter else {}
    finetune = places.get("finetune") or _beside(folder, adapter_settings.get("finetune"))
    # Last, because it may have to be downloaded.
    base = base or _base_folder(folder, places.get("base_model"), published)
    config = {**read_json(base / "config.json"), **config, **adapter_settings}
    weights = read_weights(base)
    if not cls.is_trained:
        adapter = _forget_method(config, adapter, weights)
    own_names = cls.own_tensors(config)
    own = {name: weights.pop(name) for name in own_names & weights.keys()}
    for name in cls.unused_tensors(config):
        weights.pop(name, None)
    try:
        model = _build_model(base, weights, dtype, attn_implementation)
    except CheckpointError as error:
        raise (_no_method(folder, error.message) if by_default else error) from error
    if finetune:
        read_adapter(_folder(finetune)).merge_into(model)
    if adapter:
        own.update(cls.adapter_tensors(model, adapter, own_names))
    if missing := sorted(own_names - own.keys()):
        raise CheckpointError(f"{folder} lacks tensors of {cls.method}: {listed(missing)}")
    compressor = cls.build(
        model.to(device),  # type: ignore[arg-type]
        _load_tokenizer(folder) or _load_tokenizer(base) or _base_tokenizer(published),
        config,
        own,
        prompt_format=PromptFormat.from_dict(card["prompt_format"]) if card else None,
        **run_settings,
    )
    compressor.name_or_path = name_or_path if name_or_path == BUNDLED else _place(name_or_path)
    compressor.base_places = places
    compressor.chosen_by_default = by_default
    compressor.requires_grad_(False)
    return compressor.eval()


def method_of(name_or_path: str | os.PathLike[str]) -> str | None:
    """Return the method that a checkpoint was made with; None for a plain language model.

    Raises
    ------
    CheckpointError
        If there is no checkpoint there.
    """
    published = find_published(str(name_or_path))
    folder = _folder(bundled_path() if str(name_or_path) == BUNDLED else name_or_path)
    if (card := read_card(folder)) is not None:
        return card["method"]
    if published:
        return published.method
    adapter = read_adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    return _recognising(read_json(folder / "config.json", may_lack=adapter is not None), adapter)


def new_compressor(
    name_or_path: str | os.PathLike[str],
    method: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "auto",
    **settings: Any,
) -> Compressor:
    """Put a method onto a language model that knows nothing of it: a compressor that has yet to be trained.

    Parameters are those of :func:`load_compressor`; ``name_or_path`` is a plain model, and ``settings`` are all those
    of the method.

    Raises
    ------
    CheckpointError
        If there is no model there, or it is incomplete.
    InputError
        If the device cannot be used, the method does not have a setting, or cannot be put onto this model.
    """
    cls = compressor_class(method)
    checked = checked_settings(cls, settings)
    device = _device(device)
    folder = _folder(name_or_path)
    model = _build_model(folder, read_weights(folder), dtype, attn_implementation)
    compressor = cls.from_base(model.to(device), _load_tokenizer(folder), **checked)  # type: ignore[arg-type]
    compressor.requires_grad_(False)
    return compressor.eval()


def checked_settings(cls: type[Compressor], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a new compressor; raise ``InputError`` if the method lacks one, or needs one more."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    needed = {entry.name for entry in parameters if entry.kind is entry.KEYWORD_ONLY and entry.default is entry.empty}
    if missing := sorted(needed - settings.keys()):
        raise InputError(f"a new {cls.method} compressor needs the setting {listed(missing)}")
    return _settings(cls, settings)


def _place(name_or_path: str | os.PathLike[str]) -> str:
    """Return a hub name as it is, and a folder as an absolute path: good for finding it again."""
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name_or_path)


def _base_folder(
    folder: Path, base_model: str | os.PathLike[str] | None, published: PublishedCheckpoint | None
) -> Path:
    """Where the base model lies: beside the adapter, where the caller says, or where it is known to be."""
    is_model = (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS)
    if is_model or not (folder / ADAPTER_CONFIG).is_file():
        return folder
    named = base_model or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    # What a published adapter names may be a path on its authors' machine.
    if published and not base_model and not (named and Path(named).is_dir()):
        named = published.base
    if not named:
        raise CheckpointError(f"{folder} is an adapter and does not say of which model", "pass base_model=...")
    try:
        return _folder(named)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base model of {folder.name} is missing: {error.message}",
            "; or ".join(filter(None, [error.hint, "pass base_model=..., where a copy lies"])),
        ) from error


def _folder(name_or_path: str | os.PathLike[str]) -> Path:
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
            raise CheckpointError(f"{path} is no checkpoint: it has no config.json", "give a model folder")
        return path
    name = str(name_or_path)
    if (published := find_published(name)) and published.drive:
        raise CheckpointError(
            f"{published.name} is not on the hub; its authors publish it only as a folder on their drive",
            f"download {published.drive} from {CCM_DRIVE} and give its path; its base model is {published.base}",
        )
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"there is no checkpoint folder at {path}", "check the path, or give a hub name owner/model"
        )
    return download(name)


def _recognising(config: Mapping[str, Any], adapter: Adapter | None) -> str | None:
    """Return the method whose checkpoint this is, or None."""
    for method in METHODS:
        cls = compressor_class(method)
        if cls.recognises({**config, **(cls.adapter_settings(adapter) if adapter else {})}):
            return method
    return None


def _forget_method(config: Mapping[str, Any], adapter: Adapter | None, weights: dict[str, Tensor]) -> Adapter | None:
    """Drop what the checkpoint's own method adds to its base model; return the adapter if it is of none."""
    other = _recognising(config, adapter)
    if other is None:
        return adapter
    cls = compressor_class(other)
    for name in cls.own_tensors(config) | cls.unused_tensors(config):
        weights.pop(name, None)
    return None


def _no_method(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"the config.json of {folder} names no compression method, and it is no plain causal language model: {why}",
        f"pass method=..., one of: {', '.join(METHODS)}",
    )


def known_settings(cls: type[Compressor]) -> set[str]:
    """Return the names of the settings that a method has."""
    # What a method shares with others are settings of a class that its own derives from.
    signatures = [inspect.signature(vars(base)["__init__"]) for base in cls.__mro__ if "__init__" in vars(base)]
    parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY} - {"prompt_format"}


def _settings(cls: type[Compressor], settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse settings the method does not have, by name."""
    known = known_settings(cls)
    if unknown := sorted(settings.keys() - known):
        raise InputError(f"{cls.method} has no setting {listed(unknown)}", f"it has: {', '.join(sorted(known))}")
    return settings


def _build_model(
    folder: Path, weights: dict[str, Tensor], dtype: str | torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Build the stock transformers model that ``config.json`` names and fill it; every tensor must find its place."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, GenerationConfig

    options: dict[str, Any] = {} if attn_implementation == "auto" else {"attn_implementation": attn_implementation}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if model_class is None:
            raise ValueError(f"transformers has no causal language model of the kind {config.model_type}")
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds; each means that this folder cannot be loaded
        raise CheckpointError(f"{folder} could not be loaded: {first_line(error)}") from error
    name = type(model).__name__
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{folder} lacks tensors of {name}: {listed(missing)}")
    if mismatched := info["mismatched_keys"]:
        shapes = [f"{key} is {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(mismatched)]
        raise CheckpointError(f"{folder} holds tensors of the wrong shape: {listed(shapes)}")
    if unexpected := sorted(info["unexpected_keys"]):
        raise CheckpointError(
            f"{folder} holds tensors that {name} has no place for: {listed(unexpected)}",
            "another method, or another version of the model?",
        )
    return model


def _beside(folder: Path, name: str | None) -> Path | None:
    """Find the adapter that the one in ``folder`` was trained on top of, as published: beside it, or one level up."""
    if name is None:
        return None
    found = next((parent / name for parent in folder.resolve().parents[:2] if (parent / name).is_dir()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} was trained on top of the LoRA adapter {name}, which is not beside it", "pass finetune=..."
        )
    return found


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"the tokenizer in {folder} could not be loaded: {first_line(error)}") from error


def _base_tokenizer(published: PublishedCheckpoint | None) -> PreTrainedTokenizerBase | None:
    """Fetch the tokenizer that a published checkpoint came without."""
    if published is None or published.drive:
        return None
    try:
        return _load_tokenizer(download_tokenizer(published.base))
    except CheckpointError as error:
        raise CheckpointError(
            f"{published.name} has no tokenizer, and that of its base is missing: {error.message}", error.hint
        ) from error


def _device(device: str | torch.device) -> str | torch.device:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"device {str(device)!r} cannot be used: {reason}", "try the device cpu") from error
    return device
