"""The contract of a method, public: `check_method(MyMethod)` runs every clause on every case.

A case is a kind of layer, with or without bias, in a dtype. A clause raises ContractError, or
returns; a clause that a method is exempt from is listed with the reason the method gives.

    >>> print(lora.testing.check_method(lora.METHODS["lora"]))
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from lora.adapter import (
    AdaptedLayer,
    Adapter,
    AdapterConfig,
    Method,
    MethodConfig,
    SavedModule,
    method_of,
)
from lora.adapter_config import read_config
from lora.adapter_file import CONFIG, WEIGHTS, find_folder, settings_in, whole_key
from lora.checkpoint import load, save
from lora.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    MergeError,
    TargetError,
)
from lora.injection import (
    activate,
    disabled,
    eject,
    inject,
    injected,
    merge,
    restore,
    stored_tensors,
    trained_parameters,
    wrappers_of,
)
from lora.kernels import fused
from lora.kernels.dropout import Mask, draw
from lora.layers import View
from lora.nf4 import NF4Linear, dequantize_layers
from lora.targets import base_parameters


@dataclass(frozen=True)
class Case:
    """One layer to put a method on."""

    kind: str  # Linear, Conv1D, Embedding or NF4Linear
    bias: bool
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        without = "" if self.bias or self.kind == "Embedding" else ", no bias"
        return f"{self.kind}{without}, {dtype}"


Check = Callable[[type[Method], MethodConfig, Case], None]
CLAUSES: dict[str, Check] = {}
WRAPPING: set[str] = set()  # clauses about layers that a method wraps


def clause(wrapping: bool = False) -> Callable[[Check], Check]:
    """Register a clause; `wrapping` ones do not concern methods that wrap nothing."""

    def register(check: Check) -> Check:
        CLAUSES[check.__name__] = check
        if wrapping:
            WRAPPING.add(check.__name__)
        return check

    return register


@dataclass(frozen=True)
class Result:
    clause: str
    case: Case
    outcome: str  # "held", "exempt: REASON" or "failed: WHY"


@dataclass(frozen=True)
class ContractReport:
    """What check_method found; `str(report)` is its table, a line per clause."""

    method: str
    results: tuple[Result, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}: the contract on {len({r.case for r in self.results})} cases"]
        for name in dict.fromkeys(result.clause for result in self.results):
            outcomes = dict.fromkeys(r.outcome for r in self.results if r.clause == name)
            lines.append(f"  {name:<32} {'; '.join(outcomes)}")
        return "\n".join(lines)


def cases() -> list[Case]:
    """Every case that can be built here; Conv1D needs transformers and always has a bias."""
    dtypes = (torch.float32, torch.bfloat16)
    found = [Case("Linear", bias, dtype) for bias in (True, False) for dtype in dtypes]
    found.append(Case("Linear", True, torch.float16))
    found += [Case("NF4Linear", bias, dtype) for bias, dtype in zip((True, False), dtypes)]
    found += [Case("Embedding", False, dtype) for dtype in dtypes]
    try:
        import transformers.pytorch_utils  # noqa: F401
    except ImportError:
        return found
    return found + [Case("Conv1D", True, dtype) for dtype in dtypes]


def run_clause(name: str, method: type[Method], config: MethodConfig, case: Case) -> Result:
    """One clause on one case."""
    reason = method.exemption(name, config, case.bias)
    if reason is not None:
        return Result(name, case, f"exempt: {reason}")
    if not issubclass(method, Adapter):
        if name in WRAPPING:
            return Result(name, case, "exempt: wraps no layer")
        if case.kind == "NF4Linear" and not _trains(config, case):
            return Result(name, case, "exempt: a packed weight does not train")
    if case.kind == "Embedding" and isinstance(config, AdapterConfig):
        config = replace(config, target_modules=("first", "second"))  # all-linear leaves them out
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            CLAUSES[name](method, config, case)
    except ContractError as error:
        return Result(name, case, f"failed: {error}")
    except Exception as error:  # the method's own code: any error of its is a finding
        return Result(name, case, f"failed: {type(error).__name__}: {error}")
    return Result(name, case, "held")


def check_method(method: type[Method], config: MethodConfig | None = None) -> ContractReport:
    """Every clause on every case, with `config` or the method's `example`.

    Raises ContractError that names each clause and case that failed; returns the report. The
    method's `variants` are further settings to call it with.
    """
    config = config or method.Config(**method.example)
    _require(method_of(config) is method, f"{method.name}: its Config belongs to another method")
    report = ContractReport(
        method.name,
        tuple(run_clause(name, method, config, case) for name in CLAUSES for case in cases()),
    )
    failed = [r for r in report.results if r.outcome.startswith("failed")]
    if failed:
        lines = [f"{r.clause} ({r.case}): {r.outcome.removeprefix('failed: ')}" for r in failed]
        raise ContractError(f"{method.name} breaks its contract:\n  " + "\n  ".join(lines))
    return report


class Toy(nn.Module):
    """Two layers of the case's kind and a norm that nothing targets.

    Nearly linear: a saturating toy would make gradients vanish that are there.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.first = _layer(case, 12, 16)
        self.norm = nn.LayerNorm(16)
        self.second = _layer(case, 16, 10)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                width = parameter.shape[0] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / width)
        if case.kind == "NF4Linear":
            for name in ("first", "second"):
                setattr(self, name, NF4Linear.of(getattr(self, name)))
        self.to(case.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + 0.1 * torch.sin(self.norm(h))
        # Two tables are both asked for the ids.
        output: Tensor = self.second(h) if x.is_floating_point() else h[..., :10] + self.second(x)
        return output


def _layer(case: Case, inside: int, outside: int) -> nn.Module:
    if case.kind == "Embedding":
        return nn.Embedding(inside, outside)
    if case.kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        module: nn.Module = Conv1D(outside, inside)
        return module
    return nn.Linear(inside, outside, bias=case.bias)


def _input(case: Case, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case.kind == "Embedding":
        return torch.randint(0, 12, (3, 5), generator=generator)
    return torch.randn(3, 5, 12, generator=generator).to(case.dtype)


def _float(x: Tensor) -> Tensor:
    """x in float32; ids stay ids."""
    return x.float() if x.is_floating_point() else x


def perturb(model: nn.Module, name: str = "default", size: float = 0.3) -> None:
    """Move every trained parameter off its start, by a fixed amount of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_parameters(model, name).values():
            shift = size * torch.randn(parameter.shape, generator=generator)
            parameter.add_(shift.to(parameter.dtype))


def _injected(config: MethodConfig, case: Case, moved: bool = False) -> Toy:
    model = Toy(case)
    inject(model, config)
    if moved:
        perturb(model)
    return model.eval()


def _mergeable(model: nn.Module) -> None:
    """Where weights are packed, a merge is refused, and works once they are dequantised."""
    if any(layer.view.packed for layer in wrappers_of(model)[0].values()):
        before = snapshot(model)
        with _raises(MergeError, "merging into a packed weight"):
            merge(model)
        _require(unchanged(before, model), "the refused merge changed the model")
        dequantize_layers(model)


def _trains(config: MethodConfig, case: Case) -> bool:
    """Whether the method takes the case's layers at all, or says what does not train."""
    try:
        inject(Toy(case), config)
    except TargetError as error:
        _require("cannot train" in str(error), f"refused for another reason: {error}")
        return False
    return True


def _alone(model: nn.Module) -> bool:
    """Whether the model's adapter trains parameters of the base."""
    return bool(injected(model)["default"].selected)


def _same(found: Tensor, wanted: Tensor, what: str) -> None:
    if found.dtype != wanted.dtype or not torch.equal(found, wanted):
        raise ContractError(f"{what}: not bit-equal")


def _near(found: Tensor, wanted: Tensor, what: str, k: float = 16) -> None:
    """Within k · eps(dtype) · max|wanted|."""
    found, wanted = found.detach(), wanted.detach()
    if found.shape != wanted.shape:
        raise ContractError(f"{what}: {tuple(found.shape)}, not {tuple(wanted.shape)}")
    if found.numel() == 0:
        return
    bound = k * torch.finfo(found.dtype).eps * max(float(wanted.abs().max()), 1e-30)
    off = float((found - wanted).abs().max())
    if not off <= bound:
        raise ContractError(f"{what}: off by {off:.3g}, tolerance {bound:.3g}")


def _require(good: bool, what: str) -> None:
    if not good:
        raise ContractError(what)


@contextmanager
def _raises(kind: type[Exception], what: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise ContractError(f"{what}: no {kind.__name__}")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a failed operation must leave as it was: modules, bits, requires_grad, modes."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "acting": [
            (module.active, module.enabled, getattr(module, "kept", None) is None)
            for module in model.modules()
            if isinstance(module, AdaptedLayer | SavedModule)
        ],
        "places": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "bits": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trains": [(name, p.requires_grad) for name, p in model.named_parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "state": {k: str(v) for k, v in model.__dict__.items() if k not in nn.Module().__dict__},
    }


def unchanged(before: dict[str, Any], model: nn.Module) -> bool:
    """Whether a snapshot still holds."""
    now = snapshot(model)
    bits, then = now.pop("bits"), before["bits"]
    if bits.keys() != then.keys() or any(now[key] != before[key] for key in now):
        return False
    return all(torch.equal(bits[key], then[key]) for key in bits)


@clause()
def identity_at_the_start(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Right after injection the model computes what the base does."""
    x = _input(case)
    _near(_injected(config, case)(x), Toy(case).eval()(x), "output after injection")


@clause(wrapping=True)
def merged_is_forward(method: type[Method], config: MethodConfig, case: Case) -> None:
    """With moved parameters, which change the output, merging changes it no more."""
    model, x = _injected(config, case, moved=True), _input(case)
    _mergeable(model)
    before = model(x)
    _require(not torch.equal(before, Toy(case).eval()(x)), "moved parameters change nothing")
    merge(model)
    _near(model(x), before, "merged output")


@clause(wrapping=True)
def sixteen_bits_stay_near_float32(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Of the same 16-bit weights computed in float32; forward and merged alike."""
    if case.dtype.itemsize != 2:
        return
    model, x = _injected(config, case, moved=True), _input(case)
    truth = copy.deepcopy(model).float()(_float(x))
    _mergeable(model)
    eps = torch.finfo(case.dtype).eps
    for how in ("forward", "merged"):
        if how == "merged":
            merge(model)
        off = float((model(x).float() - truth).detach().abs().max() / truth.detach().abs().max())
        _require(off <= 4 * eps, f"{how}: off by {off / eps:.1f} eps of the largest output")


@clause(wrapping=True)
def adapters_are_held_in_float32(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Whatever the base's dtype."""
    for name, layer in wrappers_of(_injected(config, case))[0].items():
        for key, parameter in layer.adapter("default").named_parameters():
            _require(parameter.dtype == torch.float32, f"{name}.{key} is {parameter.dtype}")


@clause(wrapping=True)
def active_together(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Two additive adapters sum, forward and merged; two others are refused."""
    assert issubclass(method, Adapter)
    model, x = _injected(config, case, moved=True), _input(case)
    if _alone(model):
        with _raises(ConfigError, "a second adapter beside trained parameters of the base"):
            inject(model, config, name="two", seed=1)
        return
    inject(model, config, name="two", seed=1)
    perturb(model, "two", size=0.2)
    model.eval()
    if not method.additive:
        with _raises(MergeError, "two adapters that do not add up"):
            activate(model, "default", "two")
        return
    layer = model.first
    shifts = []
    for name in ("default", "two"):
        activate(model, name)
        shifts.append(layer(x).float() - layer.base_layer(x).float())  # type: ignore[operator]
    activate(model, "default", "two")
    wanted = layer.base_layer(x).float() + shifts[0] + shifts[1]  # type: ignore[operator]
    _near(layer(x), wanted.to(case.dtype), "two active adapters", k=32)
    before = model(x)
    _mergeable(model)
    merge(model)
    _near(model(x), before, "two merged adapters", k=32)


@clause(wrapping=True)
def fast_is_specification(method: type[Method], config: MethodConfig, case: Case) -> None:
    """In float64, values and gradients, with the same mask and without one."""
    assert issubclass(method, Adapter)
    model = _injected(config, Case(case.kind, case.bias, torch.float64), moved=True).train()
    layers, _ = wrappers_of(model)
    for name, layer in layers.items():
        adapter, view = layer.adapter("default"), layer.view

        def plain(view: View, x: Tensor, mask: Mask | None, adapter: Adapter = adapter) -> Tensor:
            with fused.off():
                return adapter.compute(view, x, mask)

        roads = [("y", adapter.compute, adapter.reference), ("plain y", plain, adapter.reference)]
        if method.additive:  # the road of several adapters together
            roads.append(("delta", adapter.delta, partial(Adapter.delta, adapter)))
        for shape in ((7,), (1,), (0,), (2, 9), (1, 1, 3)):
            pull = torch.randn(*shape, view.out_features, dtype=torch.float64)
            own = adapter.named_parameters()
            inputs: dict[str, Tensor] = {n: p for n, p in own if n not in adapter.frozen}
            masks: list[Mask | None] = [None]
            if view.of_ids:
                x = torch.randint(0, view.in_features, shape)
            else:
                x = torch.randn(*shape, view.in_features, dtype=torch.float64, requires_grad=True)
                inputs["x"] = x
                masks.append(draw(0.5, x))
            for mask in masks:
                for road, fast, slow in roads:
                    found, wanted = fast(view, x, mask), slow(view, x, mask)
                    where = f"{name}, {shape}, {'no mask' if mask is None else 'mask'}: {road}"
                    _near(found, wanted, where, k=1024)
                    for label, got, should in zip(
                        inputs,
                        torch.autograd.grad(found, list(inputs.values()), pull),
                        torch.autograd.grad(wanted, list(inputs.values()), pull),
                        strict=True,
                    ):
                        _near(got, should, f"{where}: gradient of {label}", k=1024)


@clause(wrapping=True)
def gradients_in_its_dtype(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Near those of the same weights in float32, plain and under autocast."""
    model, x = _injected(config, case, moved=True).train(), _input(case)
    truth = copy.deepcopy(model).float()

    def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        model(x).float().square().mean().backward()
        own = trained_parameters(model, "default").items()
        return {name: p.grad.float() for name, p in own if p.grad is not None}

    wanted = gradients(truth, _float(x))
    for autocast in (False, True):
        if autocast and case.dtype == torch.float16:
            continue  # autocast to bfloat16 over float16 norms is refused by torch itself
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(model, x)
        eps = torch.finfo(torch.bfloat16 if autocast else case.dtype).eps
        for name, gradient in found.items():
            off = float((gradient - wanted[name]).abs().max() / wanted[name].abs().max())
            where = f"gradient of {name}{' under autocast' if autocast else ''}"
            _require(off <= max(8 * eps, 1e-5), f"{where}: off by {off:.2g}")


@clause(wrapping=True)
def dropout_is_the_mask_alone(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A layer in training drops as the specification does with the mask it draws, eval nothing."""
    model = _injected(config, case, moved=True)
    layers, _ = wrappers_of(model)
    layer = layers["first"]
    x = _input(case)
    adapter = layer.adapter("default")
    _near(layer(x), adapter.reference(layer.view, x, None), "eval", k=32)
    adapter.dropout = 0.0
    layer.train()
    _near(layer(x), adapter.reference(layer.view, x, None), "training without dropout", k=32)
    adapter.dropout = 0.5
    layer.train()
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    mask = adapter.draw_mask(x)
    if case.kind == "Embedding":
        _require(mask is None, "ids are dropped")
        return
    assert mask is not None
    values = set(mask.scaled(x).flatten().tolist())
    _near(found, adapter.reference(layer.view, x, mask), "training", k=32)
    _require(values == {0.0, 2.0}, "a mask of p = 0.5 has values 0 and 2")
    again = adapter.draw_mask(x)
    same = again is None or torch.equal(again.keep(x), mask.keep(x))
    _require(not same, "the same mask at every step")


@clause()
def base_bits_stay(method: type[Method], config: MethodConfig, case: Case) -> None:
    """After optimiser steps with weight decay; disabled, all of them."""
    model = _injected(config, case)
    base = {name: p.detach().clone() for name, p in base_parameters(model)}
    _steps(model, case)
    for name, parameter in base_parameters(model):
        if not parameter.requires_grad:
            _same(parameter.detach(), base[name], f"base parameter {name} after steps")
    with disabled(model):
        for name, parameter in base_parameters(model):
            _same(parameter.detach(), base[name], f"base parameter {name}, disabled after steps")


def _steps(model: nn.Module, case: Case) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    model.train()
    for number in range(3):
        model(_input(case, seed=number)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@clause()
def only_the_adapter_trains(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Each of its parameters gets a gradient, and nothing else requires one."""
    model = _injected(config, case, moved=True)
    own = {id(p) for p in trained_parameters(model, "default").values()}
    model(_input(case)).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        mine = id(parameter) in own
        _require(parameter.requires_grad == mine, f"{name}: requires_grad is not {mine}")
        got = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        _require(got == mine, f"{name}: {'no gradient' if mine else 'a gradient'}")


@clause()
def disabled_is_base(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Bit for bit, and the adapter acts again after."""
    model, x = _injected(config, case, moved=True), _input(case)
    with disabled(model):
        _same(model(x), Toy(case).eval()(x), "disabled output")
    _require(not torch.equal(model(x), Toy(case).eval()(x)), "enabled again: nothing acts")


@clause()
def a_base_that_is_gone_says_so(method: type[Method], config: MethodConfig, case: Case) -> None:
    """disabled, merge and restore work, or are a MergeError with the model untouched."""
    if method.keeps_base:
        return
    model = _injected(config, case, moved=True)
    before = snapshot(model)
    with _raises(MergeError, "disabled"), disabled(model):
        pass
    for verb in (merge, restore):
        with _raises(MergeError, verb.__name__):
            verb(model)
    _require(unchanged(before, model), "the refused call changed the model")


@clause()
def saved_and_loaded_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The file holds the adapter's tensors alone, and loads to the same bits and output."""
    model, x = _injected(config, case, moved=True), _input(case)
    own = stored_tensors(model, "default")
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        stored = safetensors.torch.load_file(Path(folder) / WEIGHTS)
        _require(len(stored) == len(own), "the file holds other tensors than the adapter's")
        for key, parameter in own.items():
            _same(stored[whole_key(key)], parameter.detach(), f"stored {key}")
        other = Toy(case)
        load(other, folder)
    other.eval()
    for key, parameter in stored_tensors(other, "default").items():
        _same(parameter.detach(), own[key].detach(), f"loaded {key}")
    exact = all(
        own[key].shape == p.shape for key, p in trained_parameters(model, "default").items()
    )
    if exact:
        _same(other(x), model(x), "output of the loaded adapter")
    else:  # filed as the plain update that it equals
        _near(other(x), model(x), "output of the loaded adapter")


@clause()
def config_and_json(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Settings through adapter_config.json and back are the same settings."""
    model = _injected(config, case)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        settings = settings_in(find_folder(folder))
        found = read_config(method, settings, Path(folder))
        other = Toy(case)
        inject(other, found)
        with tempfile.TemporaryDirectory() as again:
            save(other, again)
            _require(settings_in(Path(again)) == settings, "config -> file -> config differs")


@clause()
def a_failed_load_changes_nothing(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Seven kinds of broken file, ours and PEFT's: a CheckpointError, the model untouched."""
    model = _injected(config, case, moved=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        path = Path(folder) / WEIGHTS
        # From bytes: load_file maps the file, which is rewritten below.
        whole = safetensors.torch.load(path.read_bytes())
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        load(Toy(case), folder, name="other")  # so that what fails below fails for what is broken
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
        for what, content in broken.items():
            for mark in (metadata, None):  # a file of ours, and one of PEFT's
                if isinstance(content, bytes):
                    path.write_bytes(content)
                else:
                    path.write_bytes(safetensors.torch.save(content, mark))
                models = [Toy(case)]
                if not _alone(model):
                    models.append(_injected(config, case))
                for other in models:
                    before = snapshot(other)
                    with _raises(CheckpointError, what):
                        load(other, folder, name="other")
                    _require(unchanged(before, other), f"{what}: the failed load changed the model")


@clause(wrapping=True)
def an_edited_config_is_found_out(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The digest covers every setting but those of training, which leave the output alone."""
    model, x = _injected(config, case, moved=True), _input(case)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        path = Path(folder) / CONFIG
        settings = json.loads(path.read_text())
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
        for name, value in edits.items():
            path.write_text(json.dumps(settings | {name: value}))
            other = Toy(case)
            if name in config.training_only:
                load(other, folder)
                _same(other.eval()(x), whole.eval()(x), f"output after an edited {name}")
                continue
            before = snapshot(other)
            with _raises(CheckpointError, f"an edited {name}"):
                load(other, folder)
            _require(unchanged(before, other), "the failed load changed the model")


@clause()
def another_base_is_found_out(method: type[Method], config: MethodConfig, case: Case) -> None:
    """An adapter does not load onto a base that differs from its own."""
    model = _injected(config, case, moved=True)
    with tempfile.TemporaryDirectory() as folder:
        save(model, folder)
        other = Toy(case)
        with torch.no_grad():
            weight: Any = other.first.weight
            weight.copy_(weight + 1 if case.kind == "NF4Linear" else weight * 1.1)
        with _raises(CheckpointError, "another base"):
            load(other, folder)


@clause()
def output_dtype(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The base's, plain and under autocast."""
    model, base, x = _injected(config, case, moved=True), Toy(case).eval(), _input(case)
    _require(model(x).dtype == base(x).dtype, "dtype differs from the base's")
    if case.dtype == torch.float16:
        return  # autocast to bfloat16 over float16 norms is refused by torch itself
    wanted = copy.deepcopy(model).float()(_float(x)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x).detach()
        _require(found.dtype == base(x).dtype, "dtype under autocast differs from the base's")
    off = float((found.float() - wanted).abs().max() / wanted.abs().max())
    _require(off <= 8 * torch.finfo(torch.bfloat16).eps, f"off by {off:.3f} under autocast")


@clause()
def copies_and_moves(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A deepcopy computes the same and moves apart; all parameters move to another device."""
    model, x = _injected(config, case, moved=True), _input(case)
    wanted = model(x)
    twin = copy.deepcopy(model)
    _same(twin(x), wanted, "output of a deepcopy")
    perturb(twin)
    _same(model(x), wanted, "the original after its deepcopy moved")
    away = copy.deepcopy(model).to("meta")
    _require(all(p.is_meta for p in away.parameters()), "a parameter stayed behind")
    if torch.cuda.is_available():
        _near(copy.deepcopy(model).cuda()(x.cuda()).cpu(), wanted, "on CUDA", k=256)


@clause()
def restore_is_bit_exact(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Five merges and restores leave the model as it was; a second merge is refused."""
    model, x = _injected(config, case, moved=True), _input(case)
    _mergeable(model)
    wanted, before = model(x), snapshot(model)
    for _ in range(5):
        merge(model)
        restore(model)
    _require(unchanged(before, model), "merge and restore changed the model")
    _same(model(x), wanted, "output after restore")
    merge(model)
    with _raises(MergeError, "merge of a merged model"):
        merge(model)


@clause()
def ejected_is_plain(method: type[Method], config: MethodConfig, case: Case) -> None:
    """No wrapper is left, the output is the merged one's, everything trains again."""
    model, x = _injected(config, case, moved=True), _input(case)
    if method.keeps_base:
        _mergeable(model)
        merge(model)
    wanted = model(x)
    eject(model)
    _require([n for n, _ in model.named_modules()] == [n for n, _ in Toy(case).named_modules()],
             "a wrapper is left")  # fmt: skip
    _same(model(x), wanted, "ejected output")
    trained = {name: p.requires_grad for name, p in Toy(case).named_parameters()}
    _require(all(p.requires_grad == trained[name] for name, p in model.named_parameters()),
             "a parameter is left frozen")  # fmt: skip


@clause(wrapping=True)
def a_shared_module_is_wrapped_once(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A module reached by two paths has one wrapper on both."""
    assert isinstance(config, AdapterConfig)
    for targets in (config.target_modules, ("first", "second"), ("again", "second")):
        model = Toy(case)
        model.again = model.first
        inject(model, replace(config, target_modules=targets))
        _require(model.again is model.first and isinstance(model.again, AdaptedLayer),
                 "a module reached by two paths was wrapped on one")  # fmt: skip
    perturb(model.eval())
    wanted = model(_input(case))
    _mergeable(model)
    merge(model)
    _near(model(_input(case)), wanted, "merged output")
    eject(model)
    _require(model.again is model.first and not isinstance(model.again, AdaptedLayer),
             "ejected on one path only")  # fmt: skip


@clause(wrapping=True)
def a_tied_weight_is_not_merged(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Refused, or untied on request, the other side unmoved; restore ties again."""
    model = Toy(case)
    model.tied = nn.Module()
    if case.kind == "NF4Linear":
        return  # a packed weight is not merged at all, and nothing is tied to one
    model.tied.weight = model.first.weight
    inject(model, config)
    before = snapshot(model)
    with _raises(MergeError, "merging into a tied weight"):
        merge(model)
    _require(unchanged(before, model), "the refused merge changed the model")
    perturb(model.eval())
    wanted, before = model(_input(case)), snapshot(model)
    tied = model.tied.weight.detach().clone()  # type: ignore[operator]
    merge(model, untie=True)
    _near(model(_input(case)), wanted, "merged output, untied")
    _same(model.tied.weight, tied, "the other side of the tie")  # type: ignore[arg-type]
    restore(model)
    _require(unchanged(before, model), "restore left the tie broken")


@clause()
def gradient_checkpointing(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Recomputation draws the same mask, so that the gradients are the same bits."""
    from torch.utils.checkpoint import checkpoint

    model = _injected(config, case, moved=True).train()
    for layer in wrappers_of(model)[0].values():
        layer.adapter("default").dropout = 0.3
    own = trained_parameters(model, "default")
    found = []
    for recompute in (False, True):
        torch.manual_seed(7)
        x = _input(case)
        y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
        y.float().square().sum().backward()
        found.append({name: p.grad.clone() for name, p in own.items() if p.grad is not None})
        model.zero_grad()
    for name in own:
        _same(found[1][name], found[0][name], f"gradient of {name}")


@clause()
def torch_compile(method: type[Method], config: MethodConfig, case: Case) -> None:
    """The whole model in one graph (aot_eager), to the same output."""
    if case != Case("Linear", True, torch.float32):
        return  # one compilation is seconds, and no case has code of its own here
    model, x = _injected(config, case, moved=True), _input(case)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    _near(compiled(x), model(x), "compiled output")


@clause(wrapping=True)
def parameter_count(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Is the closed form that the method gives."""
    assert issubclass(method, Adapter)
    assert isinstance(config, AdapterConfig)
    for name, layer in wrappers_of(_injected(config, case))[0].items():
        found = layer.adapter("default").own_size()
        wanted = method.size(layer.view, config, name)
        _require(found == wanted, f"{name}: {found} parameters, {wanted} in closed form")


@clause()
def same_seed_same_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Whatever was drawn before, and whichever other layers are adapted."""
    one, two = _start(config, case, 0, 1), _start(config, case, 0, 99)
    for name in one:
        _same(two[name], one[name], f"start of {name}")
    if issubclass(method, Adapter):
        assert isinstance(config, AdapterConfig)
        part = Toy(case)
        try:
            inject(part, replace(config, target_modules=("second",)))
        except TargetError:
            return  # a setting names the other layer
        for name, parameter in trained_parameters(part, "default").items():
            if name in one:
                _same(parameter.detach(), one[name], f"start of {name} without the other layer")


def _start(config: MethodConfig, case: Case, seed: int, noise: int) -> dict[str, Tensor]:
    """What an injection fills, after other draws."""
    torch.manual_seed(noise)
    model = Toy(case)
    torch.randn(noise)
    state = torch.get_rng_state()
    inject(model, config, seed=seed)
    _require(torch.equal(state, torch.get_rng_state()), "injection moves the default generator")
    return {k: p.detach() for k, p in trained_parameters(model, "default").items()}


@clause(wrapping=True)
def another_seed_other_bits(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Of at least one stored tensor, unless each starts at one value throughout."""
    one, other = (_stored(config, case, seed) for seed in (0, 1))
    constant = all(bool((t == t.flatten()[0]).all()) for t in one.values())
    differs = any(not torch.equal(one[n], other[n]) for n in one)
    _require(constant or differs, "the seed changes nothing")


def _stored(config: MethodConfig, case: Case, seed: int) -> dict[str, Tensor]:
    model = Toy(case)
    inject(model, config, seed=seed)
    return {k: t.detach() for k, t in stored_tensors(model, "default").items()}


@clause(wrapping=True)
def what_does_not_fit_is_named(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Targets that match nothing, or no layer, are a TargetError, the model untouched."""
    assert isinstance(config, AdapterConfig)
    for targets in (("norm",), ("frist",), r"second.+", ("first", "frist")):
        model = Toy(case)
        before = snapshot(model)
        with _raises(TargetError, f"target_modules={targets!r}"):
            inject(model, replace(config, target_modules=targets))
        _require(unchanged(before, model), "the refused injection changed the model")
    model = _injected(config, case)
    with _raises(ConfigError, "a name given twice"):
        inject(model, config)
