"""A LoRA beside the model's own layers while it trains (arXiv 2106.09685), by peft; merged into them at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ctxdocs.errors import InputError, MissingDependency
from ctxdocs.training.config import LoraOptions

if TYPE_CHECKING:
    from ctxdocs.compressors.base import Compressor


def add_lora(compressor: Compressor, options: LoraOptions) -> None:
    """Put a LoRA beside linear layers of the model.

    Raises
    ------
    MissingDependency
        If peft is not installed.
    InputError
        If the model has no layers of the given names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingDependency("train: lora needs peft", "pip install ctxdocs[train]") from error
    settings = LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=options.dropout,
        target_modules=options.layers,
    )
    try:
        inject_adapter_in_model(settings, compressor.model)
    except ValueError as error:
        names = {name.rpartition(".")[2] for name, _ in compressor.backbone.layers.named_modules()}
        raise InputError(
            f"{type(compressor.model).__name__} has no layers named {', '.join(options.layers)}",
            f"set lora.layers to some of: {', '.join(sorted(name for name in names if name and not name.isdigit()))}",
        ) from error


def merge_lora(compressor: Compressor) -> None:
    """Add every LoRA to the weight it stands beside, and leave plain linear layers."""
    for name, layer in list(_layers(compressor)):
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(compressor.model.get_submodule(parent), leaf, layer.get_base_layer())


@contextmanager
def lora_off(compressor: Compressor) -> Iterator[None]:
    """Have the model compute without its LoRA."""
    layers = [layer for _, layer in _layers(compressor)]
    for layer in layers:
        layer.enable_adapters(enabled=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(enabled=True)


def _layers(compressor: Compressor) -> Iterator[tuple[str, Any]]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return
    for name, module in compressor.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module
