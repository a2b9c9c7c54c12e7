"""Settings are held to the types that their fields declare, however a file writes annotations."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
import torch
from conftest import distilbert, tokens
from torch import nn

import lora
from lora.declared import fitted, is_list, words
from lora.finetune.config import parse_run
from lora.method import METHODS
from lora.testing import perturb

MINE = '''
from dataclasses import dataclass, field
from typing import Optional, Union
from lora.adapter import Adapter
from lora.settings import AdapterConfig

@dataclass(frozen=True, kw_only=True)
class MineConfig(AdapterConfig):
    r: int = 4
    """Rank."""
    lora_alpha: float = 8.0
    """Scale."""
    gains: tuple[float, ...] = (1.0, 2.0)
    """Per block."""
    per_layer: dict[str, float] = field(default_factory=dict)
    """Of single layers."""
    only: Union[str, tuple[str, ...]] = ()
    """Names."""
    remark: Optional[str] = None
    """A remark."""
    wide: bool = False
    """A switch."""

class Mine(Adapter):
    name, paper, Config, peft_type = "mine_test", "none", MineConfig, "MINE_TEST"
    additive = True

    def __init__(self, view, config, module):
        super().__init__(view, config, module)
        self.mine_A = self.new(view, config.r, view.in_features)
        self.mine_B = self.new(view, view.out_features, config.r)

    @classmethod
    def size(cls, view, config, module):
        return config.r * (view.in_features + view.out_features)

    def fill(self, view, generator):
        self.mine_A.normal_(generator=generator("A"))
        self.mine_B.zero_()

    def merged(self, W, b):
        return W + self.config.lora_alpha / self.config.r * (self.mine_B @ self.mine_A), b
'''


@pytest.fixture(params=["", "from __future__ import annotations\n"], ids=["plain", "postponed"])
def mine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "mine_test.py"
    path.write_text(request.param + MINE)
    spec = importlib.util.spec_from_file_location("mine_test", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["mine_test"] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["mine_test"]
        METHODS.pop("mine_test", None)


def test_a_method_of_ones_own_is_saved_and_read_back(mine: Any, tmp_path: Path) -> None:
    """8.0 is written as 8, as PEFT writes it, and read back as the number that it is."""
    model = distilbert()
    config = mine.MineConfig(
        target_modules=("q_lin",), gains=[3, 4], per_layer={"q_lin": 2}, only=["a"]
    )
    lora.inject(model, config)
    perturb(model)
    lora.save(model, tmp_path / "a")
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["lora_alpha"] == 8
    again = distilbert()
    report = lora.load(again, tmp_path / "a")
    assert report.plan.config == config
    assert type(report.plan.config.lora_alpha) is float
    assert report.plan.config.gains == (3.0, 4.0)
    assert report.plan.config.only == ("a",)
    with torch.no_grad():
        assert torch.equal(model.eval()(tokens()).logits, again.eval()(tokens()).logits)
    # the spelling of a number is no edit, another number is
    text = (tmp_path / "a/adapter_config.json").read_text()
    assert '"lora_alpha": 8,' in text
    (tmp_path / "a/adapter_config.json").write_text(
        text.replace('"lora_alpha": 8,', '"lora_alpha": 8.0,')
    )
    lora.load(distilbert(), tmp_path / "a")
    (tmp_path / "a/adapter_config.json").write_text(
        text.replace('"lora_alpha": 8,', '"lora_alpha": 9,')
    )
    with pytest.raises(lora.CheckpointError, match="edited"):
        lora.load(distilbert(), tmp_path / "a")


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("lora_alpha", "8", "a number, found '8'"),
        ("lora_alpha", float("nan"), "a number, found nan"),
        ("r", 4.0, "a whole number, found 4.0"),
        ("r", True, "a whole number, found True"),
        ("wide", "none", "true or false, found 'none'"),
        ("wide", [False], "true or false, found \\[False\\]"),
        ("gains", 3, "a list of numbers, found 3"),
        ("gains", ["3"], "a list of numbers, found \\['3'\\]"),
        ("per_layer", {"a": "b"}, "a table of numbers by name, found"),
        ("remark", 3, "a text, found 3"),
    ],
)
def test_a_setting_of_another_type_is_named(
    mine: Any, setting: str, value: object, wanted: str, tmp_path: Path
) -> None:
    with pytest.raises(lora.ConfigError, match=f"{setting} must be {wanted}"):
        mine.MineConfig(**{setting: value})
    model = distilbert()
    lora.inject(model, mine.MineConfig(target_modules=("q_lin",)))
    lora.save(model, tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))
    with pytest.raises(lora.CheckpointError, match=f"{setting} must be {wanted}"):
        lora.load(distilbert(), tmp_path / "a")


def test_the_command_line_takes_it_however_it_is_written(mine: Any) -> None:
    given = ["--method", "mine_test", "--lora-alpha", "9", "--only", "q_lin", "--gains", "1", "2"]
    found = parse_run(given)
    assert found.settings == mine.MineConfig(lora_alpha=9.0, only=("q_lin",), gains=(1.0, 2.0))
    assert parse_run([*given, "--gains", "3"]).settings.gains == (1.0, 2.0, 3.0)


def test_a_field_that_is_a_flag_of_every_run_is_named(
    mine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import make_dataclass

    taken = make_dataclass(
        "Taken", [("note", str, "")], bases=(mine.MineConfig,), frozen=True, kw_only=True
    )
    monkeypatch.setattr(mine.Mine, "Config", taken)
    with pytest.raises(lora.ConfigError, match="Taken has a field note, .* Rename the field"):
        parse_run(["--method", "mine_test"])


@pytest.mark.parametrize("value", ["none", [False], 1, "false", {}])
def test_a_switch_that_tells_methods_apart_is_true_or_false(value: object, tmp_path: Path) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(target_modules=("q_lin",)))
    lora.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": value}))
    with pytest.raises(lora.CheckpointError, match="use_dora must be true or false, found"):
        lora.load(distilbert(), tmp_path)


@pytest.mark.parametrize("value", [1e300, 1e7, -1, 0, True, "8", None, [8]])
@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_a_scale_that_would_leave_float32_is_refused(
    key: str, value: object, tmp_path: Path
) -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(target_modules=("q_lin",)))
    lora.save(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    asked = value if key == "lora_alpha" else {"q_lin": value}
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: asked}))
    with pytest.raises(lora.CheckpointError, match=f"{key}.* must be a "):
        lora.load(distilbert(), tmp_path)


def test_types_of_every_setting_are_read_strictly(tmp_path: Path) -> None:
    """Each field of each method, in a file that gives it a value of no type that it can have."""
    from lora.declared import declared

    class Odd:
        pass

    tried = 0
    for method in METHODS.values():
        for name, kind in declared(method.Config).items():
            with pytest.raises(lora.ConfigError, match=f"{name} must be "):
                method.Config(**{name: Odd()})
            with pytest.raises(TypeError):
                fitted(Odd(), kind)
            tried += 1
    assert tried >= 76


def test_what_a_type_takes() -> None:
    assert fitted([1, 2], tuple[float, ...]) == (1.0, 2.0)
    assert fitted({"b", "a"}, tuple[str, ...]) == ("a", "b")
    assert fitted((1, "a"), tuple[int, str]) == (1, "a")
    assert fitted(8, int | float) == 8
    assert type(fitted(8, int | float)) is int
    assert type(fitted(8, float | None)) is float
    assert fitted(None, float | None) is None
    assert fitted("a", Literal["a", "b"]) == "a"
    assert fitted({"a": [1]}, dict[str, list[int]] | tuple[int, ...]) == {"a": [1]}
    assert fitted(nn.ReLU, Any) is nn.ReLU
    for value, kind in (
        (1, Literal[True]), ((1, 2, 3), tuple[int, int]), ("ab", tuple[str, ...]),
        ({1: 2}, dict[str, int]), (10**400, float), (True, float), (1, bool), (b"a", str),
    ):  # fmt: skip
        with pytest.raises(TypeError):
            fitted(value, kind)
    assert is_list(str | tuple[str, ...])
    assert not is_list(dict[str, list[int]])
    assert words(dict[str, list[bool]]) == "a table of lists of values true or false by name"
    assert words(str | tuple[str, ...] | None) == "a text or a list of texts"


def test_an_annotation_that_names_nothing_is_named() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Lost(lora.AdapterConfig):
        size: Nowhere = 3  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(lora.ConfigError, match="Lost: an annotation cannot be read.*Nowhere"):
        Lost()
