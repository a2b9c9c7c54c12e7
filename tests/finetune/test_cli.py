"""The commands as a user types them: exit codes, messages, and nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import ROOT, save_distilbert
from test_documents import SUMMARY

import lora.methods
from lora.finetune.cli import VERBS, main
from lora.finetune.record import answers_of
from lora.method import METHODS

REVIEWS = ("good", "fine", "splendid", "bad", "poor", "dreadful")


def data(folder: Path, rows: int = 24) -> str:
    """A folder of train, dev and test files that six words decide."""
    folder.mkdir()
    for split in ("train", "dev", "test"):
        lines = [f"a {REVIEWS[i % 6]} film, number {i}\t{int(i % 6 < 3)}" for i in range(rows)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def base(auto_dtype: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_distilbert(tmp_path_factory.mktemp("base")))


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that later tests read."""
    folder = tmp_path_factory.mktemp("trained")
    run = folder / "run"
    arguments = ("--base", base, "--data", data(folder / "data"), "--run-dir", run, "--r", 2)
    assert lora("train", *arguments, "--epochs", 2, "--learning-rate", 0.01) == 0
    return run


def test_a_run_leaves_all_its_files(trained: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        "adapter", "checkpoints", "config.toml", "environment.json", "metrics.jsonl",
        "predictions.jsonl", "summary.json",
    }  # fmt: skip
    assert {path.name for path in (trained / "adapter").iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    scores = [line for line in lines if line["kind"] == "evaluation"]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert [(e["step"], e["epoch"]) for e in scores] == [(2, 1), (4, 2)]
    assert all(0 <= s["padding"] < 1 and s["tokens"] > 0 for s in steps)
    first = [s for s in steps if s["epoch"] == 1]
    mean = sum(s["loss"] * s["examples"] for s in first) / sum(s["examples"] for s in first)
    assert scores[0]["loss"] == pytest.approx(mean)
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["evaluations"] == [
        {k: v for k, v in row.items() if k != "kind"} for row in scores
    ]
    assert summary["split"] == "test"
    assert summary["rows"] == 24
    assert summary["peak_bytes"] > 0
    answers = [
        json.loads(line) for line in (trained / "predictions.jsonl").read_text().splitlines()
    ]
    right = sum(a["label"] == a["prediction"] for a in answers)
    assert summary["metrics"]["accuracy"] == pytest.approx(right / 24)
    environment = json.loads((trained / "environment.json").read_text())
    assert environment["torch"] == torch.__version__


FAMILY = {
    "adalora": "--init-r 3 --target-r 2 --tinit 1 --tfinal 1",
    "bitfit": "--small",
    "dora": "--r 2 --lora-dropout 0.1 --layers-to-transform 1",
    "full": "",
    "head": "",
    "hira": "--r 2",
    "ia3": "--target-modules k_lin lin2 --feedforward-modules lin2",
    "lora": "--r 2 --bias all --trainable-token-indices 2307 3835 --rank-pattern lin2 1",
    "ln_tuning": "--target-modules sa_layer_norm output_layer_norm",
    "topk": "--k 1",
    "vera": "--r 8 --no-save-projection",
    "lora eva": "--r 2 --init-lora-weights eva --use-rslora",
    "lora lora_ga": "--r 2 --init-lora-weights lora_ga --loraplus-lr-ratio 16",
    "lora pissa": "--r 2 --init-lora-weights pissa --use-lorafa",
    "lora pissa in nf4": "--r 2 --init-lora-weights pissa --quantize nf4 --dense lin1",
    "lora loftq": "--r 2 --init-lora-weights loftq_2 --quantize nf4 --target-modules q_lin lin2",
}


def test_every_method_is_trained_below() -> None:
    # tokens trains no head: see test_language's runs
    assert {label.partition(" ")[0] for label in FAMILY} == set(METHODS) - {"tokens"}


@pytest.mark.slow
@pytest.mark.parametrize("label", FAMILY)
def test_a_run_of_every_method_repeats_and_comes_back(
    label: str,
    base: str,
    auto_dtype: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    method, run, again = label.partition(" ")[0], tmp_path / "run", tmp_path / "again"
    given = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 2, "--method", method)
    assert lora("train", *given, "--run-dir", run, *FAMILY[label].split()) == 0
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert lora("eval", run) == 0  # the model of the directory scores as the one that trained
    assert f"accuracy {summary['metrics']['accuracy']:.4f}" in capsys.readouterr().out
    # A start away from zero is filed as one wider update, whose products round elsewhere.
    rounding = 1e-5 if auto_dtype == "float32" else torch.finfo(torch.bfloat16).eps
    assert reopened_loss(run) == pytest.approx(summary["loss"], rel=rounding)
    assert lora("train", "--config", run / "config.toml", "--run-dir", again) == 0
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "config.toml"):
        assert (again / name).read_bytes() == (run / name).read_bytes()


def reopened_loss(run: Path) -> float:
    from lora.finetune.data.corpus import Columns
    from lora.finetune.source import open_source
    from lora.finetune.trained import rescore

    return rescore(open_source(run), None, None, Columns())[0]["loss"]


def test_the_config_reads_back_to_the_same_run(trained: Path, tmp_path: Path) -> None:
    table = tomllib.loads((trained / "config.toml").read_text())
    assert table["labels"] == ["0", "1"]
    assert table["task"] == "classification"
    assert sorted(table["modules_to_save"]) == ["classifier", "pre_classifier"]
    assert "run_dir" not in table
    again = tmp_path / "again"
    assert lora("train", "--config", trained / "config.toml", "--run-dir", again) == 0
    assert (again / "config.toml").read_text() == (trained / "config.toml").read_text()
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (trained / name).read_bytes()
    assert (again / "predictions.jsonl").read_text() == (trained / "predictions.jsonl").read_text()


@pytest.mark.slow
def test_the_same_seed_is_the_same_bits_in_another_process(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "other"
    command = [sys.executable, "-m", "lora", "train", "--config", str(trained / "config.toml")]
    done = subprocess.run(
        [*command, "--run-dir", str(run)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert f"recorded in {run}\nnext: lora predict {run} --text ..." in done.stdout
    first = safetensors.torch.load_file(trained / "adapter/adapter_model.safetensors")
    second = safetensors.torch.load_file(run / "adapter/adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_eval_repeats_the_summary_and_scores_the_predictions(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    wanted = f"accuracy {summary['metrics']['accuracy']:.4f}"
    assert lora("eval", trained) == 0
    assert wanted in capsys.readouterr().out
    assert lora("eval", "--predictions", trained / "predictions.jsonl") == 0
    assert wanted in capsys.readouterr().out
    assert lora("eval", trained, "--split", "dev") == 0
    assert "accuracy" in capsys.readouterr().out
    assert lora("eval", trained, "--predictions", "x.jsonl") == 2
    assert lora("eval") == 2


def plain_scores(folder: Path, texts: list[str]) -> Any:
    """What the folder's model says of the texts, by transformers alone."""
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return logits.softmax(-1), model.config.id2label


@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "full", "qlora"])
def test_merge_writes_a_plain_model(
    method: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    given = ("--base", base, "--data", data(tmp_path / "data"), "--run-dir", run)
    assert lora("train", *given, "--method", method, "--dtype", "float32") == 0
    how = ("--dequantize",) if method == "qlora" else ()
    capsys.readouterr()
    if how:
        assert lora("merge", run, "--output", out) == 2
        assert f"lora merge {run} --dequantize" in capsys.readouterr().err
        assert not out.exists()
    assert lora("merge", run, "--output", out, *how) == 0
    said = capsys.readouterr().out
    assert {"full": "nothing to merge", "qlora": "12 dequantized layers"}.get(
        method, f"into the base {base}"
    ) in said
    assert ("outputs changed by" in said) == (method != "full")
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    scores, names = plain_scores(out, [row["text"] for row in rows])
    for row, found in zip(rows, scores.tolist(), strict=True):
        assert found == pytest.approx(list(row["scores"].values()), abs=2e-4)
        assert names[max(range(2), key=found.__getitem__)] == row["prediction"]
    assert lora("merge", run, "--output", out, *how) == 2
    assert "exists: no model is overwritten" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"data", "run", "out"}


BREAKS = ("\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c")
"""What str.splitlines() cuts at besides \\n and \\r."""


def test_texts_with_unicode_line_breaks_train_merge_and_score(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    data(folder)
    for path in folder.iterdir():
        rows = path.read_text("utf-8").split("\n")
        some = [row.replace(" film", f"{BREAKS[i % 6]}film") for i, row in enumerate(rows)]
        path.write_text("\n".join(some), "utf-8")
    given = ("--base", base, "--data", folder, "--run-dir", run, "--r", 2, "--epochs", 1)
    assert lora("train", *given) == 0
    kept = [row["text"] for row in answers_of(run, "classification", 99)]
    assert len(kept) == 24
    assert {mark for mark in BREAKS if any(mark in text for text in kept)} == {*BREAKS}
    assert lora("merge", run, "--output", tmp_path / "out") == 0
    assert lora("plot", run) == 0
    capsys.readouterr()
    assert lora("eval", "--predictions", run / "predictions.jsonl") == 0
    scores = capsys.readouterr().out.partition("\n\n")[0]  # the tables of the classes come after
    again = dict(line.split() for line in scores.split("\n"))
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    assert again == {name: f"{value:.4f}" for name, value in metrics.items()}


def test_preview_plan_and_train_say_what_was_taken(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"a {REVIEWS[i % 6]} film {i},{('bad', 'good')[i % 6 < 3]}" for i in range(40)]
    path = tmp_path / "x.csv"
    path.write_text("\n".join(["message,category", *rows]))
    said = [
        f"data: {path}: a header, the text in column message, the label in column category",
        "data: train: 32 rows, by class: bad 14, good 18",
        "data: dev: 4 rows, by class: bad 3, good 1",
        "data: test: 4 rows, by class: bad 2, good 2",
    ]
    given = ("--base", base, "--data", path)
    assert lora("data", "preview", *given, "--count", 2) == 0
    shown = capsys.readouterr().out.split("\n")
    assert shown[:4] == said
    assert len([line for line in shown if " film " in line]) == 2
    for verb in (("plan",), ("train", "--run-dir", tmp_path / "run", "--r", 2, "--epochs", 1)):
        assert lora(*verb, *given) == 0
        shown = "".join(capsys.readouterr()).split("\n")
        assert [line for line in shown if line.startswith("data: ")] == said
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert (config["text_column"], config["label_column"]) == ("message", "category")
    other = tmp_path / "other.csv"
    other.write_text("\n".join(rows[2:5]))
    assert lora("predict", tmp_path / "run", "--data", other) == 0
    shown = capsys.readouterr()
    assert f"{other}: no header, the text in column 0, the label in column 1" in shown.err
    found = [json.loads(line) for line in shown.out.split("\n") if line]
    assert [(row["text"], row["label"]) for row in found] == [
        tuple(row.split(",")) for row in rows[2:5]
    ]


def test_dequantize_is_of_a_packed_base(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("merge", trained, "--output", tmp_path / "out", "--dequantize") == 2
    assert "--dequantize has no effect: the base of" in capsys.readouterr().err


def test_eval_says_where_the_data_is_not_what_the_run_learned_from(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(data(tmp_path / "data"))
    run = tmp_path / "run"
    assert lora("train", "--base", base, "--data", folder, "--run-dir", run, "--epochs", 1) == 0
    assert lora("eval", run) == 0
    assert "has changed since" not in capsys.readouterr().err
    (file,) = folder.glob("train.*")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], *lines[2:]]))
    assert lora("eval", run) == 0
    assert "has changed since" in capsys.readouterr().err
    (run / "environment.json").unlink()  # of a run that does not say
    assert lora("eval", run) == 0


def test_a_training_that_diverged_is_called_so(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--run-dir", run)
    assert lora("train", *arguments, "--learning-rate", 10, "--warmup", 0) == 0
    assert "the training diverged" in capsys.readouterr().err
    assert "diverged" in json.loads((run / "summary.json").read_text())["note"]


def test_eval_of_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prediction": "The cat sat.", "references": ["a cat sat", "dogs"]}\n')
    assert lora("eval", "--predictions", path, "--task", "text") == 0
    out = capsys.readouterr().out
    assert "exact_match 1.0000" in out
    assert "bleu " in out
    assert "rougeL " in out


def test_predict_texts_and_files(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("predict", trained, "--text", "a good film", "a bad film") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["a good film", "a bad film"]
    for row in rows:
        assert row["scores"].keys() == {"0", "1"}
        assert sum(row["scores"].values()) > 0.99
        assert row["prediction"] == max(row["scores"], key=row["scores"].__getitem__)
    (tmp_path / "x.tsv").write_text("text\na good film\na bad film\n")
    out = tmp_path / "out.jsonl"
    assert lora("predict", trained, "--data", tmp_path / "x.tsv", "--output", out) == 0
    assert f"written: {out}" in capsys.readouterr().out
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert lora("predict", trained, "--data", tmp_path / "x.tsv", "--output", out) == 2
    assert "exists" in capsys.readouterr().err
    assert lora("predict", trained) == 2
    assert lora("predict", trained, "--text", "a", "b", "--pair", "c") == 2


def test_other_tasks(base: str, tmp_path: Path) -> None:
    """Three classes on pairs; a regression with its correlations."""
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    rows = [
        {"premise": f"it is {i}", "hypothesis": f"it was {i}", "label": "abc"[i % 3]}
        for i in range(12)
    ]
    for split in ("train", "dev"):
        (pairs / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = tmp_path / "pairs-run"
    arguments = ("--base", base, "--data", pairs, "--epochs", 1, "--run-dir", run)
    assert lora("train", *arguments) == 0
    first = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    assert first["pair"] == "it was 0"
    assert list(first["scores"]) == ["a", "b", "c"]
    assert lora("predict", run, "--text", "it is", "--pair", "it was") == 0
    quantity = tmp_path / "quantity"
    quantity.mkdir()
    lines = ["text\tlabel", *(f"{'very ' * (i % 5)}good\t{i % 5}.5" for i in range(20))]
    for split in ("train", "dev"):
        (quantity / f"{split}.tsv").write_text("\n".join(lines))
    run = tmp_path / "quantity-run"
    arguments = ("--base", base, "--data", quantity, "--epochs", 1, "--run-dir", run)
    assert lora("train", *arguments) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["metrics"]) == {"pearson", "spearman", "mse"}
    assert lora("eval", run) == 0


def test_bfloat16_trains(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--dtype", "bfloat16")
    assert lora("train", *arguments, "--epochs", 1, "--run-dir", run) == 0
    stored = safetensors.torch.load_file(run / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_qlora_is_lora_on_a_packed_base(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 1)
    for run, flags in {
        "compare/qlora-0": ("--method", "qlora"),
        "flags": ("--method", "lora", "--quantize", "nf4"),
        "dense": ("--quantize", "nf4", "--dense", "q_lin"),
    }.items():
        assert lora("train", *arguments, *flags, "--run-dir", tmp_path / run) == 0
        assert lora("eval", tmp_path / run) == 0
        assert lora("predict", tmp_path / run, "--text", "a good film") == 0
    answers = [tmp_path / run / "predictions.jsonl" for run in ("compare/qlora-0", "flags")]
    assert answers[0].read_text() == answers[1].read_text()
    written = tomllib.loads((tmp_path / "dense" / "config.toml").read_text())
    assert (written["quantize"], written["dense"]) == ("nf4", ["q_lin"])
    capsys.readouterr()
    assert lora("train", *arguments, "--dense", "q_lin") == 2
    assert "Set --quantize nf4" in capsys.readouterr().err
    assert lora("train", *arguments, "--method", "full", "--quantize", "nf4") == 2
    assert "cannot train" in capsys.readouterr().err
    # The run above is complete, so that the comparison starts no process.
    compared = ("--methods", "qlora", "--seeds", 0, "--run-dir", tmp_path / "compare")
    assert lora("compare", *arguments, *compared) == 0
    assert "| qlora " in capsys.readouterr().out


def test_auto_is_what_the_hardware_multiplies(
    base: str, auto_dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 1)
    runs = {dtype: tmp_path / dtype for dtype in ("auto", auto_dtype)}
    for dtype, run in runs.items():
        assert lora("train", *arguments, "--dtype", dtype, "--run-dir", run) == 0
    stated, meant = ((run / "config.toml").read_text() for run in runs.values())
    assert stated == meant
    assert f'dtype = "{auto_dtype}"' in stated
    steps = [(run / "predictions.jsonl").read_text() for run in runs.values()]
    assert steps[0] == steps[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_BFLOAT16", "yes")
        assert lora("train", *arguments, "--run-dir", tmp_path / "no") == 2
    assert "LORA_BFLOAT16 is 'yes' in the environment. Set it to 1 or 0" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(
    base: str, auto_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the compiler that changes nothing; test_train has the one that users get."""
    compiled, compile_ = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self, **how: (compiled.append(how), compile_(self, backend="eager", **how))[1],
    )
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 2, "--r", 2)
    losses = {}
    for flag in ("--compile", "--no-compile"):
        run = tmp_path / flag
        assert lora("train", *arguments, "--learning-rate", 0.01, flag, "--run-dir", run) == 0
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses[flag] = [line["loss"] for line in lines if line["kind"] == "step"]
        assert compiled == [{"dynamic": True}]
    # The compiler computes torch operations, the other run kernels, which round elsewhere.
    rounding = 1e-5 if auto_dtype == "float32" else torch.finfo(torch.bfloat16).eps
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], rel=rounding)
    for run in (tmp_path / "--compile", tmp_path / "--no-compile"):
        assert lora("eval", run) == 0


@pytest.mark.slow
def test_compare_makes_a_table_and_takes_complete_runs_as_they_are(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f"base = {json.dumps(base)}\ndata = {json.dumps(data(tmp_path / 'data'))}\nepochs = 1\n"
        "seeds = [0, 1]\n[methods.lora]\nr = 2\nlearning_rate = 0.01\n"
        "[methods.full]\nlearning_rate = 0.001\n"
    )
    runs = tmp_path / "runs"
    arguments = ("compare", "--config", config, "--run-dir", runs)
    assert lora(*arguments, "--dry-run") == 0
    assert capsys.readouterr().out.count("lora train") == 4
    assert not runs.exists()
    assert lora(*arguments, "--lora-alpha", 4) == 0
    out = capsys.readouterr().out
    assert "lora" in out
    assert "full" in out
    assert f"next: lora report {runs}" in out
    assert {path.name for path in runs.iterdir()} == {
        "lora-0", "lora-1", "full-0", "full-1", "comparison.json", "comparison.md", "loss.png",
        "accuracy.png", ".locks",
    }  # fmt: skip
    table = (runs / "comparison.md").read_text()
    assert table.count("\n| lora ") == 1
    assert "±" in table
    rates = {
        method["name"]: method["summaries"][0]["learning_rate"]
        for method in json.loads((runs / "comparison.json").read_text())["methods"]
    }
    assert rates == {"lora": 0.01, "full": 0.001}
    table = tomllib.loads((runs / "lora-0" / "config.toml").read_text())
    assert table["lora_alpha"] == 4
    before = (runs / "full-1" / "summary.json").read_bytes()
    assert lora(*arguments, "--lora-alpha", 4) == 0
    assert capsys.readouterr().err.count("already complete") == 4
    assert (runs / "full-1" / "summary.json").read_bytes() == before
    assert lora(*arguments, "--lora-alpha", 5) == 2
    assert "lora-0 holds a run with other settings" in capsys.readouterr().err
    # a run that was cut off goes on, to the same result
    (runs / "lora-0" / "summary.json").unlink()
    adapter = (runs / "lora-0" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert lora(*arguments, "--lora-alpha", 4) == 0
    assert "interrupted, resuming" in capsys.readouterr().err
    assert (runs / "lora-0" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert lora("plot", runs / "lora-0", runs / "full-0", "--output", tmp_path / "pictures") == 0
    for name in ("loss.png", "accuracy.png"):
        picture = (tmp_path / "pictures" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 5000


def test_help_and_unknown_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("--help") == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    for verb in VERBS:
        if verb != "methods":
            assert lora(verb, "--help") == 0
    assert lora("methods") == 0
    assert "BA" in capsys.readouterr().out.replace(" ", "")
    assert lora("trian") == 2
    assert "there is no command 'trian'" in capsys.readouterr().err
    assert lora() == 2


BROKEN = {
    "a pattern that matches nothing": (("--target-modules", "q_proj"), "q_lin ×2"),
    "r below 1": (("--r", "0"), "r must be a whole number of at least 1, found 0"),
    "r that is a word": (("--r", "four"), "four"),
    "an unknown flag": (("--rank", "4"), "--rank"),
    "an unknown method": (
        ("--method", "dropconnect"),
        "'dropconnect' is unknown. Methods",
    ),
    "an unknown task": (("--task", "chess"), "chess"),
    "a flag of another method": (("--method", "full", "--r", "4"), "--r"),
    "no epoch": (("--epochs", "0"), "epochs must be"),
    "a rate that is no number": (("--learning-rate", "nan"), "--learning-rate must be"),
    "a missing column": (("--label-column", "stars"), "--label-column stars: no such column"),
    "a missing file": (("--data", "nowhere.tsv"), "no such file or folder"),
    "a hub that is away": (("--base", "gpt2"), "does not answer"),
    "a data hub that is away": (("--data", "glue/sst2"), "Run lora train --data demo"),
    "a base that is none": (("--base", "/no/such/folder"), "no such folder"),
    "a missing config": (("--config", "nowhere.toml"), "nowhere.toml cannot be read"),
    "a length past the positions": (("--max-length", "5000"), "has 512 positions"),
    "a label set that is another": (("--labels", "no", "yes"), "is outside the set no, yes"),
    "a label given twice": (("--labels", "0", "0"), "labels must be distinct"),
    "a seed past its range": (
        ("--seed", str(2**63)),
        "--seed must be less than 9,223,372,036",
    ),
    "an argument that is no text": (("--note", "\udcff"), "is not in this system's encoding"),
    "a rank past the memory": (("--r", str(10**9)), "GiB as set, the machine has"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_input_is_named_and_leaves_nothing(
    name: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra, words = BROKEN[name]
    run = tmp_path / "run"
    own = () if "--data" in extra else ("--data", data(tmp_path / "data"))
    arguments = ("--base", base, *own, "--run-dir", run)
    assert lora("train", *arguments, *extra) == 2
    err = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in err
    assert "Traceback" not in err
    assert not run.exists()


def test_a_broken_config_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    for content, words in {
        "r = ": "is not valid TOML",
        "learning_rat = 1": "a lora run has no key learning_rat. Did you mean learning_rate?",
        "[optimizer]\nlr = 1": "a lora run has no key optimizer",
        'r = "four"': "r must be a whole number",
        "epochs = 1.5": "epochs must be",
        "note = true": "note must be a text",
        "methods = 3": "methods must be tables",
        "x = " + "[" * 100_000: "is not valid TOML",
    }.items():
        path.write_text(content)
        assert lora("train", "--config", path, "--run-dir", tmp_path / "run") == 2
        assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
    path.write_bytes(b"\xff\xfe")
    assert lora("train", "--config", path) == 2
    assert lora("train", "--config") == 2
    assert not (tmp_path / "run").exists()


def test_a_regression_that_diverges_stops_the_run(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["text\tlabel", *(f"{'very ' * (i % 5)}good\t{i % 5}.5" for i in range(20))]
    (tmp_path / "data").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "data" / f"{split}.tsv").write_text("\n".join(lines))
    run = tmp_path / "run"
    arguments = ("--base", base, "--data", tmp_path / "data", "--epochs", 1, "--run-dir", run)
    assert lora("train", *arguments, "--batch-size", 20, "--learning-rate", "1e30") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "TrainingError: evaluating after step 1: the loss" in err
    assert "Last good checkpoint: " in err
    assert json.loads((run / "diverged.json").read_text())["step"] == 1
    assert lora("runs", tmp_path) == 0
    assert "diverged after step 1 of 1" in capsys.readouterr().out
    asked = json.loads((run / "environment.json").read_text())["asked"]
    assert asked["max_length"] is None
    assert "learning_rate" not in asked  # it was given


@pytest.mark.slow
def test_a_damaged_summary_is_called_so_and_the_run_done_anew(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    arguments = ("compare", "--base", base, "--data", data(tmp_path / "data"), "--run-dir", runs)
    arguments = (*arguments, "--epochs", 1, "--methods", "lora")
    assert lora(*arguments) == 0
    path = runs / "lora-0" / "summary.json"
    whole = json.loads(path.read_text())
    for content in ("{", "", "[" * 99_999, json.dumps(whole | {"task": 1}),
                    json.dumps(whole | {"metrics": {"accuracy": "high"}})):  # fmt: skip
        path.write_text(content)
        assert lora("eval", "--predictions", runs / "lora-0" / "predictions.jsonl") == 2
        assert "summary.json is damaged" in capsys.readouterr().err
    assert lora(*arguments) == 0
    assert "interrupted, resuming" in capsys.readouterr().err
    assert json.loads(path.read_text())["metrics"] == whole["metrics"]
    (runs / "lora-0" / "config.toml").unlink()
    assert lora(*arguments) == 2
    assert "is not a run: it has no config.toml" in capsys.readouterr().err


def test_comparisons_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    for content, words in {
        "seeds = []": "seeds must be at least one whole number",
        "seeds = 'a'": "seeds must be at least one whole number",
        "rates = 'a'": "rates must be auto, or numbers above 0",
        "methods = 3": "methods must be tables",
        "r = " + "9" * 5000: "is not valid TOML",
    }.items():
        path.write_text(content)
        assert lora("compare", "--config", path, "--run-dir", tmp_path / "runs") == 2
        assert words in capsys.readouterr().err
    path.write_text(f"run_dir = {json.dumps(str(tmp_path / 'there'))}")
    assert lora("compare", "--config", path, "--dry-run") == 0
    assert f"{tmp_path / 'there'}/lora-0" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_run_directories_that_cannot_be(
    trained: Path, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train", "--base", base, "--data", data(tmp_path / "data"))
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert lora(*arguments, "--run-dir", trained) == 2
    assert "exists: no run is overwritten" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    (tmp_path / "file").write_text("in the way")
    for folder, words in ((tmp_path / "file" / "run", "cannot be made"), ("/", "exists")):
        assert lora(*arguments, "--run-dir", folder) == 2
        assert words in capsys.readouterr().err
    for verb in ("eval", "predict", "plot"):
        extra = ("--text", "x") if verb == "predict" else ()
        assert lora(verb, tmp_path / "nowhere", *extra) == 2
        assert "run directory" in capsys.readouterr().err


def test_a_damaged_adapter_in_a_run_is_named(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert lora("eval", run) == 2
    assert "CheckpointError" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says the step, the rate and the last good state, whose adapter loads."""
    run = tmp_path / "run"
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--run-dir", run)
    arguments = (*arguments, "--method", "full", "--max-grad-norm", "1e30")
    assert lora("train", *arguments, "--learning-rate", "1e12", "--epochs", 9) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert err.count("TrainingError: step") == 1
    assert "learning rate" in err
    assert "Last good checkpoint: " in err
    assert "lower --learning-rate than 1e+12" in err
    assert not (run / "summary.json").exists()


@pytest.mark.slow
def test_no_traceback_where_the_disk_is_full(base: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "lora",
        "train",
        "--base",
        base,
        "--data",
        data(tmp_path / "d"),
    ]
    code = (
        "import resource, signal, sys, os;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--run-dir", str(run)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be written: File too large" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_directory_is_made_whole_or_not_at_all(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lora.finetune.run_folder

    real = lora.finetune.run_folder.write_together

    def full(folder: Path, files: dict[str, bytes]) -> None:
        if "environment.json" in files:
            raise OSError(28, "No space left on device")
        real(folder, files)

    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 1)
    runs = tmp_path / "runs"
    monkeypatch.setattr(lora.finetune.run_folder, "write_together", full)
    assert main(list(map(str, ("train", *arguments, "--run-dir", runs / "one")))) == 2
    assert "one cannot be written: No space left on device" in capsys.readouterr().err
    assert list(runs.iterdir()) == []


@pytest.mark.slow
def test_the_first_versions_commands(tmp_path: Path) -> None:
    """From the repository's root, without a hub: loud, on the embedded default, recorded."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    lora_run, full_run = tmp_path / "lora", tmp_path / "full"
    flags = ("--epochs", 1, "--batch_size", 16, "--limit", 64)
    done = command("scripts/train_lora_distilbert.py", "--r", 4, *flags, "--run_dir", lora_run)
    assert done.stderr.count("!!! the hub does not answer") == 1
    summary = json.loads((lora_run / "summary.json").read_text())
    assert (
        "the embedded default stands in for distilbert-base-uncased and glue/sst2"
        in summary["note"]
    )
    assert summary["adapter_parameters"] == 6 * 2 * 4 * (384 + 384)
    command("scripts/train_baseline_distilbert.py", *flags, "--run_dir", full_run)
    scores = command("eval_metrics.py", lora_run, full_run).stdout
    assert scores.count("accuracy") == 2
    drawn = command("plot_metrics.py", lora_run, full_run).stdout.split()
    assert all((ROOT / path).is_file() for path in drawn)


def test_a_run_is_scored_on_other_data_whole(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"a {REVIEWS[i % 6]} film\t{int(i % 6 < 3)}" for i in range(7)]
    path = tmp_path / "x.tsv"
    path.write_text("\n".join(["text\tlabel", *lines]) + "\n")
    assert lora("eval", trained, "--data", path) == 0
    accuracy = float(capsys.readouterr().out.split("accuracy ")[1].split()[0])
    assert accuracy * 7 == pytest.approx(round(accuracy * 7), abs=1e-3)
    (tmp_path / "only").mkdir()
    path.rename(tmp_path / "only" / "test.tsv")
    assert lora("eval", trained, "--data", tmp_path / "only") == 0
    assert f"accuracy {accuracy:.4f}" in capsys.readouterr().out
    assert lora("eval", trained, "--data", tmp_path / "only", "--split", "dev") == 2
    assert "has no dev split, found test" in capsys.readouterr().err
    (tmp_path / "only" / "test.tsv").write_text("text\tlabel\nfine\t7\n")
    assert lora("eval", trained, "--data", tmp_path / "only") == 2
    assert "label '7' is outside the set 0, 1. Fix the row.\n" in capsys.readouterr().err


def test_labels_that_look_like_flags_reopen(base: str, tmp_path: Path) -> None:
    rows = "text\tlabel\n" + "".join(
        f"a film {i}\t{('-neg', '--seed')[i % 2]}\n" for i in range(12)
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text(rows)
    run = tmp_path / "run"
    assert lora("train", "--base", base, "--data", folder, "--epochs", 1, "--run-dir", run) == 0
    assert lora("eval", run) == 0
    assert lora("predict", run, "--text", "a film") == 0


def test_a_relative_folder_reopens_from_anywhere(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert lora("train", "--base", base, "--data", "here", "--epochs", 1, "--run-dir", "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["data"] == str(tmp_path / "here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lora("eval", "../run") == 0


def test_an_evaluation_that_is_not_finite_is_no_result(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ("--base", base, "--data", data(tmp_path / "data"), "--run-dir", run)
    arguments = (*arguments, "--learning-rate", "1e30", "--batch-size", 99, "--epochs", 1)
    assert lora("train", *arguments) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert "TrainingError: evaluating after step 1: the loss" in err
    assert "Last good checkpoint: " in err
    assert not (run / "adapter").exists()


def test_a_reader_that_has_seen_enough_is_no_error(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_text("text\n" + "a good film\n" * 3000)
    command = f"'{sys.executable}' -m lora predict '{trained}' --data '{tmp_path}/x.tsv' | head -1"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert json.loads(done.stdout)["text"] == "a good film"
    assert "Traceback" not in done.stderr
    for place in ("| true", "> /dev/full"):
        command = f"'{sys.executable}' -m lora --help {place}"
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert "Traceback" not in done.stderr


def test_other_places_that_cannot_be_written(
    base: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    arguments = ("--base", base, "--data", data(tmp_path / "data"))
    assert lora("compare", *arguments, "--run-dir", tmp_path / "file" / "x") == 2
    assert lora("compare", *arguments, "--run-dir", tmp_path / "file") == 2
    assert lora("plot", trained, "--output", tmp_path / "file") == 2
    assert lora("train", *arguments, "--run-dir", tmp_path / ("x" * 300)) == 2
    assert lora("train", *arguments, "--note", "\udcff", "--run-dir", tmp_path / "run") == 2
    assert lora("train", *arguments, "--max-length", 2, "--run-dir", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "cannot be" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_curves_of_a_run_that_was_cut_off(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    text = (trained / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"kind": "st')
    assert lora("plot", run) == 0
    assert (run / "loss.png").is_file()
    (run / "metrics.jsonl").write_text('{"kind": "evaluation"}\n42\n')
    assert lora("plot", run) == 2
    assert "is damaged" in capsys.readouterr().err


def test_other_data_may_name_its_columns_otherwise(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{i}\ta {REVIEWS[i % 6]} film\t{int(i % 6 < 3)}" for i in range(6)]
    path = tmp_path / "x.tsv"
    path.write_text("\n".join(["id\tbody\tstars", *lines]) + "\n")
    columns = ("--text-column", "body", "--label-column", "stars")
    assert lora("eval", trained, "--data", path) == 2
    assert "Set --text-column" in capsys.readouterr().err
    assert lora("eval", trained, "--data", path, *columns) == 0
    accuracy = float(capsys.readouterr().out.split("accuracy ")[1].split()[0])
    assert lora("predict", trained, "--data", path, *columns) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert accuracy == pytest.approx(right / 6, abs=1e-4)


def test_pairs_and_single_texts_are_not_taken_for_each_other(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("predict", trained, "--text", "a", "--pair", "b") == 2
    assert "was trained on single texts, found pairs" in capsys.readouterr().err
    path = tmp_path / "x.tsv"
    path.write_text("sentence1\tsentence2\tlabel\na\tb\t1\n")
    for verb in ("eval", "predict"):
        assert lora(verb, trained, "--data", path) == 2
        assert "was trained on single texts, found pairs" in capsys.readouterr().err


def test_flags_without_effect_are_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = trained / "predictions.jsonl"
    for arguments, words in {
        ("eval", predictions): f"To score it, run lora eval --predictions {predictions}",
        ("eval", trained, "--task", "text"): "--task has no effect with --run",
        (
            "eval",
            trained,
            "--text-column",
            "x",
        ): "--text-column has no effect with --run without --data",
        ("eval", "--predictions", predictions, "--split", "dev"): "--split has no effect with",
        ("eval", trained, "--harness", "arc_easy", "--text-column", "x"): "--harness, whose tasks",
        ("eval", "--predictions", predictions, "--harness", "arc_easy"): "--predictions has no",
        (
            "compare",
            "--seed",
            "1",
        ): "--seed applies to a single run. With lora compare, set",
        (
            "compare",
            "--method=full",
        ): "--method applies to a single run. With lora compare, set",
        (
            "predict",
            trained,
            "--text",
            "x",
            "--output",
            tmp_path / "no" / "x",
        ): "Create it first",
        ("predict", trained, "--text", "x", "--text-column", "y"): "have no effect with --text",
        ("methods", "--verbose"): "lora methods does not take --verbose",
    }.items():
        assert lora(*arguments) == 2
        assert words in capsys.readouterr().err


def test_predictions_are_scored_as_the_run_beside_them_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = tmp_path / "predictions.jsonl"
    predictions.write_text(
        '{"prediction": "1.0", "label": "1"}\n{"prediction": "2.5", "label": "2"}\n'
    )
    assert lora("eval", "--predictions", predictions) == 0
    assert "accuracy" in capsys.readouterr().out
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"task": "regression"}))
    assert lora("eval", "--predictions", predictions) == 0
    assert "mse 0.1250" in capsys.readouterr().out
    (tmp_path / "summary.json").write_text("[" * 100_000)
    assert lora("eval", "--predictions", predictions) == 2
    assert "summary.json is damaged: Invalid JSON: recursion limit" in capsys.readouterr().err
