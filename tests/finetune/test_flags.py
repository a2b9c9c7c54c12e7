"""What people type from other tools is understood by its meaning, and errors name flags."""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest

import lora.finetune.cli
from lora.errors import CheckpointError, ConfigError, FileError, SettingError, TargetError
from lora.finetune.cli import main
from lora.finetune.comparison.grid import CompareConfig
from lora.finetune.config import field_names, from_table, parse_run
from lora.finetune.flags import HOW, NEAR, as_flag, hint, value_form
from lora.finetune.verbs import EXAMPLES, FIRST, ExportConfig
from lora.interop.loralib import ConvertConfig

VERBS: dict[str, Any] = {
    "eval": lora.finetune.cli.EvalConfig,
    "predict": lora.finetune.cli.PredictConfig,
    "generate": lora.finetune.cli.GenerateConfig,
    "merge": lora.finetune.cli.MergeConfig,
    "plot": lora.finetune.cli.PlotConfig,
    "runs": lora.finetune.cli.RunsConfig,
    "show": lora.finetune.cli.ShowConfig,
    "plan": lora.finetune.cli.PlanConfig,
    "export": ExportConfig,
    "convert": ConvertConfig,
    "compare": CompareConfig,
}
TRAIN = field_names() | {"config", "resume", "nproc"}
KNOWN = {verb: {field.name for field in fields(kind)} for verb, kind in VERBS.items()}


@pytest.mark.parametrize("name", NEAR)
def test_a_foreign_name_leads_to_a_flag(name: str) -> None:
    ours = NEAR[name].split()
    everywhere = TRAIN.union(*KNOWN.values())
    assert set(ours) <= everywhere
    for known in (TRAIN, *KNOWN.values()):
        if name not in known and not known.isdisjoint(ours):
            first = next(one for one in ours if one in known)
            assert hint(name, known, as_flag) == f"Did you mean {as_flag(first)}?"


@pytest.mark.parametrize("name", HOW)
def test_a_sentence_names_flags_of_lora_train(name: str) -> None:
    assert name not in TRAIN
    assert name not in NEAR
    flags = re.findall(r"--([a-z-]+)", HOW[name])
    assert {flag.replace("-", "_") for flag in flags} <= TRAIN | {"output"}
    assert HOW[name].endswith(".")


@pytest.mark.parametrize(
    ("given", "words"),
    {
        ("--lr", "1e-3"): "lora train has no flag --lr. Did you mean --learning-rate?",
        ("--rank=8",): "lora train has no flag --rank. Did you mean --r?",
        ("--alpha", "16"): "Did you mean --lora-alpha?",
        ("--no-cuda",): "Set --device cpu.",
        ("--fp16",): "Set --dtype float16.",
        ("--bf16",): "Set --dtype bfloat16.",
        ("--num_train_epochs", "3"): "Did you mean --epochs?",
        ("--model_name_or_path", "x"): "Did you mean --base?",
        ("--output_dir", "x"): "Did you mean --run-dir?",
        ("--gradient_accumulation_steps", "4"): "--micro-batch-size",
        ("--per-device-train-batch-size", "4"): "Set --batch-size to the examples per step",
        ("--load_in_4bit",): "Set --quantize nf4.",
        ("--max_seq_length", "64"): "Did you mean --max-length?",
        ("--Dataset", "x"): "Did you mean --data?",
        ("--epochz", "3"): "Did you mean --epochs?",
        ("-lr", "3"): "Did you mean --learning-rate?",
        ("-epochs", "3"): "Did you mean --epochs?",
        ("--no-epochs",): "lora train has no flag --no-epochs.",
        ("--method", "full", "--r", "3"): "lora train has no flag --r. It is a setting of --method",
        ("--tinit", "3"): "It is a setting of --method adalora.",
        ("--epochs", "0"): "--epochs must be at least 1, found 0. Set --epochs.",
        ("--r", "0"): "--r must be a whole number of at least 1, found 0. Set --r.",
        ("--learning-rate", "nan"): "--learning-rate must be a finite number, found nan.",
        ("--labels", "a", "a"): "--labels must be distinct",
        ("--text-column", ""): "--text-column must be a text of at least 1 character",
        ("--max-length", str(10**30)): "--max-length must be at most 2,147,483,647",
        ("--weights", "a", "-1"): "--weights [a] must be more than 0",
        ("--rank-pattern", "(", "3"): "--rank-pattern is refused: '(' is not a regular expression",
        ("--init-lora-weights", "x"): "--init-lora-weights must be",
    }.items(),
)
def test_errors_of_the_command_line_name_flags(
    given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    own = "|".join(name for name in TRAIN if "_" in name)
    assert not re.search(rf"(?<!-)\b({own})\b", error)


@pytest.mark.parametrize(
    ("given", "words"),
    {
        ("plan", "--nproc", "0"): "--nproc must be a whole number of at least 1, found 0",
        ("train", "--nproc", "0"): "--nproc must be a whole number from 1 to 1,024, found 0",
        ("train", "--nproc", "9" * 5000): "--nproc must be a whole number from 1 to 1,024, found 9",
        ("data", "preview", "--count", "-1"): "--count must be a whole number of at least 1",
        ("eval", "/no", "--harness", "x", "--limit", "0"): "--limit must be a whole number of at",
    }.items(),
)
def test_numbers_of_other_verbs_are_held_to_bounds(
    given: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(list(given)) == 2
    assert words in capsys.readouterr().err


def test_a_message_keeps_the_names_of_files_and_of_what_was_typed() -> None:
    for error, message in {
        TargetError("target_modules=('a',) matches none: see learning_rate."):
            "--target-modules ('a',) matches none: see --learning-rate.",
        ConfigError("'lora_alpha' in /x/max_length.toml and run_dir.d"):
            "'lora_alpha' in /x/max_length.toml and run_dir.d",
        SettingError("r", "must be 1."): "--r must be 1. Set --r.",
        FileError("a.toml: r and lora_alpha"): "a.toml: r and lora_alpha",
        CheckpointError("adapter_config.json: lora_alpha"): "adapter_config.json: lora_alpha",
    }.items():  # fmt: skip
        assert lora.finetune.cli.in_flags(error) == message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lr = 1e-3", "a lora run has no key lr. Did you mean learning_rate?"),
        ("bf16 = true", "a lora run has no key bf16. Set dtype bfloat16."),
        ("epochs = 0", "epochs must be at least 1, found 0. Set epochs."),
        ("r = 0", "r must be a whole number of at least 1, found 0. Set r."),
        ('method = ["lora"]', "--method ['lora'] is unknown."),
    ],
)
def test_errors_of_a_file_name_the_file_and_its_keys(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"FileError: {path}: {words}" in error


def test_a_flag_of_a_list_may_be_given_several_times() -> None:
    config = parse_run(
        ["--labels", "a", "--epochs", "2", "--labels=b", "--weights", "x", "1", "--no-baseline",
         "--labels", "c", "d", "--weights", "y", "2", "--target-modules", "q_lin"],
    )  # fmt: skip
    assert config.labels == ("a", "b", "c", "d")
    assert config.weights == {"x": 1.0, "y": 2.0}
    assert config.epochs == 2
    assert config.settings.target_modules == ("q_lin",)


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints for --help."""
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_flags_that_are_taken_first_stand_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, flags in {
        "train": ("--config", "--resume", "--nproc", "--learning-rate", "--r"),
        "plan": ("--config", "--nproc"),
        "compare": ("--config", "--methods"),
        "data preview": ("--config", "--count"),
    }.items():
        shown = help_of(*verb.split(), capsys=capsys)
        assert all(re.search(rf"^\W*{flag} ", shown, re.MULTILINE) for flag in flags), verb


@pytest.mark.parametrize("prog", EXAMPLES)
def test_help_shows_examples_whose_flags_exist(
    prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(*prog.split()[1:], capsys=capsys)
    flags = set(re.findall(r"--[a-z-]+", shown.rpartition(EXAMPLES[prog][-1])[2]))
    if prog in ("lora plan", "lora compare", "lora data preview"):
        flags |= set(map(as_flag, TRAIN))
    for example in EXAMPLES[prog]:
        assert example.startswith(prog)
        assert example in shown
        assert {word for word in shlex.split(example) if word.startswith("--")} <= flags


@pytest.mark.parametrize("prog", EXAMPLES)
def test_help_begins_with_what_is_typed_first_and_never_shows_none(
    prog: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = help_of(*prog.split()[1:], capsys=capsys)
    first = [FIRST[prog]] if prog in FIRST else []
    assert shown.startswith(f"usage: {' '.join([prog, *first, '[flags]'])}\n\n")
    for value in first:
        flag = "--" + value.strip("[].").lower()
        text = re.search(rf"^\W*{flag} (.*?)(^\W*--|\Z)", shown, re.MULTILINE | re.DOTALL)
        assert text, flag
        assert ("(required)" in text[1]) is (not value.startswith("[")) or prog == "lora eval"
    for noise in ("{None", "None}", "(default: None)", "(default: )", "(default: '')"):
        assert noise not in " ".join(shown.replace("│", " ").split())


def test_values_are_shown_as_they_are_typed() -> None:
    assert value_form(int) == "INT"
    assert value_form(Path | None) == "PATH"
    assert value_form(Literal["yes", "no"] | None) == "{yes,no}"
    assert value_form(tuple[str, ...]) == "STR ..."
    assert value_form(str | tuple[str, ...] | None) == "STR ..."
    assert value_form(dict[str, float] | Literal["balanced"]) == "STR FLOAT ... | balanced"


def test_a_command_line_means_the_same_after_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    """What describe_flags() adds to the annotations changes only what is printed."""
    arguments = ["--r", "3", "--weights", "x", "2", "--labels", "a", "b", "--run-dir", "runs/x"]
    before = parse_run(arguments)
    help_of("train", capsys=capsys)
    assert parse_run(arguments) == before


@pytest.mark.parametrize("verb", [("train",), ("plan",), ("compare",), ("data", "preview")])
def test_a_file_without_a_flag_leads_to_data(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "reviews.csv", "--epochs", "1"]) == 2
    assert "Did you mean --data reviews.csv?" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_help_is_wrapped_to_the_terminal(
    verb: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line ends only where the next word would not fit, not where a docstring's line ended."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = help_of(verb, capsys=capsys).splitlines()
    assert max(map(len, lines)) == columns
    texts = [line[1:-1].rstrip() for line in lines if len(line) == columns]  # inside the box
    indents = Counter(len(text) - len(text.lstrip()) for text in texts)
    indent = max(indents, key=lambda width: indents[width] * (width > 1))  # of help texts
    checked = 0
    for text, below in itertools.pairwise(texts):
        if not any(line[:indent].strip() or not line[indent:].strip() for line in (text, below)):
            checked += 1
            assert len(text) + 1 + len(below.split()[0]) > columns - 4, text
    assert checked > 3


def test_a_config_is_read_wherever_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("epochs = 7\nr = 3\n")
    config = parse_run(["--seed", "4", "--config", str(path), "--r", "5"])
    assert (config.epochs, config.settings.r, config.seed) == (7, 5, 4)
    assert type(config).__name__ == "RunConfig"
    assert from_table({"epochs": 7, "r": 5, "seed": 4}, "lora") == config
