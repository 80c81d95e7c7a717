"""What a run starts from: a compressor, a language model that becomes one, or a configuration and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctxdocs.compressors import compressor_class
from ctxdocs.errors import CheckpointError, InputError
from ctxdocs.published import BUNDLED, bundled_path
from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.lora import add_lora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ctxdocs.compressors.base import Compressor

_CONFIGURATIONS = (".json", ".yaml", ".yml")
#: What a new compressor has to be told, as published.
_NEEDED: dict[str, dict[str, Any]] = {"autocompressor": {"summary_length": 50}, "ccm": {"num_comp_tokens": 2}}


def start(config: TrainingConfig) -> Compressor:
    """Load or build the compressor that is trained, on the CPU. Of a compressor of another method the model is used.

    Raises
    ------
    CheckpointError
        If there is nothing to start from at ``config.init``.
    InputError
        If a setting cannot be used, or tokenizer and model do not fit.
    """
    import torch

    from ctxdocs.checkpoints import load_compressor, method_of, new_compressor

    torch.manual_seed(config.seed)
    dtype = "float32" if config.train == "full" else config.precision
    where = {"device": "cpu", "dtype": dtype, "attn_implementation": config.attention}
    if (values := _configuration(config.init)) is not None:
        compressor = _from_configuration(values, config)
    elif (method := method_of(config.init)) is None:
        compressor = new_compressor(config.init, config.method, **where, **_new_settings(config))
    elif method == config.method:
        compressor = load_compressor(config.init, method, **where, **config.settings)
    else:
        compressor = _onto_base(load_compressor(config.init, method, **where), config)
    if config.tokenizer:
        compressor.tokenizer = load_tokenizer(config.tokenizer)
    check_tokenizer(compressor)
    return compressor


def choose_trainable(compressor: Compressor, config: TrainingConfig) -> None:
    """Turn gradients on where ``config.train`` says, and put a LoRA beside the model's layers if it says so.

    What trains is kept in float32, whatever the precision.

    Raises
    ------
    InputError
        If nothing would train.
    """
    import torch

    compressor.requires_grad_(config.train == "full")
    for parameter in compressor.own_parameters().values():
        parameter.requires_grad_(True)
    if config.train == "lora":
        add_lora(compressor, config.lora)
    trained = [parameter for parameter in compressor.parameters() if parameter.requires_grad]
    if not trained:
        raise InputError(f"this {compressor.method} compressor has no parameters of its own", "--set train=full")
    for parameter in trained:
        parameter.data = parameter.data.to(torch.float32)


def check_tokenizer(compressor: Compressor) -> None:
    """Raise ``InputError`` if there is no tokenizer, or it knows tokens that the model does not."""
    tokenizer, rows = compressor.tokenizer, compressor.backbone.vocabulary
    if tokenizer is None:
        raise InputError("there is no tokenizer to read the data with", "--set tokenizer=FOLDER")
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise InputError(
            f"the tokenizer has ids up to {highest}, the model a table of {rows} tokens",
            "they do not belong together: take the model's own tokenizer",
        )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder or hub name, or of the bundled model.

    Raises
    ------
    CheckpointError
        If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(bundled_path() if name == BUNDLED else name, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds; each means that there is no tokenizer to be had
        raise CheckpointError(f"no tokenizer could be loaded from {name}: {str(error).splitlines()[0]}") from error


def _new_settings(config: TrainingConfig) -> dict[str, Any]:
    return {**_NEEDED.get(config.method, {}), **config.settings}


def _onto_base(other: Compressor, config: TrainingConfig) -> Compressor:
    """Put the method onto the language model of another method's compressor."""
    from ctxdocs.checkpoints import checked_settings

    for name in other.format_settings:
        if name in vars(other.model.config):
            delattr(other.model.config, name)
    cls = compressor_class(config.method)
    settings = checked_settings(cls, _new_settings(config))
    return cls.from_base(other.model, other.tokenizer, prompt_format=other.prompt_format, **settings)


def _configuration(init: Any) -> dict[str, Any] | None:
    """Return a model's configuration, where ``init`` is one or names a file that holds one."""
    if isinstance(init, Mapping):
        return dict(init)
    path = Path(str(init)).expanduser()
    return _read(path) if path.suffix in _CONFIGURATIONS and path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            import yaml

            values = yaml.safe_load(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # yaml's own kinds
        raise CheckpointError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no configuration of a model")
    return values


def _from_configuration(values: dict[str, Any], config: TrainingConfig) -> Compressor:
    """Build an untrained model; size of the vocabulary and special tokens are the tokenizer's unless given."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ctxdocs.checkpoints import checked_settings

    if not config.tokenizer:
        raise InputError("a model built from a configuration has no tokenizer", "--set tokenizer=FOLDER, or bundled")
    tokenizer = load_tokenizer(config.tokenizer)
    known = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    given = {"vocab_size": max(tokenizer.get_vocab().values()) + 1, **known, **values}
    kernel = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        model_config = AutoConfig.for_model(**given)
        model = AutoModelForCausalLM.from_config(model_config, **kernel)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"no model can be built from the configuration: {error}", "init needs a model_type") from error
    cls = compressor_class(config.method)
    return cls.from_base(model, tokenizer, **checked_settings(cls, _new_settings(config)))
