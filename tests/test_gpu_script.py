"""benchmarks/gpu.py: every line of it runs on small sizes, so that no GPU minute is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import gpu


def test_its_sections_fit_into_six_minutes() -> None:
    assert sum(section.seconds for section in gpu.SECTIONS.values()) <= 360


def test_without_a_gpu_it_says_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert gpu.main([]) == 2
    assert "--device cpu --tiny" in capsys.readouterr().out


def test_an_error_is_recorded_and_the_next_section_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(bench: gpu.Bench, results: object) -> dict[str, object]:
        raise RuntimeError("no such kernel")

    fine = gpu.Section(1, lambda bench, results: {"fine": True})
    slow = gpu.Section(10_000, lambda bench, results: {"slow": True})
    monkeypatch.setattr(gpu, "SECTIONS", {"a": gpu.Section(1, fail), "b": fine, "c": slow})
    file = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--json", str(file)]) == 1
    sections = json.loads(file.read_text())["sections"]
    assert sections["a"]["error"] == "RuntimeError: no such kernel"
    assert sections["b"]["fine"]
    assert "10000" in sections["c"]["skipped"]


def test_a_process_that_fails_or_takes_too_long_is_recorded() -> None:
    bench = gpu.Bench(torch.device("cpu"), True, time.perf_counter() + 1)
    with ThreadPoolExecutor(2) as pool:
        python = [sys.executable, "-c"]
        late = pool.submit(gpu.process, bench, [*python, "import time; time.sleep(60)"])
        bad = pool.submit(gpu.process, bench, [*python, "raise SystemExit('no such kernel')"])
        assert gpu.outcome(late.result)["error"].startswith("TimeoutExpired")
        assert "exit code 1: no such kernel" in gpu.outcome(bad.result)["error"]


@pytest.mark.slow
def test_every_section_runs_on_small_sizes(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sections = json.loads(file.read_text())["sections"]
    assert sections.keys() == gpu.SECTIONS.keys()
    correctness = sections["correctness"]
    assert correctness["contract"]["lora"]["held"]
    assert correctness["contract"]["lora"]["failed"] == []
    assert all("planned / measured" in run for run in correctness["plan"].values())
    assert sections["nf4"]["64 x 128"]["bits as on the CPU"]
    resumed = correctness["resume"]["deterministic"]
    assert "loss" in resumed
    assert resumed["adapters are equal"]
    assert resumed["losses are equal"]
    assert {"limit", "ours", "ours, dropout", "full"} <= sections["step"]["seconds"].keys()
