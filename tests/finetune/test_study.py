"""benchmarks/study.py: what another machine goes on from is all that a comparison reads."""

from __future__ import annotations

import json
from pathlib import Path

from made_runs import Made, make_run

from benchmarks.study import pack, unpack
from lora.finetune.comparison.analysis import analyse, as_json


def test_packed_runs_compare_as_the_runs_do(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    for made in [Made(method, seed) for method in ("lora", "full") for seed in (0, 1)]:
        run = make_run(original / f"{made.method}-{made.seed}", made)
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
    make_run(original / "search" / "lora-0.002", Made(seed=1000, split="dev"))
    make_run(original / "lora-2", Made(seed=2))
    (original / "lora-2" / "summary.json").unlink()  # not complete
    (copy / "lora-0").mkdir(parents=True)
    (copy / "lora-0" / "config.toml").write_text("it is there and stays")

    pack(original, tmp_path / "runs.tar.xz")
    unpack(tmp_path / "runs.tar.xz", copy)
    assert (copy / "lora-0" / "config.toml").read_text() == "it is there and stays"
    (copy / "lora-0" / "config.toml").write_bytes((original / "lora-0/config.toml").read_bytes())
    assert not (copy / "lora-2").exists()
    assert not list(copy.rglob("adapter"))
    row = json.loads((copy / "full-1" / "predictions.jsonl").read_text().splitlines()[0])
    assert row.keys() == {"text", "label", "prediction"}

    def compared(folder: Path) -> str:
        runs = [each.parent for each in sorted(folder.rglob("summary.json"))]
        return as_json(analyse(runs)).decode().replace(str(folder), "")

    assert compared(copy) == compared(original)
