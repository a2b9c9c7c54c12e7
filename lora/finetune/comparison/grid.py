"""Which runs a comparison makes: methods × learning rates × seeds, from the command line.

grid = parse_compare(["--methods", "lora", "full", "--rates", "auto", "--seeds", "3"])
grid.searches("lora", [1e-4, 1e-3])    one run per rate, scored on dev
grid.finals("lora", 1e-3)              one run per seed, scored on test
"""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora.errors import ConfigError
from lora.finetune.config import config_of_method, parse, parse_run, read_toml, stated_in
from lora.finetune.methods import label, method_named, recordable
from lora.settings import check, whole_number

SEARCH = "search"
"""The folder of the runs that only try a learning rate, in the comparison's."""
SEARCH_SEED = 1000
"""First seed of the runs that only try a learning rate. The reported runs have other seeds."""
TRIED = 5
"""Learning rates that are tried for each method."""
RATE_STEP = 10 ** (1 / 3)
"""Factor between them."""
MOST_SEEDS = 5
"""Seeds that --budget uses at most if --seeds is not given, and FEWEST_SEEDS at least."""
FEWEST_SEEDS = 3
AGAIN = 10_000
"""Added to the seeds of a method that is trained again for the noise floor."""
AGAIN_NAME = "{}-again"
"""What that method is called."""
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train several methods with several seeds on one data set, test whether their scores differ
    significantly, and print a verdict and tables. With --rates auto, first find the learning rate
    of each method on the dev split. All other flags are those of `lora train`. A flag that only
    some of the methods have is passed only to those methods. In the file of --config, a table
    [methods.NAME] sets flags for one method."""

    methods: tuple[str, ...] = ()
    """Methods to compare. Default: the [methods.NAME] tables of --config, or lora and full."""
    seeds: tuple[int, ...] = ()
    """Random seeds; each method is trained once with each. One number is a count: 3 means the seeds
    0, 1 and 2. Several numbers are the seeds themselves. Default: the seeds in the file of
    --config; without them, 3 to 5 seeds with --budget, 3 with --rates, and otherwise 1."""
    rates: tuple[str, ...] = ()
    """Learning rates to try for each method. Each is trained with --search-seeds and scored on dev;
    the method is then trained with --seeds at its best rate. auto: five rates around the method's
    default, and more if the best is the lowest or the highest. Default: no search."""
    search_seeds: int | None = None
    """Number of seeds with which each rate is tried; its score is their mean. Near the highest rate
    that works, runs fail by chance: more seeds find such a rate. Default: 1."""
    budget: str | None = None
    """Time that the comparison may take, such as 90m or 2h, estimated from the first steps of each
    method. To stay within it, fewer seeds are used unless --seeds is given, and if that is not
    enough, fewer rows of train and dev in every run."""
    jobs: int = 1
    """Number of runs to train in parallel. The CPU's cores, or the GPUs, are divided among them."""
    match_parameters: bool = False
    """Choose the rank of each method so that its number of trainable parameters is closest to that
    of the first method. A difference of more than 5 % is reported."""
    noise_floor: bool = False
    """Also train the first method a second time, with other seeds. The difference between its two
    rows in the table is due to chance alone."""
    run_dir: Path | None = None
    """Folder for the runs, the tables and the curves. Default: run_dir in the file of --config,
    else runs/compare. Several processes or machines that share it divide the runs among them."""
    dry_run: bool = False
    """Print one command for each run that is not complete, for a scheduler or GNU parallel, and
    stop. With --rates, the runs of the search come first: run their commands, then this one again
    to print the rest."""
    config: Path | None = None
    """TOML file of flags, as in lora train."""


@dataclass(frozen=True)
class Grid:
    """A comparison: its methods by name, each with the settings of its runs but seed and folder."""

    methods: dict[str, Any]  # name -> RunConfig
    seeds: tuple[int, ...]
    folder: Path
    rates: tuple[float, ...] | None = ()  # () if none is searched; None: around each default
    budget: float | None = None  # seconds
    seeds_given: bool = True
    jobs: int = 1
    match_parameters: bool = False
    search_seeds: tuple[int, ...] = (SEARCH_SEED,)
    again: str | None = None
    """The name of the method that is trained again, with other seeds, for the noise floor."""

    @property
    def searched(self) -> tuple[str, ...]:
        """The methods whose rates are searched. One that is trained again takes its first rate."""
        return tuple(n for n in self.methods if n != self.again) if self.rates != () else ()

    def searches(self, name: str, rates: Sequence[float] = ()) -> list[Any]:
        """Returns the runs that try these rates for a method, by default those that the search
        begins with: all rates with the first seed, then with the next. They do not see the test
        split."""
        run, rates = self.methods[name], rates or self.rates_to_try(name)
        return [
            replace(
                run,
                learning_rate=rate,
                seed=seed,
                test_limit=0,
                run_dir=self.folder / SEARCH / f"{name}-{rate:g}{further}",
            )
            for seed in self.search_seeds
            for further in [f"-{seed}" if seed != SEARCH_SEED else ""]
            for rate in rates
        ]

    def finals(self, name: str, rate: float | None = None) -> list[Any]:
        """Returns the runs that are reported, one per seed, at this rate or the method's own."""
        run = self.methods[name]
        rate = run.learning_rate if rate is None else rate
        seeds = [seed + AGAIN * (name == self.again) for seed in self.seeds]
        return [
            replace(run, learning_rate=rate, seed=seed, run_dir=self.folder / f"{name}-{seed}")
            for seed in seeds
        ]

    def rates_to_try(self, name: str) -> list[float]:
        """Returns the rates that the search begins with, in ascending order: those around the
        default, and those that an earlier search in this folder added, perhaps because of a method
        that is not compared any more."""
        if self.rates is not None:
            return list(self.rates)
        run = self.methods[name]
        default = run.learning_rate or method_named(run.method).learning_rate
        half = TRIED // 2
        around = {rounded(default * RATE_STEP**power) for power in range(-half, half + 1)}
        return sorted(around | self._rates_on_disk(name))

    def _rates_on_disk(self, name: str) -> set[float]:
        rates = set()
        for folder in (self.folder / SEARCH).glob(f"{glob.escape(name)}-*"):
            with suppress(ValueError):  # of lora-plus, and of a further seed
                rates.add(float(folder.name.removeprefix(f"{name}-")))
        return rates


def rounded(rate: float) -> float:
    """Returns a rate with two significant digits, as a person would write it."""
    return float(f"{rate:.1e}")


def parse_compare(arguments: Sequence[str]) -> tuple[CompareConfig, Grid]:
    """Returns the flags of a comparison, and its runs. Raises ConfigError."""
    config, rest = parse(CompareConfig, arguments, "lora compare", return_unknown_args=True)
    path = config.config
    table = read_toml(path) if path else {}
    for flag in ("--method", "--seed", "--name"):
        if any(argument == flag or argument.startswith(flag + "=") for argument in rest):
            raise ConfigError(f"{flag} applies to a single run. With lora compare, set {flag}s.")
    with stated_in(path):
        tables = table.get("methods", {})
        good = type(tables) is dict and all(type(each) is dict for each in tables.values())
        check("methods", tables, "tables: [methods.lora], [methods.full], ...", good)
        folder = table.get("run_dir", "runs/compare")
        check("run_dir", folder, "a text", isinstance(folder, str))
        rates = config.rates or table.get("rates", ())
        rates = tuple(rates) if isinstance(rates, list | tuple) else (rates,)
        tried = None if rates == ("auto",) else tuple(sorted(set(map(_rate, rates))))
        seeds = config.seeds or table.get("seeds", ())
        seeds = _seeds(seeds) if seeds != () else ()
        searched = config.search_seeds
        searched = table.get("search_seeds", 1) if searched is None else searched
        whole_number("search_seeds", searched, most=1000)
        if searched > 1 and not rates:
            raise ConfigError("--search-seeds has no effect without --rates. Pass --rates auto.")
    whole_number("jobs", config.jobs)
    names = config.methods or tuple(tables) or ("lora", "full")
    methods = {}
    for name in dict.fromkeys(names):
        named = "method" in tables.get(name, {})
        flags = ["--config", str(path)] if path else []
        kind = tables[name]["method"] if named else _known(name)
        flags += _for_method(rest, kind, [_method_of(tables, other) for other in names])
        flags += ["--name", name] if named else ["--method", kind]
        run = replace(parse_run(flags, "lora compare"), run_dir=None)
        methods[name if named else label(kind)] = run
    given = seeds or ((0,) if not rates else tuple(range(FEWEST_SEEDS)))
    again = _again(methods, given) if config.noise_floor else None
    if len({run.metric for run in methods.values()}) > 1:
        raise ConfigError(
            "--metric must be the same for all methods. Set it above the [methods.NAME] tables."
        )
    search_seeds = tuple(range(SEARCH_SEED, SEARCH_SEED + searched))
    if rates and (twice := set(search_seeds) & set(given)):
        raise ConfigError(
            f"--seeds {min(twice)}: the search for the rates has this seed, and the reported runs"
            " need others. Pass another."
        )
    grid = Grid(
        methods=methods,
        seeds=given,
        folder=config.run_dir or Path(folder),
        rates=tried,
        budget=None if config.budget is None else seconds_in(config.budget),
        seeds_given=bool(seeds),
        jobs=config.jobs,
        match_parameters=config.match_parameters,
        search_seeds=search_seeds,
        again=again,
    )
    return config, grid


def _again(methods: dict[str, Any], seeds: Sequence[int]) -> str:
    """Adds the first method again, for the noise floor. Returns its name. Raises ConfigError."""
    first = next(iter(methods))
    again = AGAIN_NAME.format(first)
    if again in methods:
        raise ConfigError(
            f"--noise-floor trains {first} again under the name {again}, which is one of the"
            " methods already. Rename that method."
        )
    if twice := set(seeds) & {seed + AGAIN for seed in seeds}:
        raise ConfigError(
            f"--noise-floor: the second row has each seed plus {AGAIN:,}, so that {min(twice)}"
            " would be in both rows. Pass seeds that are closer together."
        )
    methods[again] = replace(methods[first], name=again)
    return again


def _rate(text: Any) -> float:
    """Returns a rate of --rates. Raises ConfigError."""
    try:
        rate = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        rate = math.nan
    check("rates", text, "auto, or numbers above 0", math.isfinite(rate) and rate > 0)
    return rate


def _seeds(given: Any) -> tuple[int, ...]:
    """Returns the seeds that --seeds or a config file names: a list, or how many."""
    listed = given if isinstance(given, list | tuple) else [given]
    whole = all(type(seed) is int and 0 <= seed < 2**63 for seed in listed)
    check("seeds", given, "at least one whole number of at least 0", whole and bool(listed))
    if len(listed) == 1 and listed[0] > 0 and not isinstance(given, list):
        check("seeds", given, "at most 1,000 seeds", listed[0] <= 1000)
        return tuple(range(listed[0]))
    return tuple(dict.fromkeys(listed))


def seconds_in(budget: str) -> float:
    """Returns the seconds of a time such as 90m, 2h or 1.5d. Raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", budget.strip())
    check("budget", budget, "a time such as 90m, 2h or 1.5d", bool(match))
    assert match is not None
    seconds = float(match[1]) * UNITS[match[2]]
    check("budget", budget, "more than 0", seconds > 0)
    return seconds


def _method_of(tables: dict[str, Any], name: str) -> str:
    """Returns the method that a name of --methods stands for."""
    return str(tables.get(name, {}).get("method", name))


def _known(method: str) -> str:
    """Returns one of --methods as its run records it. Raises ConfigError if there is none."""
    try:
        method_named(method)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--method ", "--methods ", 1)) from None
    return recordable(method)


def _for_method(rest: Sequence[str], method: str, methods: Sequence[str]) -> list[str]:
    """Returns the flags without those that only other compared methods have."""
    names = {
        m: {field.name for field in fields(config_of_method(m))} - config_of_method(m).written
        for m in {method, *methods}
    }
    others = set().union(*names.values()) - names[method]
    flags: list[str] = []
    keep = True
    for argument in rest:
        if argument.startswith("--"):
            name = argument[2:].partition("=")[0].replace("-", "_")
            keep = name not in others and name.removeprefix("no_") not in others
        if keep:
            flags.append(argument)
    return flags
