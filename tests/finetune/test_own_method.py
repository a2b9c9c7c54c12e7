"""A method in a file of the user's: --method path/to/mine.py:MyMethod, from training to merge."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, save_distilbert
from test_resume import StoppedError

from lora.finetune.cli import main
from lora.finetune.methods import is_outside, method_named, recordable
from lora.method import METHODS

GATED = ROOT / "examples/gated_lora.py"
FLAGS = ("--limit", 16, "--epochs", 2, "--batch-size", 8, "--r", 2, "--target-modules", "q_lin",
         "--dtype", "float32", "--learning-rate", 0.01)  # fmt: skip


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


def forget() -> None:
    """Undo what naming a file has defined, as if the process had ended."""
    for name in [name for name in sys.modules if name.startswith("lora_own_")]:
        del sys.modules[name]
    for name in [name for name, m in METHODS.items() if not m.__module__.startswith("lora.")]:
        del METHODS[name]


@pytest.fixture(autouse=True)
def _a_new_process() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copy(GATED, tmp_path_factory.mktemp("own") / "mine.py"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights so large that what a layer adds shows."""
    return save_distilbert(tmp_path_factory.mktemp("base"), initializer_range=0.2)


@pytest.fixture(scope="module")
def trained(file: Path, base: Path) -> Path:
    """A complete run, which later tests copy."""
    run, method = file.parent / "run", f"{file}:GatedLoRA"
    assert lora("train", "--base", base, "--method", method, *FLAGS, "--run-dir", run) == 0
    forget()
    return run


def edited(file: Path, folder: Path, trained: Path) -> tuple[Path, Path]:
    """A copy of the run in the folder, and of its method's file, which has changed since."""
    run, mine = folder / "run", folder / "mine.py"
    shutil.copytree(trained, run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(file), str(mine)))
    mine.write_text(file.read_text().replace("self.gate.sigmoid() * self", "self"))
    return run, mine


def test_a_run_records_its_methods_file(trained: Path, file: Path) -> None:
    table = tomllib.loads((trained / "config.toml").read_text())
    assert table["method"] == f"{file}:GatedLoRA"
    assert (table["r"], table["lora_alpha"]) == (2, 16.0)
    assert json.loads((trained / "summary.json").read_text())["method"] == "gated_lora"
    settings = json.loads((trained / "adapter/adapter_config.json").read_text())
    assert settings["peft_type"] == "GATED_LORA"


def test_eval_predict_and_merge_compute_what_the_run_did(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    assert lora("eval", trained) == 0
    scores = dict(map(str.split, capsys.readouterr().out.partition("\n\n")[0].splitlines()))
    assert float(scores["loss"]) == pytest.approx(summary["loss"], abs=1e-4)
    lines = (trained / "predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows]
    forget()
    assert lora("predict", trained, "--text", *texts) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows]
    forget()
    assert lora("merge", trained, "--output", tmp_path / "merged") == 0
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(tmp_path / "merged").float().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    batch = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch).logits.softmax(-1)
    torch.testing.assert_close(
        found, torch.tensor([[*row["scores"].values()] for row in rows]), atol=2e-4, rtol=0
    )


def test_an_adapter_alone_needs_its_file_named(
    trained: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("LORA_BFLOAT16", "0")  # alone it computes in the dtype of the processor
    alone = shutil.copytree(trained / "adapter", tmp_path / "alone")
    ask = ("--text", "a fine film")
    assert lora("predict", alone, *ask) == 2
    error = capsys.readouterr().err
    assert "peft_type 'GATED_LORA' is no method of ours" in error
    assert "pass --method path/to/mine.py:MyMethod" in error
    assert lora("predict", alone, *ask, "--method", f"{file}:GatedLoRA") == 0
    answer = capsys.readouterr().out
    assert lora("predict", trained, *ask) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(answer)
    assert lora("predict", alone, *ask, "--method", "lora") == 2
    assert "was trained with gated_lora. Remove it." in capsys.readouterr().err
    flags = ("--adapter", alone, "--limit", 8, "--epochs", 1, "--run-dir", tmp_path / "further")
    forget()
    assert lora("train", *flags) == 2
    assert "pass --method path/to/mine.py:MyMethod" in capsys.readouterr().err
    assert lora("train", *flags, "--method", f"{file}:GatedLoRA") == 0


def test_a_changed_file_is_not_used_unless_it_is_named(
    trained: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = edited(file, tmp_path, trained)
    ask = (run, "--text", "a fine film")
    for verb in (("eval", run), ("predict", *ask), ("merge", run, "--output", tmp_path / "m")):
        assert lora(*verb) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"RunError: {mine} has changed since {run} was trained with it")
        assert f"pass --method {mine}:GatedLoRA to use the changed one" in error
    assert not (tmp_path / "m").exists()
    assert lora("predict", *ask, "--method", f"{mine}:GatedLoRA") == 0
    ran = capsys.readouterr()
    assert "results may differ from those of the run" in ran.err
    forget()
    assert lora("predict", trained, "--text", "a fine film") == 0
    before = json.loads(capsys.readouterr().out)["scores"]
    assert json.loads(ran.out)["scores"] != before  # another equation
    forget()
    mine.write_bytes(file.read_bytes())
    assert lora("predict", *ask) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == before


def test_a_moved_file_is_named(
    trained: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, mine = edited(file, tmp_path, trained)
    mine.unlink()
    ask = ("predict", run, "--text", "a fine film")
    assert lora(*ask) == 2
    assert f"the file of its method, {mine}:GatedLoRA, does not exist" in capsys.readouterr().err
    assert lora(*ask, "--method", "lora") == 2
    assert f"was trained with {mine}:GatedLoRA. Pass --method path" in capsys.readouterr().err
    assert lora(*ask, "--method", f"{file}:GatedLoRA") == 0
    assert "note: " not in capsys.readouterr().err  # the same file in another place
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(mine), "mine.py"))
    assert lora(*ask) == 2  # a run names its file by an absolute path
    assert "does not exist any more" in capsys.readouterr().err


def test_a_run_that_was_cut_off_is_resumed(
    trained: Path,
    file: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import lora.finetune.run as room

    real = room.Record.step

    def stop(self: Any, step: Any) -> None:
        real(self, step)
        if step.step == 3:
            raise StoppedError

    run, mine = tmp_path / "run", Path(shutil.copy(file, tmp_path / "mine.py"))
    monkeypatch.setattr(room.Record, "step", stop)
    method = f"{mine}:GatedLoRA"
    with pytest.raises(StoppedError):
        lora("train", "--base", base, "--method", method, *FLAGS, "--run-dir", run)
    monkeypatch.setattr(room.Record, "step", real)
    forget()
    mine.write_text(file.read_text() + "# a remark\n")
    for named in ((), ("--method", method)):
        assert lora("train", "--resume", run, *named) == 2
        assert "Restore the file, or start a new run: lora train --config" in (
            capsys.readouterr().err
        )
    mine.unlink()
    forget()
    assert lora("train", "--resume", run, "--method", f"{file}:GatedLoRA") == 0
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (run / name).read_bytes() == (trained / name).read_bytes()


def test_it_is_compared_with_others(
    file: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    mine = Path(shutil.copy(file, tmp_path / "mine.py"))
    ask = ("compare", "--methods", "lora", f"{mine}:GatedLoRA", "--limit", 8, "--epochs", 1,
           "--r", 2, "--lora-dropout", 0.1, "--base", base,
           "--run-dir", tmp_path / "runs")  # fmt: skip
    assert lora(*ask, "--dry-run") == 0
    assert f"--run-dir {tmp_path}/runs/gated_lora-0" in capsys.readouterr().out
    assert lora(*ask) == 0
    table = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip() for line in table if line.startswith("|")]
    assert names[-2:] == ["lora", "gated_lora"]
    forget()
    assert lora(*ask) == 0  # complete, and taken as they are
    assert capsys.readouterr().err.count("already complete") == 2
    mine.write_text(mine.read_text() + "# a remark\n")
    forget()
    assert lora(*ask) == 2
    assert f"or with {mine}:GatedLoRA before that file changed" in capsys.readouterr().err


def test_a_file_of_flags_names_it(file: Path, tmp_path: Path) -> None:
    from lora.finetune.comparison.grid import parse_compare
    from lora.finetune.config import parse_run

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'method = "{file}:GatedLoRA"\nr = 3\n[methods.gated_lora]\nepochs = 7\n')
    config = parse_run(["--config", str(recipe)])
    assert (config.method, config.settings.r, config.epochs) == (f"{file}:GatedLoRA", 3, 7)
    recipe.write_text(f'[methods."{file}:GatedLoRA"]\nr = 5\n[methods.lora]\nr = 6\n')
    _, grid = parse_compare(["--config", str(recipe)])
    runs = [run for name in grid.methods for run in grid.finals(name)]
    assert [(run.method, run.settings.r) for run in runs] == [
        (f"{file}:GatedLoRA", 5),
        ("lora", 6),
    ]


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_the_fields_of_its_config_are_flags(
    future: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora.finetune.config import parse_run

    mine = tmp_path / "mine.py"
    fields = (
        "    ratio: float = 0.5\n"
        '    """Share of the gate."""\n'
        "    per_layer: typing.Dict[str, float] = field(default_factory=dict)\n"
        "    only: typing.Optional[typing.List[str]] = None\n"
        "    kind: \"typing.Literal['a', 'b']\" = \"a\"\n"
    )
    source = GATED.read_text().replace("import dataclass", "import dataclass, field")
    source = source.replace("import torch\n", "import typing\nimport torch\n")
    source = source.replace("    def __post_init__", f"{fields}\n    def __post_init__")
    head, quotes, rest = source.partition("from dataclasses")
    mine.write_text(head + future + quotes + rest)
    name = f"{mine}:GatedLoRA"
    assert lora("train", "--method", name, "--help") == 0
    text = capsys.readouterr().out
    for said in ("--ratio FLOAT", "Share of the gate.", "--per-layer", "--kind {a,b}", "--r INT"):
        assert said in text
    given = ["--method", name, "--ratio", "0.1", "--per-layer", "q_lin", "8", "--only", "a", "b"]
    settings = parse_run(given).settings
    assert (settings.ratio, settings.per_layer, settings.only) == (0.1, {"q_lin": 8.0}, ["a", "b"])


CLASS = """
import lora
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class OtherConfig(lora.AdapterConfig):
    pass

class Other(lora.Adapter):
    name, paper, Config, peft_type = "other", "none", OtherConfig, "OTHER"
    def fill(self, view, generator): pass
    def merged(self, W, b): return W, b
    @classmethod
    def size(cls, view, config, module): return 0
"""
TWO = CLASS + CLASS[CLASS.index("@") :].replace("Other", "Second").replace('"other"', '"second"')


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        (None, "gone.py:Mine", "there is no file {folder}/gone.py. Pass --method path/to/mine.py"),
        (None, "folder.py:Mine", "there is no file {folder}/folder.py"),
        (CLASS, "mine.py:Mine", "mine.py has no class Mine. Methods in it: Other."),
        (CLASS, "mine.py:OtherConfig", "is not a method: it does not inherit lora.Adapter"),
        (CLASS, "mine.py:dataclass", "is not a method: it does not inherit lora.Adapter"),
        (TWO, "mine.py", "mine.py defines 2 methods. Pass --method {folder}/mine.py:Other or"),
        ("x = 1", "mine.py", "mine.py defines no method. A method is a class that inherits"),
        ("x = 1\ny = z\n", "mine.py:M", "mine.py, line 2: NameError: name 'z' is not defined"),
        ("x = 1\ny = (\n", "mine.py:M", "mine.py, line 2: SyntaxError: '(' was never closed"),
        ("import nowhere_at_all", "mine.py:M", "line 1: ModuleNotFoundError: No module named"),
        ("raise SystemExit(3)", "mine.py:M", "mine.py, line 1: SystemExit: 3"),
        (CLASS.replace('"other"', '"lora"'), "mine.py:Other", "<class '{folder}/mine.py:Other'>"),
        (CLASS.replace('"other"', '"qlora"'), "mine.py:Other", "found 'qlora'. Change it in the"),
        (CLASS.replace('"other"', '"a/b"'), "mine.py:Other", "found 'a/b'. Change it in the class"),
        (CLASS.replace('"OTHER"', '"IA3"'), "mine.py:Other", "peft_type 'IA3' belongs to ia3"),
        (CLASS.replace("merged", "Merged"), "mine.py:Other", "does not define merged. Add it"),
        (CLASS.replace("OtherConfig, ", "dict, "), "mine.py:Other", "Config must be a dataclass"),
        (CLASS.replace("    pass", "    r: int"), "mine.py:Other", "OtherConfig.r has no default"),
        (CLASS.replace("    pass", "    note: str = ''"), "mine.py:Other", "Rename the field"),
        (
            CLASS + "from lora.methods.dora import DoRA",
            "mine.py:DoRA",
            "is a method of this package. Pass --method dora",
        ),
        (None, "nowhere_at_all.mine:Mine", "No module named 'nowhere_at_all'"),
    ],
)
def test_what_is_no_method_is_said(
    source: str | None,
    name: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.py").mkdir()
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    place = f"{tmp_path}/{name}" if ".py" in name else name
    before = dict(METHODS)
    assert lora("train", "--method", place) == 2
    error = capsys.readouterr().err
    assert error.startswith("ConfigError: ")
    assert said.format(folder=tmp_path) in error
    assert lora("methods", "check", place) == 2 or "Rename the field" in said
    assert lora("compare", "--methods", "lora", place, "--dry-run") == 2
    if source is not None and "cannot be imported" in error:
        assert before == METHODS  # what the file had defined before it failed is forgotten


def test_a_module_is_named_by_its_dotted_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora_own_pkg").mkdir()
    (tmp_path / "lora_own_pkg/mine.py").write_text(GATED.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    name = "lora_own_pkg.mine:GatedLoRA"
    assert is_outside(name)
    assert method_named(name).name == "gated_lora"
    assert recordable(name) == name


def test_a_file_is_recorded_by_its_absolute_path(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    for name in ("mine.py:GatedLoRA", "./mine.py:GatedLoRA", "mine.py", f"{file}:GatedLoRA"):
        assert recordable(name) == f"{file}:GatedLoRA"
    assert method_named("mine.py:GatedLoRA") is method_named(f"{file}:GatedLoRA")
    assert recordable("dora") == "dora"


def test_plan_and_preview_take_it(
    file: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ("--base", base, "--method", f"{file}:GatedLoRA", "--limit", 8)
    assert lora("plan", *named) == 0
    assert "gated_lora" in capsys.readouterr().out
    assert lora("data", "preview", *named) == 0


def test_a_language_model_generates_with_it(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--base", "demo-lm-tiny", "--data", "tasks/reverse", "--limit", 8, "--epochs", 1)
    more = ("--r", 2, "--answered", 2, "--max-new-tokens", 4, "--dtype", "float32")
    more = (*more, "--run-dir", run)
    assert lora("train", "--method", f"{file}:GatedLoRA", *flags, *more) == 0
    forget()
    capsys.readouterr()
    assert lora("generate", run, "--prompt", "reverse abc", "more", "--max-new-tokens", 4) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.slow
def test_the_contract_is_checked_and_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("methods", "check", f"{file}:GatedLoRA") == 0
    table = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["clause", "outcome", "reason"]
    assert len(cells) > 25
    assert {outcome for _, outcome, _ in cells[2:]} == {"passed"}


def test_a_broken_method_is_told_by_clause(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.py"
    source = file.read_text().replace("view.out_features) + 1", "view.out_features)")
    exempt = '    exempt = {"torch_compile": "a test"}\n'
    broken.write_text(source.replace("    def __init__", f"{exempt}\n    def __init__", 1))
    from lora.finetune import contract

    few = {name: contract.CLAUSES[name] for name in ("parameter_count", "torch_compile")}
    monkeypatch.setattr(contract, "CLAUSES", few)
    assert lora("methods", "check", broken) == 2
    ran = capsys.readouterr()
    row = next(line for line in ran.out.splitlines() if "parameter_count" in line)
    assert re.search(r"\| failed +\| 11 of 11 cases, first on Linear, float32: .*closed form", row)
    row = next(line for line in ran.out.splitlines() if "torch_compile" in line)
    assert re.search(r"\| exempt +\| a test", row)
    assert "ContractError: gated_lora fails 1 of the" in ran.err
