"""--device: which device it means, that the base is cast before it goes there, and resuming on
another one. There is no GPU: torch's functions for CUDA are replaced."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import llama, save_distilbert
from test_cli import data, lora
from test_resume import FLAGS, sigterm_after
from torch import nn

import lora as library
from lora.errors import ConfigError, TrainingError
from lora.finetune import devices, distributed
from lora.finetune.memory import auto_dtype_note, set_dtype
from lora.finetune.peak import PeakMemory

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two CUDA devices; the numbers of those that became the current one."""
    became: list[int] = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: became[-1])
    monkeypatch.setattr(torch.cuda, "set_device", became.append)
    return became


def test_a_cuda_device_has_a_number_and_becomes_the_current_one(current: list[int]) -> None:
    for name, rank, number in (("auto", None, 0), ("cuda:1", None, 1), ("cuda", None, 1),
                               ("auto", 0, 0), ("cuda", 1, 1)):  # fmt: skip
        assert devices.device_named(name, rank) == torch.device("cuda", number)
        assert current[-1] == number
    assert devices.device_named("cpu", 1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "rank", "words"),
    [
        ("cuda:2", None, r"has 2 cuda devices, numbered from 0. Set --device cuda:1"),
        ("auto", 2, "has 2 cuda devices"),
        ("cuda:1", 0, "each of several processes takes a device of its own. Set --device cuda."),
        ("xpu", None, "torch finds no xpu device on this machine. Set --device auto"),
    ],
)
def test_a_device_that_is_not_there_is_named(
    name: str, rank: int | None, words: str, current: list[int]
) -> None:
    with pytest.raises(ConfigError, match=words):
        devices.device_named(name, rank)


@NO_CUDA
def test_without_a_cuda_device_auto_is_the_cpu() -> None:
    assert devices.device_named() == torch.device("cpu")
    with pytest.raises(ConfigError, match="--device cuda: torch finds no cuda device"):
        devices.device_named("cuda")


def test_a_single_process_that_shards_names_its_device(
    current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """set_device refuses a device without a number."""
    backends: list[str] = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **more: backends.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.group(alone=True):
        assert current[-1] == 0
    with distributed.group(alone=True, on="cpu"):
        pass
    assert backends == ["cpu:gloo,cuda:nccl", "gloo"]


def test_on_an_accelerator_the_whole_frozen_base_is_in_bfloat16() -> None:
    """One float32 embedding or norm would make every activation after it float32."""
    model: Any = llama()
    model.model.layers[0].mlp = library.nf4.NF4Linear.of(nn.Linear(32, 32))
    names = ("lm_head", "model.norm")
    config = library.LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=names)
    library.inject(model, config)
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    set_dtype(model, "bfloat16", torch.device("meta"))
    for name, parameter in model.named_parameters():
        trained = "adapters." in name or "copies." in name
        kept = trained or "mlp.absmax" in name or "nested" in name or "mlp.offset" in name
        if parameter.is_floating_point() and "layers.0.mlp" not in name:
            assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    packed = model.model.layers[0].mlp
    assert packed.nested_absmax.dtype == packed.offset.dtype == torch.float32
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == buffers


def test_what_was_trained_is_not_rounded_when_it_is_opened_again() -> None:
    """A loaded adapter does not train, but its copies of norms are still the trained ones."""
    model: Any = llama()
    library.inject(model, library.LoRAConfig(r=2, modules_to_save=("model.norm",)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_dtype(model, "bfloat16", torch.device("meta"))
    assert model.model.norm.copies["default"].weight.dtype == torch.float32
    assert model.model.norm.original_module.weight.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    folder = tmp_path_factory.mktemp("devices")
    return ("--base", save_distilbert(folder / "base"), "--data", data(folder / "data"))


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[set[torch.dtype]]]:
    """The dtypes of the linear weights of a base at each move to a device that it has not had."""
    import transformers

    seen: list[set[torch.dtype]] = []
    real = nn.Module.to

    def to(self: nn.Module, *args: Any, **more: Any) -> nn.Module:
        if isinstance(self, transformers.PreTrainedModel) and isinstance(args[0], torch.device):
            named = self.named_modules()
            linear = (m for name, m in named if "transformer" in name and type(m) is nn.Linear)
            seen.append({module.weight.dtype for module in linear})
        return real(self, *args, **more)

    monkeypatch.setattr(transformers.PreTrainedModel, "to", to)
    return lambda: seen


@pytest.mark.parametrize(
    ("init", "dtypes"), [("default", [torch.bfloat16]), ("olora", [torch.float32, torch.bfloat16])]
)
def test_the_base_is_cast_before_it_goes_to_the_device(
    init: str,
    dtypes: list[torch.dtype],
    flags: tuple[Any, ...],
    moves: Callable[[], list[set[torch.dtype]]],
    tmp_path: Path,
) -> None:
    """In float32 it would need twice the room there. A start from each weight needs float32."""
    run = ("--run-dir", tmp_path / "run", "--dtype", "bfloat16", "--epochs", 1, "--r", 2)
    assert lora("train", *flags, *run, "--init-lora-weights", init) == 0
    assert moves() == [{dtype} for dtype in dtypes]
    moves().clear()
    assert lora("eval", tmp_path / "run", "--device", "cpu") == 0
    assert moves() == [{torch.bfloat16}]


def test_a_run_resumes_on_another_device(
    flags: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        sigterm_after(2, patch)
        assert lora("train", *flags, *FLAGS, "--run-dir", run, "--device", "cpu") == 143
    environment = json.loads((run / "environment.json").read_text())
    assert environment["device"] == "cpu"
    (run / "environment.json").write_text(json.dumps(environment | {"device": "NVIDIA A100"}))
    if not torch.cuda.is_available():
        assert lora("train", "--resume", run, "--device", "cuda") == 2
        assert "torch finds no cuda device" in capsys.readouterr().err
    assert lora("train", "--resume", run, "--device", "cpu") == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "device was NVIDIA A100, is cpu: last bits may differ" in output


def test_a_device_of_no_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("train", "--device", "tpu") == 2
    assert "--device must be auto, cpu, cuda, cuda:N, xpu, xpu:N or mps, found 'tpu'" in (
        capsys.readouterr().err
    )


def test_auto_says_what_it_took_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setenv("LORA_BFLOAT16", "1")
    assert auto_dtype_note(cpu) == ("dtype: bfloat16, since LORA_BFLOAT16=1 is in the environment")
    monkeypatch.delenv("LORA_BFLOAT16")
    for there, words in (
        (True, "dtype: bfloat16, since this processor has bfloat16 matrix multiplication"),
        (False, "dtype: float32, since this processor has no bfloat16 matrix multiplication"),
    ):
        monkeypatch.setattr("lora.finetune.memory.bfloat16_here", lambda device, t=there: t)
        assert auto_dtype_note(cpu) == words


def test_peaks_on_a_gpu_are_those_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the device that the run computes on, in each phase."""
    peaks, asked = iter([50, 20, 90, 30, 10]), set[torch.device]()

    def peak(device: torch.device) -> int:
        asked.add(device)
        return next(peaks)

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.add)
    model, device = nn.Linear(2, 2), torch.device("cuda", 1)
    with PeakMemory(device) as memory, memory.training(model), memory.paused():
        pass
    assert memory.training_peak == 30
    assert memory.peak() == 90
    assert asked == {torch.device("cuda", 1)}


def test_deterministic_algorithms_are_used_inside_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    for on in (False, True):
        with devices.deterministic(on):
            assert torch.are_deterministic_algorithms_enabled() == on
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if on else None)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill  # type: ignore[attr-defined]
    with (
        pytest.raises(TrainingError, match="--deterministic: cumsum_cuda_kernel does not have a"),
        devices.deterministic(True),
    ):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another"), devices.deterministic(True):
        raise RuntimeError("another")


def test_a_deterministic_run_is_recorded_as_one(flags: tuple[Any, ...], tmp_path: Path) -> None:
    """On a CPU it is the same run."""
    runs = [tmp_path / name for name in ("plain", "deterministic")]
    for run, more in zip(runs, ((), ("--deterministic",)), strict=True):
        assert lora("train", *flags, *FLAGS, "--run-dir", run, *more) == 0
        environment = json.loads((run / "environment.json").read_text())
        assert environment["deterministic"] == bool(more)
    adapters = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    assert "deterministic = true" in (runs[1] / "config.toml").read_text()
