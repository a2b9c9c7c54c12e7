"""Whether a folder holds the run that is asked for."""

from __future__ import annotations

import itertools
from dataclasses import replace

from lora.finetune.comparison.standing import _same
from lora.finetune.config import parse_run, to_table


def test_a_run_that_resolved_what_was_asked_is_the_same_run() -> None:
    for flags, settings in (
        (
            ["--base", "demo-lm-tiny", "--add-tokens", "<x>"],
            {"trainable_token_indices": {"e": [5]}},
        ),
        (["--modules-to-save", "classifier.out"], {"modules_to_save": ("classifier",)}),
    ):
        asked = parse_run(flags)
        found = replace(asked, settings=replace(asked.settings, **settings))
        assert _same(to_table(asked), to_table(found)), flags
    weighted = [parse_run(["--class-weights", "0", weight]) for weight in ("2", "3")]
    smooth = [*weighted, *(parse_run(["--label-smoothing", share]) for share in ("0.1", "0"))]
    for mine, other in itertools.permutations(map(to_table, smooth), 2):
        assert _same(mine, mine)
        assert not _same(mine, other)
    asked = parse_run(["--modules-to-save", "norm"])
    assert not _same(to_table(asked), to_table(parse_run(["--modules-to-save", "classifier"])))
    found = replace(asked, settings=replace(asked.settings, trainable_token_indices=(5,)))
    assert not _same(to_table(asked), to_table(found))
