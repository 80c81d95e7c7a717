"""What a server's endpoints share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctxdocs.integrations.server.batching import Engine
    from ctxdocs.integrations.server.metrics import Metrics
    from ctxdocs.integrations.server.settings import Settings
    from ctxdocs.integrations.server.uploads import Uploads
    from ctxdocs.library import Library


@dataclass
class State:
    """A running server.

    Parameters
    ----------
    library : Library
        What is served.
    settings : Settings
        What is allowed.
    engine : Engine
        The thread that has the model.
    metrics : Metrics
        What is counted.
    uploads : Uploads
        The one who writes to the library.
    """

    library: Library
    settings: Settings
    engine: Engine
    metrics: Metrics
    uploads: Uploads
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        compressor = self.library.store.manifest.compressor
        name = compressor["name_or_path"]
        return self.settings.name or (PurePath(name).name if name else "") or compressor["method"]
