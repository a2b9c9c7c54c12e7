"""How long `lora report` takes for 100 runs, how large the page is, and when its table is seen.

python -m benchmarks.report_page [--json FILE]

The runs are those of results/study-sst2/runs.tar.xz: a method's seeds and the rates that were tried
for it. They are copied under other names until there are 100. Chromium opens the page from disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.machine import RESULTS, write
from benchmarks.study import unpack

RUNS, ROUNDS = 100, 5


def copies(source: Path, target: Path) -> list[Any]:
    """Writes RUNS runs below a folder, those of the source under names of their own. Returns their
    summaries."""
    folders = sorted(path.parent for path in source.rglob("summary.json"))
    summaries = []
    for number, folder in itertools.islice(itertools.product(range(RUNS), folders), RUNS):
        copy = target / str(number) / folder.relative_to(source)
        shutil.copytree(folder, copy)
        table = tomllib.loads((copy / "config.toml").read_text(encoding="utf-8"))
        summary = json.loads((copy / "summary.json").read_text(encoding="utf-8"))
        for values in (table, summary):
            values["name"] = f"{values.get('name') or values['method']} {number}"
        (copy / "config.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        (copy / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        summaries.append(summary)
    return summaries


def chromium() -> str:
    """The path of Chromium. Exits if it is not installed."""
    names = ("chromium", "chromium-browser", "chrome")
    if found := next(filter(None, map(shutil.which, names)), None):
        return found
    sys.exit("no Chromium. Install it, such as by apt-get install chromium.")


def first_table(browser: str, page: Path) -> list[float]:
    """Seconds until Chromium paints the page, whose first table is at its top, and until all
    charts are drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = window.new_page()
        started = time.perf_counter()
        tab.goto(page.as_uri(), wait_until="commit")
        tab.wait_for_selector("body[data-drawn]")
        drawn = time.perf_counter() - started
        paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        window.close()
    return [paint / 1000, drawn]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--json", type=Path)
    given = flags.parse_args()
    browser = chromium()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(RESULTS / "study-sst2" / "runs.tar.xz", folder / "study")
        summaries = copies(folder / "study", folder / "runs")
        page, taken = folder / "report.html", []
        command = [sys.executable, "-m", "lora", "report", folder / "runs", "--output", page]
        for _ in range(ROUNDS):
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            taken.append(time.perf_counter() - started)
        scored = [summary for summary in summaries if summary["split"] == "test"]
        tables = [first_table(browser, page) for _ in range(ROUNDS)]
        result: dict[str, Any] = {
            "runs": len(summaries),
            "of them scored on test": len(scored),
            "rows of test": scored[0]["rows"],
            "bytes": page.stat().st_size,
            "seconds to build": taken,
            "seconds until the first table": [first for first, _ in tables],
            "seconds until all charts": [last for _, last in tables],
        }
    for key, value in result.items():
        shown = f"{statistics.median(value):.2f} (median)" if isinstance(value, list) else value
        print(f"{key:<32} {shown}")
    if given.json:
        write(given.json, result)


if __name__ == "__main__":
    main()
