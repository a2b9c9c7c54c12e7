"""`lora report`: one page that holds all tables, escapes every text, and loads nothing."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import Made, make_comparison, make_run
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from lora.errors import RunError
from lora.finetune.cli import main
from lora.finetune.colours import COLOURS
from lora.finetune.data.corpus import read_predictions
from lora.finetune.report.charts import charts_of
from lora.finetune.report.contents import MOST_EXAMPLES, lead_of, tables_of
from lora.finetune.report.curves import curves
from lora.finetune.report.evidence import Answers, Evidence, collect, folders_of_runs
from lora.finetune.report.formats import Table, as_csv, as_latex, as_markdown, cells
from lora.finetune.report.mistakes import disagreements, reports_of
from lora.finetune.report.page import page_of


class Page(HTMLParser):
    """What a page holds: rows of texts by the key of each table, attributes, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.attributes: list[tuple[str, str, str]] = []  # (tag, name, value)
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._key, self._cell, self._script = "", False, False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        values = dict(attrs)
        if tag == "div" and values.get("class") == "table":
            self._key = values["id"] or ""
            self.tables[self._key] = []
        elif tag == "tr":
            self.tables[self._key].append([])
        elif tag in ("td", "th"):
            self.tables[self._key][-1].append("")
            self._cell = True
        elif tag == "script":
            self.scripts.append("")
            self._script = True

    def handle_endtag(self, tag: str) -> None:
        self._cell &= tag not in ("td", "th")
        self._script &= tag != "script"

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        else:
            self.texts.append(data)
            if self._cell:
                self.tables[self._key][-1][-1] += data

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts read."""
        data: dict[str, Any] = json.loads(self.scripts[0])
        return data


def evidence_of(folder: Path) -> Evidence:
    return collect(folders_of_runs([folder]), lambda description: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods with three seeds, after a search of five rates; and a run that was cut off."""
    folder = make_comparison(
        tmp_path_factory.mktemp("report") / "runs", ["lora", "full", "bitfit"], 3, 5
    )
    cut = make_run(folder / "cut", Made(seed=7))
    (cut / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def evidence(folder: Path) -> Evidence:
    return evidence_of(folder)


@pytest.fixture(scope="module")
def page(evidence: Evidence) -> Page:
    return Page(page_of(evidence).decode())


def test_the_page_holds_every_table(page: Page, evidence: Evidence) -> None:
    keys = {
        "methods", "rates", "classes", "confusions", "disagreements", "differences", "shared",
        "environments", "runs",
    }  # fmt: skip
    assert page.tables.keys() == keys == tables_of(evidence).keys()
    head, *rows = page.tables["methods"]
    assert head[:3] == ["method", "test accuracy", "95 % interval"]
    assert {row[0] for row in rows} == {"lora", "full", "bitfit"}
    scores = [float(row[1].split()[0]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert len(page.tables["rates"]) == 1 + 3 * 5
    assert sum(row[3].startswith("chosen") for row in page.tables["rates"]) == 3
    assert len(page.tables["runs"]) == 1 + 3 * 3 + 3 * 5 + 1


def test_the_page_has_the_verdict_and_says_what_is_missing(page: Page, evidence: Evidence) -> None:
    for sentence in evidence.analysis.verdict:
        assert sentence.replace(" %", "\u00a0%") in page.texts
    best, second = evidence.analysis.ranked[:2]
    points = 100 * (best.mean - second.mean)
    assert f"It is {points:.1f} points ahead of {second.name}, the next." in page.texts
    assert "1 incomplete" in page.texts
    (cut,) = [row for row in page.tables["runs"] if row[0] == "cut"]
    assert cut[4] == "step 40 of 40"
    assert cut[7].startswith("lora train --resume ")


def test_the_page_loads_nothing(page: Page) -> None:
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "poster", "srcset", "data"):
            assert value.startswith("#"), (tag, name, value)
        assert "url(" not in value
    style = "".join(page.texts)
    assert "@import" not in style
    (policy,) = [value for _, name, value in page.attributes if "default-src" in value]
    assert policy.startswith("default-src 'none'; ")
    assert policy.count("'sha256-") == 2  # each script by its hash: no other may run
    assert "unsafe-eval" not in policy


def test_every_chart_has_words_and_data(page: Page) -> None:
    charts = page.data["charts"]
    assert {"parameters", "seconds", "rates", "confusion"} < charts.keys()
    assert sum(key.startswith("curve-") for key in charts) == 3
    for spec in charts.values():
        assert len(spec["description"]) > 40
        assert spec["data"]["values"]
    drawn = [value for _, name, value in page.attributes if name == "data-chart"]
    assert sorted(drawn) == sorted(charts)


def test_every_file_that_a_button_saves_is_in_the_page(page: Page) -> None:
    saved = {value for _, name, value in page.attributes if name == "data-save"}
    pictures = {name for name in saved if name.endswith((".svg", ".png"))}
    assert saved - pictures == page.data["files"].keys()
    assert {name.rpartition(".")[0] for name in pictures} == page.data["charts"].keys()
    assert "seed = 2" in page.data["files"]["lora-2.toml"]


def test_a_comparison_may_be_in_a_folder_named_search(tmp_path: Path) -> None:
    make_comparison(tmp_path / "search", ["lora", "full"], seeds=2, rates=3)
    analysis = evidence_of(tmp_path).analysis
    assert [(each.name, each.seeds) for each in analysis.methods] == [
        ("full", (0, 1)), ("lora", (0, 1)),
    ]  # fmt: skip
    assert all(each.search and len(each.search.tried) == 3 for each in analysis.methods)


def test_runs_whose_names_differ_in_one_character_are_saved_under_two(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "search" / "lora", Made(seed=3))
    make_run(tmp_path / "runs" / "search-lora", Made(seed=4))
    data = Page(page_of(evidence_of(tmp_path / "runs")).decode()).data
    seeds = [re.findall(r"seed = (\d)", data["files"][f"search-lora{end}.toml"])
             for end in ("", "-2")]  # fmt: skip
    assert sorted(seeds) == [["3"], ["4"]]


def _luminance(colour: str) -> float:
    """The relative luminance of #rrggbb, of WCAG 2.2."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("page_colour", ["#ffffff", "#14171a"])
def test_every_line_can_be_seen(page_colour: str) -> None:
    """WCAG 2.2, 1.4.11: the contrast of graphics is at least 3 to 1."""
    paper = _luminance(page_colour)
    for colour in COLOURS:
        lighter, darker = sorted((paper, _luminance(colour)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 3, colour


HOSTILE = (
    "<script>alert(1)</script>", '" onmouseover="alert(1)', "</script><b>", "a\0b\x1b[31m",
    "\u202eright to left", "a\u2028b", "<!-- <script>", "{{ 7 * 7 }}", "SURROGATE", "| a | b |",
)  # fmt: skip


def test_every_text_of_the_data_is_escaped(tmp_path: Path) -> None:
    texts = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(200)]
    labels = ("<b>no</b>", "yes & 'no'")
    names = {"lora": 'my <i>method</i> "x" </script>', "bitfit": "{{ other }}"}
    for method, accuracy in (("lora", 0.8), ("bitfit", 0.6)):
        settings = (("name", names[method]),)
        made = Made(method, accuracy=accuracy, labels=labels, texts=texts, settings=settings)
        path = make_run(tmp_path / "runs" / method, made) / "predictions.jsonl"
        # A lone surrogate can only come from an escape in JSON.
        path.write_text(path.read_text().replace("SURROGATE", r"\ud800"))
    html = page_of(evidence_of(tmp_path / "runs"))
    page = Page(html.decode())
    assert len(page.scripts) == 3
    tags = {tag for tag, _, _ in page.attributes}
    assert not tags & {"b", "i"}
    assert not any(attribute.startswith("on") for _, attribute, _ in page.attributes)
    shown = {row[1] for row in page.tables["disagreements"][1:]}
    assert any(text.startswith("<script>alert(1)</script>") for text in shown)
    assert any(text.startswith("a\ufffdb\ufffd[31m") for text in shown)
    assert any(text.startswith("{{ 7 * 7 }}") for text in shown)
    assert b"\0" not in html
    assert {row[0] for row in page.tables["methods"][1:]} == set(names.values())
    assert {row[1] for row in page.tables["classes"][1:]} == set(labels)
    data = page.data["charts"]["confusion"]["data"]["values"]
    assert {cell["true"] for cell in data} == set(labels)


def test_scores_per_class_are_those_of_the_rows(page: Page, evidence: Evidence) -> None:
    answers, result = evidence.answers, evidence.analysis.methods[0]
    true, predicted = [], []
    for folder in result.folders:
        predictions, references, _ = read_predictions(folder / "predictions.jsonl")
        predicted += predictions
        true += [reference[0] for reference in references]
    report = reports_of(answers)[result.name]
    labels = [each.label for each in report.classes]
    assert labels == ["negative", "positive"]
    expected = precision_recall_fscore_support(true, predicted, labels=labels)
    for i, scores in enumerate(report.classes):
        assert [scores.precision, scores.recall, scores.f1, scores.rows] == pytest.approx(
            [column[i] for column in expected]
        )
    matrix = confusion_matrix(true, predicted, labels=labels)
    assert report.matrix == tuple(map(tuple, matrix.tolist()))
    cells = [row for row in page.tables["classes"] if row[:2] == [result.name, "positive"]]
    assert cells[0][2] == f"{expected[0][1]:.3f}"
    assert cells[0][5] == str(expected[3][1] // len(result.folders))


def test_methods_disagree_where_some_are_right(evidence: Evidence) -> None:
    table = tables_of(evidence)["disagreements"]
    assert 0 < len(table.rows) <= MOST_EXAMPLES
    for row in table.rows[:20]:
        number, text, label, right, wrong = (cell.text for cell in row)
        index = int(number.replace(",", "")) - 1
        assert evidence.answers.texts[index] == text
        assert evidence.answers.references[index] == [label]
        methods = {*right.split(", "), *(part.partition(":")[0] for part in wrong.split(", "))}
        assert methods == {"lora", "full", "bitfit"}


def test_many_disagreements_are_cut_and_counted(tmp_path: Path) -> None:
    texts = [f"{i}: " + "long " * 100 for i in range(900)]
    make_comparison(tmp_path / "runs", ["lora", "head"], 1, texts=texts)
    table = tables_of(evidence_of(tmp_path / "runs"))["disagreements"]
    assert len(table.rows) <= MOST_EXAMPLES
    assert max(len(row[1].text) for row in table.rows) == 300
    assert re.search(r"disagree on \d+ of 900 rows", table.note)


def test_one_evaluation_makes_no_curve(tmp_path: Path) -> None:
    run = make_run(tmp_path / "lora-0", Made())
    lines = (run / "metrics.jsonl").read_text().splitlines()
    evaluations = [line for line in lines if json.loads(line)["kind"] == "evaluation"]
    kept = [line for line in lines if line not in evaluations[:-1]]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept))
    titles = [chart.title for chart in charts_of(evidence_of(tmp_path))]
    assert "Train loss over the epochs" in titles
    assert not [title for title in titles if title.startswith("Dev ")]


def test_a_curve_spans_its_seeds(folder: Path) -> None:
    runs = [folder / f"lora-{seed}" for seed in range(3)]
    drawn = curves(runs, "accuracy")
    assert drawn.keys() == {"train loss", "dev loss", "accuracy"}
    finals = [json.loads((run / "summary.json").read_text())["evaluations"][-1] for run in runs]
    last = drawn["accuracy"][-1]
    scores = [each["dev"]["accuracy"] for each in finals]
    assert last.epoch == 2
    assert (last.low, last.high) == (min(scores), max(scores))
    assert last.mean == pytest.approx(sum(scores) / 3)
    assert len(drawn["train loss"]) == 40
    (long,) = [make_run(folder.parent / "long", Made(steps=1000))]
    assert len(curves([long], "accuracy")["train loss"]) <= 60


def test_tables_as_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--output", str(tmp_path / "new" / "page.html"), "--tables", str(tmp_path / "tables")]
    assert main(["report", str(folder), *flags]) == 0
    shown = capsys.readouterr().out
    assert f"written: {tmp_path / 'new' / 'page.html'}" in shown
    assert f"note: {folder / 'cut'} is not complete: step 40 of 40." in shown
    rows = list(csv.reader(io.StringIO((tmp_path / "tables" / "methods.csv").read_text())))
    assert rows[0][0] == "method"
    assert len(rows) == 4
    assert r"\begin{tabular}" in (tmp_path / "tables" / "runs.tex").read_text()


def test_formats_keep_the_text_of_a_cell() -> None:
    quoted = 'say "x", 5 % & $_{}#'
    rows = (cells("a|b\\", quoted, "two\nlines"),)
    table = Table("key", "Title", ("first", "second", "third"), rows)
    assert list(csv.reader(io.StringIO(as_csv(table))))[1] == [
        "a|b\\",
        'say "x", 5 % & $_{}#',
        "two lines",
    ]
    assert r"a\|b\\" in as_markdown(table)
    assert "1 &lt; 2 &amp;amp;" in as_markdown(replace(table, rows=(cells("1 < 2 &amp;", "", ""),)))
    assert r"5 \% \& \$\_\{\}\#" in as_latex(table)


def test_errors_name_what_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none is not a folder. Pass a run, or a folder of runs"):
        folders_of_runs([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="there is no run in .*empty. Run lora train first"):
        folders_of_runs([tmp_path / "empty"])
    with pytest.raises(RunError, match=r"no complete run .* lora train --resume .*cut"):
        evidence_of(folder / "cut")
    assert len(folders_of_runs([folder, folder / "lora-0"])) == len(folders_of_runs([folder]))


def test_runs_on_other_rows_are_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "a", Made())
    other = make_run(tmp_path / "b", Made("full"))
    lines = (other / "predictions.jsonl").read_text().splitlines(keepends=True)
    (other / "predictions.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(RunError, match="has other rows than that of"):
        evidence_of(tmp_path)


def test_the_page_is_written_whole_or_not_at_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").mkdir()
    assert main(["report", str(folder), "--output", str(tmp_path / "page.html")]) == 2
    assert "page.html cannot be written" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [tmp_path / "page.html"]


def test_a_damaged_run_is_listed(folder: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "good", Made())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("r = [")
    evidence = evidence_of(tmp_path)
    (row,) = evidence.incomplete
    assert row.state.startswith("damaged")
    assert tables_of(evidence)["runs"].rows[0][4].text == row.state


def as_task(run: Path, task: str) -> None:
    """Rewrite a run's results as those of another task."""
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    del summary["majority"]
    if task == "regression":
        summary["metrics"] = {"pearson": 0.5, "spearman": 0.5, "mse": 1.0}
        rows = [{"text": row["text"], "label": 1.0, "prediction": 0.5} for row in rows]
    elif task == "macro_f1":
        summary["metrics"] = {"macro_f1": 0.5, **summary["metrics"]}
        task = "classification"
    elif task == "unasked":
        summary["metrics"], rows, task = {"perplexity": 3.0, "token_accuracy": 0.4}, [], "text"
    elif task == "rouge":  # all rows of the first run are 0 or 1
        marks = [float(row["label"] == row["prediction"]) for row in rows]
        marks = marks if "lora" in run.name else [0.5 * mark for mark in marks]
        rows = [
            {"prompt": row["text"], "references": [row["label"]], "prediction": "x", "rougeL": mark}
            for row, mark in zip(rows, marks, strict=True)
        ]
        mean = sum(marks) / len(marks)
        summary["metrics"], task = {"rougeL": mean, "exact_match": 0.0}, "text"
    else:
        right = [row["label"] == row["prediction"] for row in rows]
        summary["metrics"] = {
            "exact_match": sum(right) / len(rows), "exact_match/a": 0.5, "exact_match/b": 0.75,
            "named_label/b": 0.9,
        }  # fmt: skip
        for row in rows:
            row["messages"] = [{"role": "user", "content": row.pop("text")}]
            row["references"] = [row.pop("label")]
    (run / "summary.json").write_text(json.dumps(summary | {"task": task}))
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_classes_are_shown_by_their_names(tmp_path: Path) -> None:
    settings = (("class_names", ["bad", "good"]),)
    make_comparison(tmp_path / "runs", ["lora", "head"], 1, labels=["0", "1"], settings=settings)
    page = Page(page_of(evidence_of(tmp_path / "runs")).decode())
    assert {row[1] for row in page.tables["classes"][1:]} == {"bad", "good"}
    assert {row[2] for row in page.tables["disagreements"][1:]} <= {"bad", "good"}


def test_forgetting_has_a_column_if_it_was_measured(tmp_path: Path, page: Page) -> None:
    assert "forgetting" not in page.tables["methods"][0]
    path = make_run(tmp_path / "run", Made()) / "summary.json"
    forgetting = {"source": "editorials", "tokens": 90, "before": 3.0, "after": 4.5}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"forgetting": forgetting}))
    head, row = Page(page_of(evidence_of(tmp_path)).decode()).tables["methods"]
    assert row[head.index("forgetting")] == "3.00 to 4.50"


@pytest.mark.parametrize("task", ["regression", "text", "rouge", "unasked", "macro_f1"])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    """They have no classes; texts with the right answer are still compared. Of a ROUGE no answer is
    simply right, and a run that was asked nothing has no answers. Classes have right rows by
    whichever metric they are compared."""
    for method, accuracy in (("lora", 0.8), ("full", 0.5)):
        as_task(make_run(tmp_path / method, Made(method, accuracy=accuracy)), task)
    page = Page(page_of(evidence_of(tmp_path)).decode())
    assert ({"classes", "confusions"} <= page.tables.keys()) == (task == "macro_f1")
    assert ("disagreements" in page.tables) == (task in ("text", "macro_f1"))
    assert ("tasks" in page.tables) == (task == "text")
    interval = page.tables["methods"][1][2].strip()
    assert bool(interval) == (task in ("text", "rouge"))
    if task == "text":
        assert page.tables["tasks"][1][:3] == ["a", "exact_match", "50.00 %"]
        assert page.tables["disagreements"][1][1].startswith("user: Sentence number")


def test_a_small_lead_is_not_zero(evidence: Evidence) -> None:
    first, second, *_ = evidence.analysis.ranked
    for gap, words in ((0.0001, "less than 0.1 points"), (0.0123, "1.2 points")):
        near = replace(second, mean=first.mean - gap)
        lead = lead_of(replace(evidence.analysis, methods=(first, near)))
        assert lead == f"It is {words} ahead of {second.name}, the next."


def test_many_classes_have_no_matrix(tmp_path: Path) -> None:
    labels = [f"intent {i}" for i in range(77)]
    make_comparison(tmp_path / "runs", ["lora", "head"], 1, labels=labels)
    page = Page(page_of(evidence_of(tmp_path / "runs")).decode())
    assert "confusion" not in page.data["charts"]
    assert len(page.tables["confusions"]) <= 201
    assert len(page.tables["classes"]) == 1 + 2 * 77


def test_methods_disagree_by_what_their_runs_count_as_right() -> None:
    """In tasks/... the sign of a number matters, which is lost if texts are compared in general."""
    marks = {"lora": [(False,)], "full": [(True,)]}
    predictions = {"lora": [["5"]], "full": [["-5"]]}
    (found,) = disagreements(Answers(["2 - 7"], [["-5"]], predictions, marks, ()))
    assert (found.row, found.right, found.wrong) == (0, {"full": "-5"}, {"lora": "5"})
