"""What the system says of a file is an error of ours, at every door that a user has."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from architectures import build
from conftest import ROOT
from torch import nn

import lora
from lora.adapter_config import method_and_config
from lora.errors import CheckpointError, ConfigError, LoraError, RunError, command
from lora.files import readable, writable
from lora.finetune import config, models, record
from lora.finetune.cli import main
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import read_prompts
from lora.finetune.data.rows import read_source
from lora.finetune.data.templates import template_of
from lora.finetune.export import export
from lora.finetune.merged import merge_run
from lora.finetune.plots import draw_curves
from lora.finetune.record import write_lines
from lora.finetune.run import resume, run
from lora.finetune.run_folder import check_free, config_of
from lora.finetune.source import open_source
from lora.finetune.trained import rescore
from lora.finetune.verbs import ExportConfig
from lora.interop.gguf_adapter import write_gguf_adapter
from lora.interop.loralib import ConvertConfig, convert


@contextmanager
def a_full_disk(room: int = 512) -> Iterator[None]:
    """No file grows past so many bytes, whoever writes it: Python, Rust or C."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64))


def adapted() -> nn.Module:
    made = model()
    lora.inject(made, lora.LoRAConfig(r=2, target_modules=("0",)))
    return made


@pytest.fixture(scope="module")
def run_of_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run on a tiny base."""
    import transformers

    from lora.finetune.models import load_skeleton

    folder = tmp_path_factory.mktemp("run")
    config = transformers.DistilBertConfig(
        dim=32, n_layers=1, n_heads=2, hidden_dim=64, vocab_size=30522
    )
    transformers.DistilBertModel(config).save_pretrained(folder / "base")
    load_skeleton("demo", 2, "classification").tokenizer.save_pretrained(folder / "base")
    rows = "".join(f"a text {n}\t{n % 2}\n" for n in range(40))
    (folder / "train.tsv").write_text("text\tlabel\n" + rows)
    given = ["--base", folder / "base", "--data", folder / "train.tsv", "--epochs", 1]
    assert main(["train", *map(str, given), "--run-dir", str(folder / "done")]) == 0
    return folder / "done"


def test_a_full_disk_in_save_leaves_what_stood_there(tmp_path: Path) -> None:
    made = adapted()
    lora.save(made, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        made[0].adapters["default"].lora_B.fill_(1)  # type: ignore[index,union-attr]
    with a_full_disk(), pytest.raises(CheckpointError, match="cannot be written: File too large"):
        lora.save(made, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_in_merge_leaves_nothing(run_of_demo: Path, tmp_path: Path) -> None:
    """safetensors writes in Rust, whose error is no OSError."""
    with a_full_disk(), pytest.raises(RunError, match="out cannot be written: .*oo large"):
        merge_run(open_source(run_of_demo), tmp_path / "out", dequantize=False, untie=False)
    assert list(tmp_path.iterdir()) == []
    merge_run(open_source(run_of_demo), tmp_path / "out", dequantize=False, untie=False)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 300, 1500, 6000, 20_000, 60_000])
def test_a_full_disk_at_any_write_of_a_run(
    room: int,
    run_of_demo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],  # in memory: pytest's own files have no more room either
) -> None:
    """Whatever is written first past the room fails by name, and the run goes on from there."""
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    table = config.read_toml(run_of_demo / "config.toml") | {"run_dir": str(tmp_path / "run")}
    asked = config.from_table(table, "lora")
    with a_full_disk(room), pytest.raises(LoraError, match="cannot be written|cannot be made"):
        run(asked)
    left = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert left <= {"run"}
    if left:
        assert resume(tmp_path / "run")["step"] == record.summary_of(run_of_demo)["step"]
    else:
        run(asked)


def test_a_full_disk_in_export_and_in_lines(tmp_path: Path) -> None:
    llama = build("llama")
    lora.inject(llama, lora.LoRAConfig(r=2))
    folder = lora.save(llama, tmp_path / "adapter")
    with a_full_disk(), pytest.raises(CheckpointError, match="cannot be written: File too large"):
        write_gguf_adapter(folder, llama.config, tmp_path / "a.gguf")
    with a_full_disk(), pytest.raises(RunError, match="cannot be written: File too large"):
        write_lines(tmp_path / "lines.jsonl", [{"text": "x" * 1000}])
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["folder", "forbidden", "loop"])
def test_an_adapter_that_cannot_be_read(
    file: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora.save(adapted(), tmp_path)
    path = tmp_path / file
    if damage == "forbidden":  # root reads everything, so the refusal is the test's
        opened = Path.open

        def refuse(self: Path, *given: Any, **more: Any) -> Any:
            if self == path:
                raise PermissionError(13, "Permission denied")
            return opened(self, *given, **more)

        monkeypatch.setattr(Path, "open", refuse)
        if file == "adapter_config.json":  # read_bytes opens by another way from Python 3.13 on
            monkeypatch.setattr(Path, "read_bytes", lambda self: refuse(self).read())
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
        else:
            path.symlink_to(path)
    for door in (method_and_config, lambda folder: lora.load(model(), folder)):
        if damage == "forbidden" and file.endswith("safetensors") and door is method_and_config:
            continue  # which reads no tensor
        with pytest.raises(CheckpointError) as raised:
            door(tmp_path)  # type: ignore[operator]
        assert file in str(raised.value)
        assert str(tmp_path) in str(raised.value)


NAMES = {"a NUL": "a\0b", "too long": "x" * 5000, "a long part": "y" * 300, "in a file": "file/x"}
DOORS: dict[str, Callable[[Path], Any]] = {
    "method_and_config": method_and_config,
    "load": lambda path: lora.load(model(), path),
    "save": lambda path: lora.save(adapted(), path),
    "config_of": config_of,
    "resume": resume,
    "check_free": check_free,
    "write_lines": lambda path: write_lines(path / "x", [{}]),
    "draw": lambda path: draw_curves([path], path),
    "rescore": lambda path: rescore(open_source(path), None, None, Columns()),
    "merge_run": lambda path: merge_run(open_source(path), path / "out", False, False),
    "export": lambda path: export(ExportConfig(adapter=path)),
    "convert": lambda path: convert(ConvertConfig(checkpoint=path, lora_alpha=1.0)),
    "base": lambda path: models.load_base(str(path), 2, "classification", 0),
    "skeleton": lambda path: models.load_skeleton(str(path), 2, "classification"),
    "data": lambda path: list(read_source(str(path))),
    "conversations": lambda path: read_prompts(str(path)),
    "template": lambda path: template_of(models.load_base("demo-lm-tiny", 1, "text", 0), str(path)),
    "a recipe": lambda path: config.parse_run(["--config", str(path)]),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_cannot_be_is_an_error_of_ours(door: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraError):
        DOORS[door](tmp_path / NAMES[name])
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for door in ("load", "config_of", "base", "convert", "data", "export", "draw", "a recipe"):
        with pytest.raises(LoraError):
            DOORS[door](tmp_path / "loop")


def test_the_doors_pass_on_what_is_none_of_the_systems() -> None:
    for door in (readable, writable):
        with pytest.raises(ValueError, match="of another kind"), door("x", ConfigError):
            raise ValueError("of another kind")
        with pytest.raises(RunError, match="mine"), door("x", ConfigError):
            raise RunError("mine")
        nul = r"'a\\x00b' cannot be .*: embedded null byte"
        with pytest.raises(ConfigError, match=nul), door("a\0b", ConfigError):
            os.stat("a\0b")
        with pytest.raises(ConfigError, match="x cannot be"), door("x", ConfigError):
            safetensors.torch.load(b"12345678")


def commands(source: str) -> list[str]:
    """The commands of ours in f-strings whose next word is put in as it is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.JoinedStr):
            continue
        for text, value in zip(node.values, node.values[1:]):
            if isinstance(text, ast.Constant) and isinstance(value, ast.FormattedValue):
                end = re.search(r"\blora [a-z]+( --?[a-z-]+)* $|vllm serve $|iconv .*$", text.value)
                quoted = isinstance(value.value, ast.Call) and "quote" in ast.unparse(value.value)
                if end and not quoted:
                    found.append(f"{end[0]}{{{ast.unparse(value.value)}}}")
    return found


def test_no_command_is_printed_with_a_path_as_it_is() -> None:
    assert commands('f"Run lora eval {path}."') == ["lora eval {path}"]
    assert commands('f"Run lora train --resume {path}."') == ["lora train --resume {path}"]
    unquoted = {
        str(path.relative_to(ROOT)): commands(path.read_text())
        for path in (ROOT / "lora").rglob("*.py")
    }
    fine = ["lora {verb}"]  # a verb of ours
    assert {name: found for name, found in unquoted.items() if found and found != fine} == {}


def test_a_command_comes_back_whole_from_a_shell() -> None:
    words = ["lora", "train", "--resume", "x; touch y", "$(z)", "it's", "a b", ""]
    assert shlex.split(command(*words)) == words
