"""The page of `lora report` in Chromium: it sorts, filters, draws and saves, fetches nothing, and
can be read by everyone."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_runs import make_comparison
from test_report import HOSTILE, evidence_of

from lora.finetune.report.page import page_of

pytestmark = pytest.mark.slow
METHODS = ["lora", "full", "bitfit", "dora", "head"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("THE PAGE OF lora report IS NOT TESTED: no Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of 50 runs: five methods, five seeds, five rates, and texts that attack it."""
    folder = tmp_path_factory.mktemp("browser")
    texts = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(400)]
    make_comparison(folder / "runs", METHODS, 5, 5, texts=texts)
    (folder / "report.html").write_bytes(page_of(evidence_of(folder / "runs")))
    return folder / "report.html"


class Watched:
    """An open page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def rows(self, key: str) -> list[str]:
        """The first cells of the rows of a table that can be seen."""
        cells = self.page.locator(f"#{key} tbody tr:visible th")
        texts: list[str] = cells.all_inner_texts()
        return texts


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Watched]:
    watched = Watched(browser, path)
    watched.page.wait_for_selector("body[data-drawn]")
    yield watched
    watched.context.close()


def test_it_draws_all_charts_without_a_complaint_or_a_request(opened: Watched, path: Path) -> None:
    charts = opened.page.locator("[data-chart]")
    drawn = opened.page.locator("[data-chart] svg:visible")
    assert drawn.count() == charts.count() == 7
    assert opened.complaints == []
    assert opened.requests == [path.as_uri()]


def test_without_scripts_the_tables_are_there(browser: Any, path: Path) -> None:
    """So the first table is seen before the charting library is read."""
    watched = Watched(browser, path, java_script_enabled=False)
    assert watched.page.locator("#methods table").is_visible()
    assert len(watched.rows("runs")) == 50
    watched.context.close()


def test_tables_sort_by_number_and_by_keyboard(opened: Watched) -> None:
    head = opened.page.get_by_role("columnheader", name="trainable")
    head.get_by_role("button").click()
    assert opened.rows("methods") == ["head", "bitfit", "dora", "lora", "full"]
    assert head.get_attribute("aria-sort") == "ascending"
    opened.page.keyboard.press("Enter")  # the button has the focus
    assert opened.rows("methods") == ["full", "lora", "dora", "bitfit", "head"]
    assert head.get_attribute("aria-sort") == "descending"
    opened.page.locator("#methods .sort").first.click()
    assert opened.rows("methods") == sorted(METHODS)
    assert head.get_attribute("aria-sort") is None
    # Empty cells come last, in both directions.
    against = opened.page.get_by_role("columnheader", name="against lora").get_by_role("button")
    for _ in range(2):
        against.click()
        assert opened.rows("methods")[-1] == "lora"


def test_tables_filter(opened: Watched) -> None:
    table = opened.page.locator("#runs")
    table.get_by_role("searchbox").fill("dora complete")
    assert len(opened.rows("runs")) == 10
    assert table.locator("output").inner_text() == "10 of 50 rows"
    table.get_by_role("searchbox").fill("no such text")
    assert opened.rows("runs") == []
    table.get_by_role("searchbox").fill("")
    assert len(opened.rows("runs")) == 50


def test_methods_can_be_hidden_in_the_charts(opened: Watched) -> None:
    points = opened.page.locator("[data-chart=parameters] .mark-symbol.role-mark path")
    assert points.count() == 5
    opened.page.get_by_role("checkbox", name="bitfit").uncheck()
    assert points.count() == 4
    opened.page.get_by_role("checkbox", name="bitfit").check()
    assert points.count() == 5


def test_the_matrix_is_that_of_the_chosen_method(opened: Watched) -> None:
    numbers = opened.page.locator("[data-chart=confusion] .mark-text.role-mark text")
    first = numbers.all_text_contents()
    opened.page.get_by_role("combobox").select_option("head")
    assert numbers.count() == 4
    assert numbers.all_text_contents() != first


def test_tables_and_charts_are_saved(opened: Watched, tmp_path: Path) -> None:
    def saved(name: str) -> bytes:
        with opened.page.expect_download() as download:
            opened.page.get_by_role("button", name=name, exact=True).click()
        download.value.save_as(tmp_path / download.value.suggested_filename)
        return (tmp_path / download.value.suggested_filename).read_bytes()

    rows = list(csv.reader(io.StringIO(saved("Save as CSV: Methods").decode())))
    assert rows[0][:2] == ["method", "test accuracy"]
    assert {row[0] for row in rows[1:]} == set(METHODS)
    assert saved("Save as LaTeX: Methods").startswith(b"\\begin{tabular}")
    svg = saved("Save as SVG: Score against trainable parameters")
    assert svg.startswith(b"<svg")
    assert b"currentColor" not in svg
    assert saved("Save as PNG: Confusion matrix").startswith(b"\x89PNG")
    assert b"seed = 3" in saved("Save lora-3.toml")
    assert opened.complaints == []


def test_the_reader_chooses_light_or_dark(opened: Watched) -> None:
    def background() -> str:
        script = "getComputedStyle(document.body).backgroundColor"
        return str(opened.page.evaluate(script))

    light = background()
    opened.page.get_by_role("button", name="Light or dark").click()
    dark = background()
    opened.page.get_by_role("button", name="Light or dark").click()
    assert background() == light != dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_everyone_can_read_it(browser: Any, path: Path, scheme: str, width: int) -> None:
    """axe-core finds no fault in contrast, labels or structure; the page itself never scrolls
    sideways."""
    from axe_playwright_python.sync_playwright import Axe

    size = {"width": width, "height": 900}
    watched = Watched(browser, path, viewport=size, color_scheme=scheme, bypass_csp=True)
    watched.page.wait_for_selector("body[data-drawn]")
    results = Axe().run(watched.page)
    assert results.violations_count == 0, results.generate_report()
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    watched.context.close()


def test_on_paper_there_are_no_buttons(opened: Watched) -> None:
    opened.page.emulate_media(media="print")
    assert opened.page.locator("#methods table").is_visible()
    assert opened.page.locator("[data-save]:visible").count() <= 50  # a run's file name
    assert not opened.page.locator("input[type=search]:visible").count()
