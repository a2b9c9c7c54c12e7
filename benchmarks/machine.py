"""What every result file says of the machine, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora.checkpoint import write_whole
from lora.run import environment

RESULTS = Path(__file__).parent / "results"


def write(path: Path, result: dict[str, Any]) -> None:
    """The result with the machine beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"machine": environment(), **result}, indent=2).encode() + b"\n")
    print(f"written: {path}")
