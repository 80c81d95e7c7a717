"""Training: any method, by configuration; see ``docs/training.md``. Only the command line imports it."""

from ctxdocs.training.config import TrainingConfig
from ctxdocs.training.config_files import dump_config, load_config, recipes
from ctxdocs.training.run import TrainingResult, train

__all__ = ["TrainingConfig", "TrainingResult", "dump_config", "load_config", "recipes", "train"]
