"""Cases of ``beacon``."""

from .gist import run

__all__ = ["run"]
