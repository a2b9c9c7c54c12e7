"""Returns the user's cache folder: folder()."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def folder() -> Path:
    """Returns $LORA_CACHE, or the user's cache folder."""
    path = os.environ.get("LORA_CACHE")
    return Path(path) if path else platformdirs.user_cache_path("lora-from-scratch")
