"""docs/faults.md names, for every fault that users met, a test that is there."""

from __future__ import annotations

import ast
import re

from conftest import ROOT

PAGE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [line.split("|") for line in PAGE.split("\n") if re.match(r"\| [A-E]\d", line)]
LINES = {"A": 3, "B": 9, "C": 10, "D": 9, "E": 8}  # how many each part of the report has


def names_in(path: str) -> set[str]:
    """The tests of a file, `test` or `Class::test`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
            found.add(node.name)
    return found


def test_every_line_of_the_report_has_its_row() -> None:
    told = [row[1].strip() for row in ROWS]
    wanted = [f"{part}{number}" for part, most in LINES.items() for number in range(1, most + 1)]
    assert sorted(set(told)) == sorted(wanted)


def test_every_row_names_tests_that_are_there() -> None:
    for row in ROWS:
        tests = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", row[-2])
        assert tests, row[1]
        for path, name in tests:
            assert name.startswith(("test_", "Test")), name
            assert name in names_in(path), f"{path}::{name}"
