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

# A module may import from the rungs above its own, and from its own rung. A name covers what lies
# below it, unless that is named too: "finetune" is all of the folder but "finetune.data".
LADDER = [
    {"errors"},
    {"files", "patterns", "declared"},
    {"layers", "settings"},
    {"kernels"},
    {"nf4"},
    {"method"},
    {"adapter"},
    {"methods", "wrappers"},
    {"targets"},
    {"inventory", "ties"},
    {"training"},
    {"report"},
    {"injection", "merging"},
    {"foreign", "card", "vocabulary"},
    {"adapter_config", "adapter_file", "identity"},
    {"checkpoint"},
    {"testing", "interop"},
    {"finetune.cache"},
    {"finetune.demo"},
    {"finetune.data"},
    {"finetune"},
]
PACKAGE = ROOT / "lora"
# What imports transformers; the core knows its classes by name, and testing builds a Conv1D.
TRANSFORMERS = {
    "foreign", "testing._toys", "interop.gguf_base", "interop.llama_cpp", "interop.pretrained",
    "interop.trainer", "finetune.generate", "finetune.demo.bases", "finetune.memory",
    "finetune.models", "finetune.quantized", "finetune.environment", "finetune.weights",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, less `lora.`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and parts != ("__main__",):
            found[".".join(parts)] = path
    return found


def rung(module: str) -> int:
    """The number of a module's rung: that of the longest name that covers it."""
    names = {name: number for number, rung in enumerate(LADDER) for name in rung}
    covering = [name for name in names if f"{module}.".startswith(f"{name}.")]
    assert covering, f"lora.{module} is on no rung of the ladder"
    return names[max(covering, key=len)]


def imports(path: Path) -> list[str]:
    """Every name imported anywhere in the file, within functions too: module, or module.name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    known = modules()
    for name in imports(known[module]):
        parts = name.split(".")
        other = next((o for o in (".".join(parts[1:]), ".".join(parts[1:-1])) if o in known), None)
        if parts[0] == "lora" and other is not None:
            assert rung(other) <= rung(module), f"lora.{module} imports {name}"
        assert parts[0] != "peft", f"lora.{module} imports peft"
        if parts[0] == "transformers":
            assert module in TRANSFORMERS, f"lora.{module} imports transformers"
        if rung(module) < rung("testing") and parts[0] not in sys.stdlib_module_names:
            # torch itself needs filelock, so that it is always there.
            allowed = ["torch", "safetensors", "regex", "lora", "transformers", "filelock"]
            if module.startswith("kernels.triton."):  # which only a GPU loads
                allowed.append("triton")
            assert parts[0] in allowed, name


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
    code = "from lora.finetune.cli import main; main(['--help'])\n"
    code += "import sys; assert 'torch' not in sys.modules"
    assert "train" in run(code)


def test_a_verbs_help_needs_no_transformers() -> None:
    code = """
import sys
from lora.finetune.cli import main
for verb in ("train", "convert"):
    try:
        main([verb, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert "transformers" not in sys.modules, verb
"""
    shown = run(code)
    assert "--lora-alpha" in shown
    assert "--merged" in shown


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
