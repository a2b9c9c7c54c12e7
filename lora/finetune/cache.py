"""Finds the folder for files that can be made or downloaded again: folder()."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def folder() -> Path:
    """Returns $LORA_CACHE, or the user's cache folder."""
    given = os.environ.get("LORA_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("lora-from-scratch")
