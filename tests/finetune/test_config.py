"""A run's configuration reads back from TOML as it was written; what cannot be is named."""

from __future__ import annotations

import random
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from lora.declared import declared
from lora.errors import ConfigError, FileError, LoraError, RunError
from lora.finetune.config import RunConfig, from_table, parse_run, to_table
from lora.finetune.inputs import read_corpus
from lora.finetune.run_folder import config_of
from lora.method import METHODS

RESOLVED: dict[str, Any] = {
    "base": "demo", "data": ["demo"], "method": "lora", "task": "classification",
    "labels": ["0", "1"], "learning_rate": 0.002, "max_length": 128, "dtype": "float32", "r": 4,
    "target_modules": ["q_lin", "v_lin"], "seed": 3, "epochs": 2, "note": "a", "warmup": 0.1,
    "rank_pattern": {"q_lin": 2},
}  # fmt: skip
ODD: tuple[Any, ...] = (
    True, -1, 0, 7, 0.5, 1e308, 10**30, float("nan"), float("inf"), "", "x", [], [1], [""],
    ["lora"], {}, {"a": "b"}, [[]], "\0", 5,
)  # fmt: skip


def read_back(config: RunConfig[Any]) -> RunConfig[Any]:
    table = tomllib.loads(tomli_w.dumps(to_table(config)))
    return from_table(table, table["method"])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "note": st.text(st.characters(codec="utf-8", exclude_characters="\0")),
            "data": st.lists(st.sampled_from("abc"), min_size=1, unique=True).map(tuple),
            "labels": st.lists(st.text("ab \u2028", max_size=2), min_size=2, unique=True).map(
                tuple
            ),
            "weights": st.dictionaries(st.sampled_from("ab.="), st.floats(1e-9, 1e9)),
            "class_weights": st.just("balanced")
            | st.dictionaries(st.text("ab. ", max_size=2), st.floats(1e-9, 1e9)),
            "label_smoothing": st.floats(0, 1, exclude_max=True),
            "text_column": st.none() | st.text("ab0 ", min_size=1),
            "learning_rate": st.none() | st.floats(1e-9, 1e9),
            "max_length": st.none() | st.integers(1, 2**31 - 1),
            "baseline": st.booleans(),
            "trackers": st.lists(st.sampled_from(("wandb", "mlflow"))).map(tuple),
            "run_dir": st.none() | st.just(Path("a/b")),
            "seed": st.integers(0, 2**63 - 1),
        },
    )
)
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_back(values: dict[str, Any]) -> None:
    config = RunConfig(settings=lora.LoRAConfig(layers_to_transform=()), **values)
    assert read_back(config) == config


@pytest.mark.parametrize("name", METHODS)
def test_no_default_is_lost_for_none(name: str) -> None:
    """TOML has no null: None is left out, and may only be the default."""
    for kind in (METHODS[name].Config, RunConfig):
        for field in fields(kind):
            if type(None) in get_args(declared(kind)[field.name]):
                assert field.default in (None, MISSING), field.name


def test_a_run_reads_back(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(tomli_w.dumps(RESOLVED))
    config = config_of(tmp_path)
    assert config.labels == ("0", "1")
    assert config.settings == lora.LoRAConfig(
        r=4, target_modules=("q_lin", "v_lin"), rank_pattern={"q_lin": 2}
    )
    assert read_back(config) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": 5}, "labels must be a list, found 5"),
        ({"method": ["lora"]}, r"--method \['lora'\] is unknown"),
        ({"text_column": ""}, "text_column must be a text of at least 1 character, found ''"),
        ({"max_length": None}, "max_length is missing"),
        ({"max_length": 10**30}, "max_length must be at most 2,147,483,647, found 1000"),
        ({"learning_rate": None}, "learning_rate is missing"),
        ({"dtype": None}, "dtype is missing"),
        ({"data": [["a"]]}, r"data \[0\] must be a text, found \['a'\]"),
        ({"run_dir": 5}, "run_dir must be .* found 5"),
        ({"weights": {"a": "b"}}, r"weights \[a\] must be a number, found 'b'"),
        ({"class_weights": {"a": "b"}}, r"class_weights \[a\] must be a number, found 'b'"),
        ({"class_weights": "even"}, "class_weights must be balanced, or labels with their"),
        ({"label_smoothing": 1}, r"label_smoothing must be less than 1\.0, found 1"),
        ({"r": "x"}, "r must be a whole number"),
        ({"methods": 5}, "methods must be tables, found 5"),
    ],
)
def test_a_damaged_configuration_of_a_run_is_named(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    table = {key: value for key, value in (RESOLVED | changes).items() if value is not None}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(RunError, match=rf"{tmp_path}/config.toml is damaged: {words}.*Restore it"):
        config_of(tmp_path)


@pytest.mark.slow
def test_no_table_lets_through_anything_but_an_error_of_ours(tmp_path: Path) -> None:
    path, refused, keys = tmp_path / "config.toml", 0, [f.name for f in fields(RunConfig)]
    keys += [field.name for field in fields(lora.LoRAConfig)] + ["methods", "seeds"]
    keys.remove("settings")
    for seed in range(1500):
        rng = random.Random(seed)
        table = RESOLVED | {rng.choice(keys): rng.choice(ODD) for _ in range(rng.randint(1, 2))}
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
        for read in (config_of, parsed):
            try:
                config = read(tmp_path)
            except LoraError:
                refused += 1
            else:
                assert read_back(config) == config
    assert refused > 1000


def parsed(folder: Path) -> RunConfig[Any]:
    return parse_run(["--config", str(folder / "config.toml")])


def test_a_recipe_names_itself(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("epochs = 0")
    with pytest.raises(FileError, match=f"^{tmp_path}/config.toml: epochs must be at least 1, fo"):
        parsed(tmp_path)


def test_a_table_of_a_config_file_may_have_any_name_and_set_its_method(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[methods.small]\nmethod = "lora"\nr = 2\n[methods.lora]\nr = 4\n')
    small = parse_run(["--config", str(file), "--name", "small"])
    assert (small.method, small.name, small.settings.r) == ("lora", "small", 2)
    plain = parse_run(["--config", str(file)])
    assert (plain.method, plain.name, plain.settings.r) == ("lora", "", 4)
    assert from_table(to_table(small), "lora") == small
    with pytest.raises(FileError, match=r"\[methods.small\] has method = 'lora', but --method is"):
        parse_run(["--config", str(file), "--name", "small", "--method", "full"])
    with pytest.raises(ConfigError, match="name must be at most 80 letters"):
        parse_run(["--name", "a b"])
    file.write_text("[methods.small]\nr = 2\n")
    with pytest.raises(FileError, match='set method in it: method = "lora"'):
        parse_run(["--config", str(file)])


def test_no_row_of_test_may_be_used() -> None:
    """A run that only tries a learning rate does not see the test split."""
    corpus = read_corpus(parse_run(["--data", "demo-tiny", "--limit", "20", "--test-limit", "0"]))
    assert (len(corpus.dev), len(corpus.test), corpus.held_out[0]) == (20, 0, "dev")
