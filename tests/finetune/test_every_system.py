"""What Linux has and another system lacks is replaced or left out there."""

from __future__ import annotations

import ast
import mmap
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT

import lora
from lora.files import locked
from lora.finetune import distributed, environment, peak, state
from lora.finetune.comparison import schedule
from lora.finetune.config import RunConfig
from lora.finetune.train import check_room
from lora.injection import machine_memory
from lora.interop import rendering

MODULES = sorted((ROOT / "lora").rglob("*.py"))


def test_no_module_needs_what_one_system_has() -> None:
    """At import, that is: within a function a module may try."""
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            names += [getattr(node, "module", "") or ""]
            assert not {"fcntl", "resource", "pwd", "grp", "termios", "msvcrt"} & set(names), path


def test_every_text_file_has_its_encoding_named() -> None:
    """Windows reads and writes cp1252 otherwise."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                named = {keyword.arg for keyword in node.keywords}
                if node.func.attr in ("read_text", "write_text") and "encoding" not in named:
                    by_position = {"read_text": 1, "write_text": 2}[node.func.attr]
                    assert len(node.args) >= by_position, f"{path}:{node.lineno}"


def test_memory_that_the_system_does_not_tell_is_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert machine_memory() == environment.total_memory(torch.device("cpu"))
    monkeypatch.delattr(os, "sysconf")
    assert machine_memory() is None
    assert environment.total_memory(torch.device("cpu")) == psutil.virtual_memory().total
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=("0",)))
    check_room(model)


def test_memory_is_measured_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "STATUS", tmp_path / "none")
    with peak.PeakMemory() as memory:
        block = mmap.mmap(-1, 2**26)  # new pages: torch may have freed memory to give again
        block.write(b"1" * 2**26)
        memory.sample()
    assert memory.peak() > 0.9 * 2**26


def test_a_run_is_started_where_descriptors_cannot_be_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    real = subprocess.Popen

    def start(command: Any, **options: Any) -> Any:
        started.append(options)
        return real([sys.executable, "-c", ""])

    monkeypatch.setattr(schedule.subprocess, "Popen", start)
    for platform, passed in (("linux", {"pass_fds": [0]}), ("win32", {})):
        monkeypatch.setattr(sys, "platform", platform)
        run = RunConfig(settings=lora.LoRAConfig(), run_dir=tmp_path)
        with ExitStack() as stack:
            schedule.Scheduler(tmp_path)._spawn(run, "new", 0, 0, stack).wait()
        assert started.pop() == passed


def test_ranks_are_launched_without_the_signals_of_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.launcher import api

    hangup = signal.SIGHUP
    before = signal.getsignal(signal.SIGINT), signal.getsignal(hangup)
    during: list[Any] = []

    def launched(*_: Any) -> Any:
        during.extend([signal.getsignal(signal.SIGINT), signal.getsignal(hangup)])
        return lambda *arguments: None

    monkeypatch.setattr(api, "elastic_launch", launched)
    monkeypatch.delattr(signal, "SIGHUP")
    assert distributed.launch(2, ["train"]) == 0
    assert during[0] is not before[0]
    assert during[1] is before[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(hangup)) == before


def test_templates_are_rendered_without_limits_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    rendering._limit_memory()


def test_a_checkpoint_names_its_files_alike_everywhere(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "a").write_bytes(b"1")
    assert list(state._contents(tmp_path)) == ["adapter/a"]


@pytest.mark.parametrize("platform", ["linux", "win32"])
def test_a_lock_is_held_by_one(
    platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    for path in (tmp_path / "file", tmp_path):
        with locked(path) as first:
            assert first is not None
            with locked(path) as second:
                assert second is None
        with locked(path) as third:
            assert third is not None
    files = {path.name for path in tmp_path.iterdir()}
    assert files == ({"file", ".lock"} if platform == "win32" else {"file"})
