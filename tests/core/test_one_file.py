"""examples/lora_in_one_file.py computes what the library computes, and its files are PEFT's."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import Tensor, nn

import lora
from examples import lora_in_one_file

SCRIPT = ROOT / "examples" / "lora_in_one_file.py"
TARGETS = ["first", "last"]


class Network(nn.Module):
    """Two layers that are adapted and one between them that is not, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10)
        self.middle = nn.Linear(10, 10)
        self.last = nn.Linear(10, 4, bias=False)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.middle(torch.tanh(self.first(x)))
        output: Tensor = self.last(torch.tanh(hidden))
        return output


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def adapted(base: nn.Module) -> nn.Module:
    """The base with the file's LoRA on two layers, away from its start."""
    model = copy.deepcopy(base)
    lora_in_one_file.inject(model, TARGETS, r=3, alpha=6)
    with torch.no_grad():
        for layer in lora_in_one_file.lora_layers(model).values():
            layer.lora_B.normal_()
    return model


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(5, 7, 6, generator=generator, dtype=torch.float64)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """In the order of the layers, A before B."""
    return [p for p in model.parameters() if p.requires_grad]


def test_only_a_and_b_are_trainable(adapted: nn.Module) -> None:
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names == ["first.lora_A", "first.lora_B", "last.lora_A", "last.lora_B"]


def test_it_starts_from_the_base(base: nn.Module) -> None:
    expected = base(inputs())
    lora_in_one_file.inject(base, TARGETS, r=3, alpha=6)
    assert torch.equal(base(inputs()), expected)


def test_a_name_that_matches_nothing_is_an_error(base: nn.Module) -> None:
    with pytest.raises(ValueError, match="no nn.Linear is named middel"):
        lora_in_one_file.inject(base, ["middel"], r=3, alpha=6)


def test_forward_and_gradients_are_the_librarys(base: nn.Module, adapted: nn.Module) -> None:
    config = lora.LoRAConfig(r=3, lora_alpha=6, target_modules=tuple(TARGETS))
    lora.inject(base, config)
    with torch.no_grad():
        for parameter, source in zip(trainable(base), trainable(adapted), strict=True):
            parameter.copy_(source)

    x, y = inputs().requires_grad_(), inputs().requires_grad_()
    expected, output = base(x), adapted(y)
    torch.testing.assert_close(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    for parameter, source in zip(trainable(adapted), trainable(base), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0.01
        torch.testing.assert_close(parameter.grad, source.grad)


def test_the_library_loads_its_file(base: nn.Module, adapted: nn.Module, tmp_path: Path) -> None:
    lora_in_one_file.save(adapted, tmp_path)
    lora.load(base, tmp_path)
    torch.testing.assert_close(base(inputs()), adapted(inputs()))


def test_peft_loads_its_file(base: nn.Module, adapted: nn.Module, tmp_path: Path) -> None:
    lora_in_one_file.save(adapted, tmp_path)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(model(inputs()), adapted(inputs()))


def test_its_keys_and_shapes_are_those_that_the_library_saves(
    base: nn.Module, adapted: nn.Module, tmp_path: Path
) -> None:
    lora_in_one_file.save(adapted, tmp_path / "file")
    lora.load(base, tmp_path / "file")
    lora.save(base, tmp_path / "library")
    tensors = [
        load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("file", "library")
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[0].items():
        assert torch.equal(tensor, tensors[1][key])
    stated = json.loads((tmp_path / "library" / "adapter_config.json").read_text())
    for key, value in json.loads((tmp_path / "file" / "adapter_config.json").read_text()).items():
        assert stated[key] == value


def test_merged_equals_adapted(adapted: nn.Module) -> None:
    expected = adapted(inputs())
    lora_in_one_file.merge(adapted)
    assert not lora_in_one_file.lora_layers(adapted)
    assert type(adapted.first) is nn.Linear
    torch.testing.assert_close(adapted(inputs()), expected)


@pytest.mark.slow
def test_it_trains_and_says_that_merged_equals_adapted(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(SCRIPT), str(tmp_path / "adapter")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    losses = re.search(r"([0-9.]+) before, ([0-9.]+) after", printed)
    assert losses is not None
    before, after = map(float, losses.groups())
    assert after < before / 100
    assert "the merged model equals the adapted one" in printed
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_it_is_one_sitting() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    assert "import lora" not in text
    assert "from lora" not in text
