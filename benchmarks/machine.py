"""What every result file says of the machine and of the code, and how it is written."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from lora.files import write_whole
from lora.finetune.environment import environment

RESULTS = Path(__file__).parent / "results"


def write(path: Path, result: dict[str, Any]) -> None:
    """The result with the machine and the commit beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    git = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty"]
    code = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    whole = {"machine": {**environment(), "commit": code}, **result}
    write_whole(path, json.dumps(whole, indent=2).encode() + b"\n")
    print(f"written: {path}")
