"""Every public name is typed: mypy reads a user's script as strictly as it reads this package."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

import lora

PASSES = """\
import torch
from torch import Tensor, nn

import lora

CONFIGS: list[lora.AdapterConfig] = [
    lora.LoRAConfig(r=8, lora_alpha=16.0), lora.DoRAConfig(r=8), lora.AdaLoRAConfig(init_r=8),
    lora.VeRAConfig(r=64), lora.HiRAConfig(r=4), lora.IA3Config(target_modules=("0", "1")),
    lora.TokensConfig(token_indices=(1, 2)),
]
SELECTED = (lora.BitFitConfig(), lora.HeadConfig(), lora.TopKConfig(k=1), lora.LNTuningConfig())
FULL: lora.FullConfig = lora.FullConfig()
CALLBACK: lora.AdapterCallback = lora.AdapterCallback("default")

def tune(model: nn.Module, x: Tensor) -> float | None:
    report: lora.Report = lora.inject(model, lora.LoRAConfig(target_modules="all-linear"), seed=1)
    lora.init(model, seed=2)
    with lora.disabled(model):
        base: Tensor = model(x)
    folder = lora.save(model, "adapter/") / "adapter_config.json"
    try:
        report = lora.load(model, folder.parent, name="other", trainable=True)
    except (lora.CheckpointError, lora.TargetError, lora.ConfigError) as error:
        problem: lora.LoraError = error
    lora.activate(model, "other")
    certificate: lora.Certificate = lora.merge(model, untie=True, probe=x)
    lora.restore(model)
    lora.eject(model)
    print(report.trainable, base.shape, lora.__version__, isinstance(problem, lora.MergeError))
    return certificate.largest_difference

method: type[lora.Adapter] | type[lora.Selection]
for name, each in lora.METHODS.items():
    print(name, each.Config, lora.testing.check_method(each), lora.errors.command("lora"))
packed: lora.nf4.NF4 = lora.nf4.quantize(torch.zeros(64), block_size=64)
"""
FAILS = """\
import lora

lora.DorAConfig(r=8)
lora.DoRAConfig(r="8")
"""


def checked_names() -> dict[str, str]:
    """The names that lora/__init__.py imports for the type checker, each with its module."""
    names = {}
    for node in ast.walk(ast.parse((ROOT / "lora/__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lora"):
            for alias in node.names:
                assert alias.name == alias.asname, "without `as` mypy does not export a name"
                names[alias.name] = node.module
    return names


def test_mypy_knows_every_public_name(tmp_path: Path) -> None:
    passes, fails = tmp_path / "passes.py", tmp_path / "fails.py"
    passes.write_text(PASSES)
    fails.write_text(FAILS)
    # In the repository, so that mypy has read torch and this package before: `make types`.
    command = [sys.executable, "-m", "mypy", "--strict", "--no-pretty", passes, fails]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    problems = re.findall(r"(\w+)\.py:(\d+): error: (.*)", ran.stdout)
    lines = [(file, line) for file, line, _ in problems]
    assert lines == [("fails", "3"), ("fails", "4")], ran.stdout + ran.stderr
    assert 'no attribute "DorAConfig"' in problems[0][2]
    assert '"r" to "DoRAConfig" has incompatible type "str"; expected "int"' in problems[1][2]
    assert "(checked 2 source files)" in ran.stdout


def test_the_users_script_uses_the_public_names() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(PASSES))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "lora"
    }
    assert used == set(dir(lora))


def test_the_type_checker_and_python_find_the_same_names() -> None:
    checked = checked_names()
    assert sorted([*checked, "__version__"]) == dir(lora)
    for name, module in checked.items():
        imported = importlib.import_module(module)
        expected = getattr(imported, name, None) or importlib.import_module(f"lora.{name}")
        assert getattr(lora, name) is expected


def test_every_method_of_the_package_has_its_config_among_the_names() -> None:
    own = [m.Config for m in lora.METHODS.values() if m.__module__.startswith("lora.")]
    assert len(own) >= 12
    for config in own:
        assert getattr(lora, config.__name__) is config
