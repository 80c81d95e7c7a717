"""Cases of ``ultragist``."""

from .gist import run

__all__ = ["run"]
