"""Imports go one way, the core is light, and no module shadows a public function."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import lora

# Each room may import from those above it, and from its own line.
LADDER = [
    {"errors", "flags"},
    {"files", "patterns", "scratch", "declared", "rendering"},
    {"layers"},
    {"dropout"},
    {"fused"},
    {"nf4", "siblings"},
    {"adapter"},
    {"methods"},
    {"targets"},
    {"ties"},
    {"injection", "foreign", "card", "vocabulary"},
    {"checkpoint"},
    {"testing"},
    {"documents", "basefile"},
    {
        "config",
        "convert",
        "demo",
        "models",
        "rows",
        "headers",
        "columns",
        "data",
        "losses",
        "metrics",
        "trackers",
        "distributed",
    },
    {"conversations", "export", "harness", "records"},
    {"tokens", "state"},
    {"templates"},
    {"inputs", "evaluate"},
    {"train", "generate"},
    {"run"},
    {"source"},
    {"trained", "trainer", "plan"},
    {"compare", "plots", "chat"},
    {"cli"},
]
CORE = {
    "errors",
    "files",
    "ties",
    "card",
    "patterns",
    "layers",
    "scratch",
    "declared",
    "dropout",
    "fused",
    "nf4",
    "siblings",
    "adapter",
    "methods",
    "targets",
    "injection",
    "foreign",
    "vocabulary",
    "checkpoint",
    "testing",
}
# foreign knows the modules' old names, run records its version, testing builds a Conv1D
TRANSFORMERS = {"foreign", "generate", "models", "run", "testing", "trainer"}


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "lora").rglob("*.py")):
        room = path.relative_to(ROOT / "lora").parts[0].removesuffix(".py")
        if room not in ("__init__", "__main__"):
            found.setdefault(room, []).append(path)
    return found


def imports(path: Path) -> list[str]:
    """Every module imported anywhere in the file, those within functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def test_every_room_has_its_place() -> None:
    assert set(rooms()) == set().union(*LADDER)


@pytest.mark.parametrize("room", sorted(set().union(*LADDER)))
def test_imports_go_one_way(room: str) -> None:
    place = next(i for i, step in enumerate(LADDER) if room in step)
    allowed = set().union(*LADDER[: place + 1])
    known = set().union(*LADDER)
    for path in rooms()[room]:
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "lora" and len(parts) > 1 and parts[1] in known:
                assert parts[1] in allowed, f"{path.name} imports {name}"
            assert parts[0] != "peft", f"{path.name} imports peft"
            if parts[0] == "transformers":
                assert room in TRANSFORMERS, f"{path.name} imports transformers"
            if room in CORE and parts[0] not in sys.stdlib_module_names:
                known_here = ("torch", "safetensors", "regex", "lora", "transformers")
                assert parts[0] in known_here, name


def test_no_module_bears_a_public_functions_name() -> None:
    modules = {module.name for module in pkgutil.iter_modules(lora.__path__)}
    assert not modules & (set(dir(lora)) - {"errors", "nf4", "testing"})


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.strip()


def test_import_lora_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'rich', 'tyro', 'numpy'}"
    assert run(f"import lora, sys; print({heavy} & set(sys.modules))") == "set()"


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from lora.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    )
    assert "train" in run(code)


@pytest.mark.parametrize(("verb", "flag"), [("train", "--lora-alpha"), ("convert", "--merged")])
def test_a_verbs_help_needs_no_transformers(verb: str, flag: str) -> None:
    code = f"""
import sys
from lora.cli import main
try:
    main(["{verb}", "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert "transformers" not in sys.modules
"""
    assert flag in run(code)


def test_the_core_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    """Inject, train, save, load and merge; numpy is there, which safetensors brings."""
    code = f"""
import sys
for name in ("transformers", "peft", "rich", "tyro", "sklearn", "scipy"):
    sys.modules[name] = None
import warnings; warnings.filterwarnings("ignore")
import torch, lora
from torch import nn
def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
model = build()
lora.inject(model, lora.LoRAConfig(r=2, target_modules="all-linear"))
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
for _ in range(3):
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()
lora.save(model, {str(tmp_path)!r})
other = build()
lora.load(other, {str(tmp_path)!r})
x = torch.ones(1, 4)
assert torch.equal(model(x), other(x)) and not torch.equal(model(x), build()(x))
lora.merge(other); lora.restore(other); lora.merge(other); lora.eject(other)
assert torch.allclose(other(x), model(x), atol=1e-5)
print("done")
"""
    assert run(code) == "done"


def test_the_public_names_are_all_there() -> None:
    for name in dir(lora):
        assert getattr(lora, name) is not None
    for name in ("LoRAConfig", "FullConfig"):
        assert getattr(lora, name).__name__ == name
    with pytest.raises(AttributeError):
        _ = lora.DoesNotExistConfig
