"""The notebook's cells run in order: on the byte model, and without what would be downloaded."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples" / "on_a_gpu.ipynb"
FETCHED = ("!pip", "!lora data fetch", "%cd")


def cells() -> list[str]:
    """The code of the notebook."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def test_it_holds_no_output() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    assert len(cells()) > 5


@pytest.mark.slow
def test_its_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    names: dict[str, Any] = {"__name__": "notebook"}
    printed = ""
    for cell in cells():
        cell = cell.replace('"smollm2"', '"demo-lm-tiny"')
        lines = [line for line in cell.splitlines() if not line.startswith(FETCHED)]
        if not (lines and lines[0].startswith("!")):
            exec(compile("\n".join(lines), str(NOTEBOOK), "exec"), names)
            continue
        for line in lines:  # a notebook puts the value of a name in the place of {name}
            line = re.sub(r"\{(\w+)\}", lambda match: str(names[match[1]]), line)
            command = re.sub(r"^!lora", f"'{sys.executable}' -m lora", line)
            done = subprocess.run(
                command, shell=True, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            printed += done.stdout
    assert "time    at least" in printed
    assert (tmp_path / "runs" / "notebook-merged" / "model.safetensors").is_file()
    loss = re.search(r"loss ([0-9.]+)", capsys.readouterr().out)
    assert loss is not None
    assert float(loss[1]) < 2
