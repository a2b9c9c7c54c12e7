"""How much one reads to follow LoRA: lines that run, functions entered, and the reading path.

python -m benchmarks.reading [--json FILE]

On a two-layer MLP, LoRA on both layers. "lines" are the distinct lines of lora/ that run in
lora.LoRAConfig, lora.inject, a forward and a backward; "span" are all lines of the functions that
they enter, docstrings included. "functions" are those that one layer's forward enters with kernels
off, without Python's own (__getattr__, comprehensions). "path" are the lines of the five stops.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora
import lora.kernels
from benchmarks.machine import write

PACKAGE = Path(lora.__file__).parent
STOPS = (
    "lora.layers:View",
    "lora.adapter:Adapter",
    "lora.methods.lora:LoRA",
    "lora.methods._lowrank:LowRank",
    "lora.wrappers:AdaptedLayer",
    "lora.injection:wrap",
)
"""The reading path, in order."""


class Trace:
    """The lines of lora/ that run inside, and the functions that they enter."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()
        self.functions: set[tuple[str, str]] = set()

    def run(self, call: Callable[[], Any]) -> Any:
        """What the call returns. Backward runs in a thread of its own on a GPU."""
        threading.settrace(self._enter)
        sys.settrace(self._enter)
        try:
            return call()
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return None
        self.functions.add((code.co_filename, code.co_qualname))
        return self._line

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line

    def span(self) -> int:
        """The lines of the functions that were entered."""
        lines: set[tuple[str, int]] = set()
        for file in {file for file, _ in self.functions}:
            entered = {name for path, name in self.functions if path == file}
            tree = ast.parse(Path(file).read_text(encoding="utf-8"))
            for name, node in _definitions(tree, ""):
                if name in entered:
                    lines |= {(file, n) for n in range(node.lineno, (node.end_lineno or 0) + 1)}
        return len(lines)


def _definitions(node: ast.AST, prefix: str) -> list[tuple[str, ast.FunctionDef]]:
    """Every function under a node, by its qualified name."""
    found: list[tuple[str, ast.FunctionDef]] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            found.append((prefix + child.name, child))
            found += _definitions(child, f"{prefix}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            found += _definitions(child, f"{prefix}{child.name}.")
        else:
            found += _definitions(child, prefix)
    return found


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def measure() -> dict[str, Any]:
    """The figures, by name."""
    lora.inject(model(), lora.LoRAConfig())  # imports what loads on first use
    whole, mlp, x = Trace(), model(), torch.randn(4, 8)
    config = whole.run(lambda: lora.LoRAConfig(r=2))
    whole.run(lambda: lora.inject(mlp, config))
    y = whole.run(lambda: mlp(x))
    whole.run(lambda: y.sum().backward())
    forward = Trace()
    with lora.kernels.off():
        forward.run(lambda: mlp[0](x))
    names = sorted({name for _, name in forward.functions if "<" not in name and "__" not in name})
    path = {}
    for stop in STOPS:
        module, _, name = stop.partition(":")
        source = inspect.getsource(getattr(importlib.import_module(module), name))
        path[stop] = len(source.rstrip().split("\n"))
    return {
        "lines": len(whole.lines),
        "span": whole.span(),
        "files": len({file for file, _ in whole.lines}),
        "functions": names,
        "path": path,
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    figures = measure()
    print(f"lines that run          {figures['lines']} in {figures['files']} files")
    print(f"lines of their functions {figures['span']}")
    print(f"functions of a forward  {len(figures['functions'])}: {', '.join(figures['functions'])}")
    print(f"reading path            {sum(figures['path'].values())} lines")
    for stop, lines in figures["path"].items():
        print(f"  {stop:<32} {lines}")
    if given.json:
        write(given.json, figures)


if __name__ == "__main__":
    main()
