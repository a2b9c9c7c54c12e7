"""Which runs a comparison makes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from lora.errors import ConfigError, FileError, RunError
from lora.finetune.comparison.analysis import next_rate, rate_search
from lora.finetune.comparison.grid import SEARCH_SEED, TRIED, parse_compare, seconds_in
from lora.finetune.comparison.runs import Try
from lora.finetune.comparison.schedule import title, train_command
from lora.finetune.config import parse_run, to_table
from lora.finetune.methods import method_named


def test_one_number_of_seeds_is_how_many() -> None:
    for flags, seeds in (
        ([], (0,)),
        (["--seeds", "0"], (0,)),
        (["--seeds", "3"], (0, 1, 2)),
        (["--seeds", "3", "5", "3"], (3, 5)),
        (["--rates", "auto"], (0, 1, 2)),
    ):
        assert parse_compare(flags)[1].seeds == seeds, flags


def test_rates_are_searched_around_the_methods_default_without_the_test_split() -> None:
    _, grid = parse_compare(["--methods", "lora", "full", "--rates", "auto"])
    for name in ("lora", "full"):
        runs = grid.searches(name)
        rates = [run.learning_rate for run in runs]
        assert len(rates) == TRIED >= 5
        assert rates == sorted(rates)
        assert rates[TRIED // 2] == method_named(name).learning_rate
        steps = [above / below for below, above in itertools.pairwise(rates)]
        assert all(2.0 < step < 2.3 for step in steps)
        assert {(run.seed, run.test_limit) for run in runs} == {(SEARCH_SEED, 0)}
        assert len({run.run_dir for run in runs}) == TRIED
        finals = grid.finals(name, 5e-4)
        assert {run.learning_rate for run in finals} == {5e-4}
        assert SEARCH_SEED not in {run.seed for run in finals}
        assert all(run.test_limit is None for run in finals)


def test_one_rate_in_a_config_file_is_a_rate(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("rates = 1e-3\n[methods.lora]\n")
    assert parse_compare(["--config", str(file)])[1].rates == (1e-3,)
    file.write_text("rates = true\n[methods.lora]\n")
    with pytest.raises(ConfigError, match="rates must be auto, or numbers above 0"):
        parse_compare(["--config", str(file)])


def test_given_rates_are_tried_as_they_are() -> None:
    _, grid = parse_compare(["--methods", "lora", "--rates", "1e-2", "1e-3", "0.01"])
    assert [run.learning_rate for run in grid.searches("lora")] == [1e-3, 1e-2]
    for rates in (["no"], ["auto", "1e-3"], ["0"], ["nan"]):
        with pytest.raises(ConfigError, match="rates must be auto, or numbers above 0"):
            parse_compare(["--rates", *rates])


def test_names_of_a_config_file_are_methods_of_the_comparison(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        "seeds = 2\nrates = [1e-3, 1e-2]\n"
        '[methods.small]\nmethod = "lora"\nr = 2\n[methods.large]\nmethod = "lora"\nr = 16\n'
        "[methods.full]\n"
    )
    _, grid = parse_compare(["--config", str(path)])
    assert list(grid.methods) == ["small", "large", "full"]
    assert [grid.methods[name].method for name in grid.methods] == ["lora", "lora", "full"]
    assert [grid.methods[name].settings.r for name in ("small", "large")] == [2, 16]
    assert [run.run_dir.name for run in grid.finals("large", 1e-3)] == ["large-0", "large-1"]
    assert grid.rates == (1e-3, 1e-2)
    _, one = parse_compare(["--config", str(path), "--methods", "large", "--lora-alpha", "4"])
    assert list(one.methods) == ["large"]
    assert one.methods["large"].settings.lora_alpha == 4
    path.write_text("seeds = 1.5\n")
    with pytest.raises(FileError, match="seeds must be at least one whole number"):
        parse_compare(["--config", str(path)])


def test_the_noise_floor_is_the_first_method_with_other_seeds() -> None:
    flags = ["--methods", "lora", "full", "--noise-floor", "--rates", "auto", "--seeds", "2"]
    _, grid = parse_compare(flags)
    assert grid.again == "lora-again"
    assert list(grid.methods) == ["lora", "full", "lora-again"]
    assert grid.searched == ("lora", "full")  # it takes the rate of lora
    first, again = (grid.finals(name, 1e-3) for name in ("lora", "lora-again"))
    assert not {run.seed for run in first} & {run.seed for run in again}
    assert first[0].settings == again[0].settings


def test_a_noise_floor_takes_no_name_from_another_method(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[methods.lora]\n[methods.lora-again]\nmethod = "lora"\nr = 2\n')
    with pytest.raises(ConfigError, match="under the name lora-again, which is one of the methods"):
        parse_compare(["--config", str(config), "--noise-floor"])


def test_all_methods_have_one_metric(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[methods.lora]\nmetric = "macro_f1"\n[methods.bitfit]\n')
    with pytest.raises(ConfigError, match="--metric must be the same for all methods"):
        parse_compare(["--config", str(config)])
    config.write_text('metric = "macro_f1"\n[methods.lora]\n[methods.bitfit]\n')
    _, grid = parse_compare(["--config", str(config)])
    assert {run.metric for run in grid.methods.values()} == {"macro_f1"}
    with pytest.raises(SystemExit):
        parse_compare(["--metric", "macro-f1"])
    config.write_text('metric = "macro-f1"\n[methods.lora]\n')
    with pytest.raises(ConfigError, match="metric must be .*'macro_f1'"):
        parse_compare(["--config", str(config)])


def test_rates_that_are_scored_by_two_metrics_have_no_best() -> None:
    metrics = ((1, "rougeL"), (2, "bleu"))
    tried = [Try(Path(name), 0.1 * i, 1000, 0.5, name) for i, name in metrics]
    with pytest.raises(RunError, match="rougeL is scored by rougeL, and bleu by bleu"):
        rate_search(tried)


def test_a_seed_is_not_used_twice() -> None:
    with pytest.raises(ConfigError, match="--seeds 1000: the search for the rates has this seed"):
        parse_compare(["--rates", "auto", "--seeds", "999", "1000"])
    with pytest.raises(ConfigError, match="so that 10000 would be in both rows"):
        parse_compare(["--noise-floor", "--seeds", "0", "10000"])
    parse_compare(["--seeds", "0", "1000", "10000"])  # nothing else uses them
    with pytest.raises(ConfigError, match="--seeds 1002: the search for the rates has this seed"):
        parse_compare(["--rates", "auto", "--search-seeds", "3", "--seeds", "1002", "1003"])


def test_each_rate_is_tried_with_each_seed_of_the_search(tmp_path: Path) -> None:
    """The folders of the first seed are those of a search with one, so that it can be extended."""
    path = tmp_path / "c.toml"
    path.write_text("search_seeds = 3\nrates = [1e-3, 1e-2]\n[methods.lora]\n[methods.full]\n")
    _, grid = parse_compare(["--config", str(path)])
    runs = grid.searches("lora")
    assert [(run.learning_rate, run.seed) for run in runs] == [
        (rate, seed) for seed in (1000, 1001, 1002) for rate in (1e-3, 1e-2)
    ]
    assert len({run.run_dir for run in runs}) == 6
    _, single = parse_compare(["--config", str(path), "--search-seeds", "1"])
    assert single.searches("lora") == runs[:2]
    assert [title(run) for run in runs[1:3]] == ["lora, rate 0.01", "lora, rate 0.001, seed 1001"]


@pytest.mark.parametrize("count", ["0", "-1", "1001"])
def test_a_search_has_a_number_of_seeds(count: str) -> None:
    with pytest.raises(ConfigError, match="search_seeds must be a whole number of at least 1"):
        parse_compare(["--rates", "auto", "--search-seeds", count])


def test_search_seeds_need_a_search() -> None:
    with pytest.raises(ConfigError, match="--search-seeds has no effect without --rates"):
        parse_compare(["--search-seeds", "2"])


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert seconds_in(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "-1h", "1w", "0m", "h"])
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(ConfigError, match="budget must be"):
        seconds_in(text)


def tried(*scores: float | None, metric: str = "accuracy", seed: int = 1000) -> list[Try]:
    run = Path("run")
    return [Try(run, 10.0**i, seed, score, metric) for i, score in enumerate(scores)]


def test_the_best_rate_is_chosen_and_an_edge_is_widened() -> None:
    search = rate_search(tried(0.5, 0.9, 0.6))
    assert (search.chosen, search.bracketed) == (10.0, True)
    assert next_rate(search) == pytest.approx(32)  # between it and its better neighbour
    low = rate_search(tried(0.9, 0.8))
    assert (low.chosen, low.bracketed) == (1.0, False)
    assert next_rate(low) < 1.0
    high = rate_search(tried(0.8, 0.9))
    assert not high.bracketed
    assert next_rate(high) > 10.0
    assert rate_search(tried(3.0, 2.0, 4.0, metric="perplexity")).chosen == 10.0


def test_of_equal_rates_the_one_in_the_middle_is_chosen() -> None:
    """With few rows of dev several rates score alike. One in the middle is not at an edge, so the
    grid is not widened for nothing."""
    for scores, chosen, bracketed in (
        ((0.9, 0.9, 0.9, 0.8), 10.0, True),
        ((0.9, 0.9, 0.9, 0.9, 0.8), 10.0, True),
        ((0.1, 0.9, 0.9, 0.9), 100.0, True),
        ((0.9, 0.9, 0.1), 1.0, False),
    ):
        search = rate_search(tried(*scores))
        assert (search.chosen, search.bracketed) == (chosen, bracketed), scores


def test_a_run_that_failed_brackets_but_is_never_chosen() -> None:
    search = rate_search(tried(0.5, 0.9, None))
    assert (search.chosen, search.bracketed) == (10.0, True)
    assert next_rate(search) < 10.0


def test_a_rate_with_several_seeds_has_their_mean_and_fails_with_one_of_them() -> None:
    first, second = tried(0.5, 0.9, 0.7, 0.4), tried(0.5, 0.5, 0.8, None, seed=1001)
    search = rate_search([*first, *second])
    assert [each.score for each in search.tried] == [0.5, pytest.approx(0.7), 0.75, None]
    assert (search.chosen, search.tried[2].scores) == (100.0, (0.7, 0.8))
    assert [each.failures for each in search.tried] == ["", "", "", "1 of 2 diverged"]
    assert [each.failures for each in rate_search(tried(0.5, None)).tried] == ["", "diverged"]


def test_only_seeds_that_every_rate_was_tried_with_count() -> None:
    """Without time for the second seed of all rates, a lucky first one is no reason to choose."""
    search = rate_search([*tried(0.5, 0.90, 0.93), *tried(0.5, 0.99, seed=1001)])
    assert [each.scores for each in search.tried] == [(0.5,), (0.9,), (0.93,)]
    assert search.chosen == 100.0
    assert rate_search([*tried(0.5, 0.9), *tried(0.8, 0.1)]).chosen == 10.0  # a seed counts once


def test_a_command_makes_the_same_run() -> None:
    flags = ["--methods", "lora", "full", "--rates", "auto", "--target-modules", "q_lin", "v_lin"]
    _, grid = parse_compare(flags)
    for name in grid.methods:
        for run in (*grid.searches(name), *grid.finals(name, 2e-3)):
            words = train_command(run).split()
            assert words[:2] == ["lora", "train"]
            assert to_table(parse_run(words[2:])) == to_table(run)
