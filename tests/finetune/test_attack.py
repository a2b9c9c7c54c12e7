"""A run under attack: what was damaged, cut off or misused is named, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_cli import base, data, lora  # noqa: F401  (base is a fixture)
from test_resume import FLAGS, StoppedError, result, sigterm_after

import lora.finetune.run as room
from lora.errors import RunError, TrainingError
from lora.finetune import distributed, selection, state


@pytest.fixture(scope="module")
def flags(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:  # noqa: F811
    folder = data(tmp_path_factory.mktemp("attacked") / "data")
    return ("--base", base, "--data", folder, *FLAGS, "--keep-best", 0)


@pytest.fixture(scope="module")
def whole(flags: tuple[Any, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    assert lora("train", *flags, "--run-dir", run) == 0
    return run


def train_until(step: int, *arguments: object) -> None:
    """`lora train`, cut off once the step is recorded."""
    with pytest.MonkeyPatch.context() as patch:
        real = room.Record.step

        def stop(self: Any, done: Any) -> None:
            real(self, done)
            if done.step == step:
                raise StoppedError

        patch.setattr(room.Record, "step", stop)
        with pytest.raises(StoppedError):
            lora("train", *arguments)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_damaged_checkpoint_of_a_later_step_pushes_no_whole_one_out(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train_until(9, *flags, "--run-dir", run)
    assert state.steps(run / "checkpoints") == [8]
    (run / "checkpoints" / "step-00000008" / "training.json").write_text("{}")
    train_until(7, "--resume", run)
    assert state.find(run / "checkpoints")[0] == run / "checkpoints" / "step-00000006"
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_short_memory_in_an_evaluation_costs_no_checkpoint(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def short(*_: Any, **__: Any) -> Any:
        raise MemoryError

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(room, "evaluate", short)
        assert lora("train", *flags, "--run-dir", run) == 2
    err = said(capsys)
    assert "evaluating after step 3: out of memory" in err
    assert "step 4" not in err
    assert "--micro-batch-size" not in err
    assert f"Last good checkpoint: {run}/checkpoints/step-00000003." in err
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_a_run_that_keeps_no_checkpoint_has_one_until_its_result_is_written(
    flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise StoppedError

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(room, "write_file", stop)
        with pytest.raises(StoppedError):
            lora("train", *flags, "--keep-last", 0, "--run-dir", run)
    assert state.find(run / "checkpoints")[0] == run / "checkpoints" / "step-00000009"
    assert lora("train", "--resume", run) == 0
    assert not (run / "checkpoints").exists()


def test_the_best_checkpoint_is_handed_on_whole_or_not_at_all(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    monkeypatch.setattr(selection, "ranked", list)  # the first is the best
    train_until(8, *flags, "--final", "best", "--run-dir", run)
    path = state.checkpoint_folder(run / "checkpoints", 3) / state.TENSORS_FILE
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    capsys.readouterr()
    assert lora("train", "--resume", run) == 2
    err = said(capsys)
    assert "step-00000003, the best, is damaged: training.safetensors was changed" in err
    assert not (run / "adapter").exists()


def test_missing_metrics_are_named(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_until(5, *flags, "--run-dir", run)
    (run / "metrics.jsonl").unlink()
    assert lora("train", "--resume", run) == 2
    err = said(capsys)
    assert "metrics.jsonl cannot be read: No such file" in err
    assert "Free space" not in err


def test_an_error_of_another_file_is_not_laid_on_the_metrics(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error", "elsewhere")

    monkeypatch.setattr(room, "evaluate", fail)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 2
    err = said(capsys)
    assert "elsewhere" in err
    assert "metrics.jsonl" not in err


def test_a_run_stopped_by_a_signal_records_what_an_undisturbed_one_does(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        sigterm_after(4, patch)
        assert lora("train", *flags, "--run-dir", run) == 143
    assert lora("train", "--resume", run) == 0
    assert result(run) == result(whole)


def test_a_run_of_relative_folders_goes_on_from_elsewhere_to_the_same_summary(
    flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(flags[1], tmp_path / "base")
    shutil.copytree(flags[3], tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    given = ("--base", "base", "--data", "data", *flags[4:], "--run-dir")
    assert lora("train", *given, "one") == 0
    train_until(5, *given, "two")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "two", tmp_path / "elsewhere" / "three")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lora("train", "--resume", "three") == 0
    assert result(tmp_path / "elsewhere" / "three") == result(tmp_path / "one")


def test_a_comparison_of_runs_that_stop_early_has_its_table() -> None:
    from lora.finetune.comparison.analysis import analysis_of
    from lora.finetune.comparison.runs import Run
    from lora.finetune.comparison.tables import rows

    common = {"metrics": {"accuracy": 0.5}, "split": "test", "trainable": 1, "parameters": 2,
              "learning_rate": 0.1, "train_seconds": 1.0, "peak_bytes": 1, "base": "b",
              "data": "a", "rows": 2}  # fmt: skip
    summaries: Any = [
        {"method": "lora", "seed": 0, "evaluations": [{"loss": 2.0}, {"loss": 1.0}], **common},
        {"method": "lora", "seed": 1, "evaluations": [{"loss": 1.0}], **common},
    ]
    analysis = analysis_of([Run(Path("run"), summary) for summary in summaries])
    assert rows(analysis)[1][4] == "1.500 1.000"


def test_trackers_that_do_not_begin_leave_no_run_directory(
    flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import lora.finetune.trackers as trackers

    def fail(*_: Any) -> Any:
        raise PermissionError("log in")

    monkeypatch.setattr(trackers, "_tracker", fail)
    given = (*flags, "--trackers", "tensorboard", "--run-dir", tmp_path / "run")
    assert lora("train", *given) == 2
    assert "log in" in said(capsys)
    assert not (tmp_path / "run").exists()


def test_an_unrelated_file_beside_an_adapter_is_not_read(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "adapter", tmp_path / "adapter")
    for text in ("[no toml", "labels = 5", "labels = 'xy'"):
        (tmp_path / "config.toml").write_text(text)
        run = tmp_path / f"run{text[-1]}"
        given = (*flags[:4], "--epochs", 1, "--adapter", tmp_path / "adapter", "--run-dir", run)
        assert lora("train", *given) == 0, said(capsys)


def test_what_was_half_removed_is_called_so(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.removed").mkdir()
    assert state.find(tmp_path) == (None, [])


def test_eval_of_a_run_cut_off_in_writing_its_adapter(
    flags: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train_until(5, *flags, "--run-dir", run)
    (run / "adapter").mkdir()
    assert lora("eval", run) == 0, said(capsys)


def test_a_word_that_is_a_pattern_in_the_adapters_file_stays_one(
    flags: tuple[Any, ...], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["target_modules"] = "distilbert.transformer.layer.0.attention.q_lin"
    path.write_text(json.dumps(settings))
    given = (*flags[:4], "--epochs", 1, "--adapter", tmp_path / "adapter")
    assert lora("train", *given, "--run-dir", tmp_path / "run") == 2
    assert "Leave it out" not in said(capsys)
    settings["adapter"] = 5
    (tmp_path / "a.toml").write_text("adapter = 5")
    assert lora("train", "--config", tmp_path / "a.toml") == 2
    assert "Traceback" not in said(capsys)


def test_a_run_is_its_processs_own_until_the_result_is_written(
    flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run, real = tmp_path / "run", room.write_file

    def write(path: Path, payload: bytes) -> None:
        with pytest.raises(RunError, match="another process"), room.alone(run):
            pass
        real(path, payload)

    monkeypatch.setattr(room, "write_file", write)
    assert lora("train", *flags, "--run-dir", run) == 0
    (run / "summary.json").rename(run / "summary")

    def add_adapter(*given: Any) -> Any:  # while this process reads, another one ends
        (run / "summary").rename(run / "summary.json")
        return real_add_adapter(*given)

    real_add_adapter = room.add_adapter
    monkeypatch.setattr(room, "add_adapter", add_adapter)
    before = (run / "metrics.jsonl").read_bytes()
    assert lora("train", "--resume", run) == 2
    assert "is complete" in said(capsys)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_a_run_guessed_of_its_data_stays_in_its_summary(
    flags: tuple[Any, ...], tmp_path: Path
) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    rows = "".join(f"film {i}\t{i / 7}\n" for i in range(20))
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(f"text\tlabel\n{rows}")
    others = flags[4 : flags.index("--class-weights")]  # a regression has no classes
    train_until(5, *flags[:2], "--data", folder, *others, "--run-dir", run)
    assert lora("train", "--resume", run) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["note"] == "the labels are fractional numbers, so the task is regression"


def test_two_tables_of_patterns_have_flags_of_their_own(tmp_path: Path) -> None:
    from lora.finetune.config import parse_run

    path = tmp_path / "run.toml"
    path.write_text("[rank_pattern]\nlin2 = 1\n[alpha_pattern]\nlin2 = 4\n")
    settings = parse_run(["--config", str(path)]).settings
    assert (settings.rank_pattern, settings.alpha_pattern) == ({"lin2": 1}, {"lin2": 4})
    settings = parse_run(["--config", str(path), "--rank-pattern", "lin1", "3"]).settings
    assert (settings.rank_pattern, settings.alpha_pattern) == ({"lin1": 3}, {"lin2": 4})


def test_a_rank_that_is_gone_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(*_: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr(distributed, "size", lambda: 2)
    for name, call in (("all_reduce", distributed.total), ("broadcast", distributed.same)):
        monkeypatch.setattr(distributed.dist, name, reset)
        with pytest.raises(TrainingError, match="waited for another rank"):
            call([torch.zeros(3)])


RANKS = {
    "an evaluation in which a rank is killed": """
import lora.finetune.run as room
real = room.evaluate
def evaluate(*arguments, **more):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return real(*arguments, **more)
room.evaluate = evaluate
""",
    "an adapter without a gradient": """
import lora.finetune.train as room
from lora.errors import TargetError
def dead(model):
    raise TargetError("1 of 9 trained modules have no gradient")
room.check_alive = dead
""",
    "a signal to both": """
import signal
import lora.finetune.run as room
real = room.Record.step
def step(self, done):
    real(self, done)
    if done.step == 2:
        signal.raise_signal(signal.SIGTERM)
room.Record.step = step
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "words", "left"),
    [
        ("an evaluation in which a rank is killed", [2, -9],
         ["waited for another rank", "Resume with lora train --resume"], [3]),
        ("an adapter without a gradient", [2, 2], ["have no gradient"], []),
        ("a signal to both", [143, 143], ["finishing the step", "after step 3 of 9"], [3]),
    ],
)  # fmt: skip
def test_what_two_ranks_meet_is_said_once(
    what: str, codes: list[int], words: list[str], left: list[int], flags: tuple[Any, ...],
    tmp_path: Path,
) -> None:  # fmt: skip
    run = tmp_path / "run"
    code = f"import os, sys\n{RANKS[what]}\nfrom lora.finetune.cli import main\n"
    code += "sys.exit(main(sys.argv[1:]))"
    given = ["train", *map(str, flags), "--run-dir", str(run)]
    port = str(random.randrange(20000, 30000))
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, *given], text=True, stderr=subprocess.PIPE, cwd=ROOT,
            stdout=subprocess.DEVNULL, env=os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "MASTER_ADDR": "localhost", "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    err = "".join(process.communicate(timeout=120)[1] for process in both)
    assert [process.returncode for process in both] == codes, err
    assert "Traceback" not in err
    assert "lower --learning-rate" not in err
    for some in words:
        assert " ".join(err.split()).count(some) == 1, err
    assert state.steps(run / "checkpoints") == left
