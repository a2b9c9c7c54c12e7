"""Clauses on files: a save loads to the same bits, and a broken file is refused."""

from __future__ import annotations

import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lora.adapter_config import read_config
from lora.adapter_file import CONFIG, WEIGHTS, find_folder, settings_in, whole_key
from lora.checkpoint import load, save
from lora.errors import CheckpointError
from lora.injection import inject
from lora.inventory import stored_tensors, trained_parameters
from lora.method import Method
from lora.settings import MethodConfig
from lora.testing._requirements import (
    require,
    require_near,
    require_raise,
    require_same,
    snapshot,
    unchanged,
)
from lora.testing._toys import Case, Toy, injected_toy, input_of, trains_base


def saved_and_loaded_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The file holds only the adapter's tensors, and loads to the same bits and output."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    saved = stored_tensors(model, "default")
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        stored = safetensors.torch.load_file(Path(folder) / WEIGHTS)
        require(len(stored) == len(saved), "the file holds other tensors than the adapter's")
        for key, parameter in saved.items():
            require_same(stored[whole_key(key)], parameter.detach().cpu(), f"stored {key}")
        other = Toy(case)
        load(other, folder)
    other.eval()
    for key, parameter in stored_tensors(other, "default").items():
        require_same(parameter.detach(), saved[key].detach(), f"loaded {key}")
    exact = all(
        saved[key].shape == p.shape for key, p in trained_parameters(model, "default").items()
    )
    if exact:
        require_same(other(x), model(x), "output of the loaded adapter")
    else:  # saved in another form, as pissa is as a LoRA of rank 2r: sums have another order
        require_near(other(x), model(x), "output of the loaded adapter")


def config_and_json(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A load from adapter_config.json gives the settings that were saved."""
    model = injected_toy(config, case)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        settings = settings_in(find_folder(folder))
        read = read_config(method, settings, Path(folder))
        other = Toy(case)
        inject(other, read)
        with tempfile.TemporaryDirectory() as second:
            save(other, second)
            require(settings_in(Path(second)) == settings, "config -> file -> config differs")


def a_failed_load_changes_nothing(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Seven kinds of damaged file, ours and PEFT's, raise CheckpointError. The model is
    unchanged."""
    model = injected_toy(config, case, moved=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        path = Path(folder) / WEIGHTS
        # From bytes: load_file would map the file into memory, and it is rewritten below.
        whole = safetensors.torch.load(path.read_bytes())
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        load(Toy(case), folder, name="other")  # the whole file loads, so only the damage can fail
        last = list(whole)[-1]
        broken: dict[str, dict[str, Tensor] | bytes] = {
            "truncated": path.read_bytes()[:-8],
            "empty": b"",
            "a tensor missing": {k: t for k, t in whole.items() if k != last},
            "a tensor too many": whole | {"base_model.model.third.weight": torch.zeros(2)},
            "a tensor misshapen": whole | {last: torch.zeros(3, 5)},
            "not a number": whole | {last: torch.full_like(whole[last], torch.nan)},
            "integers": whole | {last: torch.zeros(whole[last].shape, dtype=torch.int64)},
        }
        # One model without an adapter and one with it serve all loads, since none may change them.
        models: list[Toy] = [Toy(case)]
        if not trains_base(model):
            models.append(injected_toy(config, case))
        before = [snapshot(other) for other in models]
        for damage, content in broken.items():
            for mark in (metadata, None):  # a file that we wrote, and one that PEFT wrote
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    path.write_bytes(safetensors.torch.save(content, mark))
                for other, as_before in zip(models, before, strict=True):
                    with require_raise(CheckpointError, damage):
                        load(other, folder, name="other")
                    require(
                        unchanged(as_before, other), f"{damage}: the failed load changed the model"
                    )


def an_edited_config_is_found_out(method: type[Method], config: MethodConfig, case: Case) -> None:
    """If a setting in adapter_config.json was edited, loading raises CheckpointError, unless the
    setting only affects training."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        path = Path(folder) / CONFIG
        settings = json.loads(path.read_text(encoding="utf-8"))
        whole = Toy(case)
        load(whole, folder)
        edits: dict[str, Any] = {"target_modules": ["first"]}
        for field in fields(config):
            value = settings.get(field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                if value == 0:
                    edits[field.name] = 1 if isinstance(value, int) else 0.25
                else:
                    edits[field.name] = 2 * value if isinstance(value, int) else value / 2
        expected, plain = whole.eval()(x), Toy(case)
        before = snapshot(plain)
        for name, value in edits.items():
            path.write_text(json.dumps(settings | {name: value}), encoding="utf-8")
            if name in config.training_only:
                other = Toy(case)
                load(other, folder)
                require_same(other.eval()(x), expected, f"output after an edited {name}")
                continue
            with require_raise(CheckpointError, f"an edited {name}"):
                load(plain, folder)
            require(unchanged(before, plain), "the failed load changed the model")


def another_base_is_found_out(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Loading an adapter onto another base raises CheckpointError."""
    model = injected_toy(config, case, moved=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        other = Toy(case)
        with torch.no_grad():
            weight: Any = other.first.weight
            weight.copy_(weight + 1 if case.kind == "NF4Linear" else weight * 1.1)
        with require_raise(CheckpointError, "another base"):
            load(other, folder)
