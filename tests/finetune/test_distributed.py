"""Two ranks compute what one process does, in data parallel and on a base in pieces; a rank that
is gone ends the others; the launcher passes on signals and exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from conftest import ROOT
from filelock import FileLock

import lora
from lora.errors import ConfigError, TrainingError
from lora.finetune import distributed
from lora.identity import fingerprint

WORKER = [str(ROOT / "tests" / "ranks.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
AROUND = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("base")
    ranks.make_base(found)
    return found


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks found what is tested below, in one start for all tests."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / "ranks"
    with FileLock(shared / "ranks.lock"):
        if not folder.exists():
            folder.mkdir()
            ranks.make_base(folder)
            command = [*TORCHRUN, *WORKER, "check", str(folder)]
            done = subprocess.run(command, env=AROUND, capture_output=True, text=True, timeout=300)
            (folder / "said").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def found(checked: Path) -> list[dict[str, Any]]:
    """What each of the two ranks found."""
    files = [checked / f"rank-{number}.json" for number in (0, 1)]
    assert all(file.exists() for file in files), (checked / "said").read_text()
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module", params=["dense", "nf4"])
def single(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Any, list[float]]:
    """A base trained in this process, and its losses."""
    model = ranks.build(folder, request.param)
    return request.param, model, ranks.fit(model)


@pytest.mark.parametrize("way", ["", " sharded", " read"])
def test_two_ranks_train_as_one_process(way: str, single: Any, found: list[dict[str, Any]]) -> None:
    """In data parallel, on a base cut into pieces, and on one that was read in pieces."""
    kind, model, losses = single
    mine, others = (one["losses"][kind + way] for one in found)
    assert mine["losses"] == others["losses"]
    assert len(mine["losses"]) == 10 if "read" in way else 20
    assert mine["losses"] == pytest.approx(losses[: len(mine["losses"])], rel=1e-5)
    assert min(losses) < 0.8 * losses[0]
    assert mine["fingerprint"] == others["fingerprint"] == fingerprint(model)
    assert mine["logits"] == others["logits"]


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("way", ["", " sharded", " read"])
def test_what_rank_0_saves_loads_onto_the_whole_base(
    way: str, kind: str, found: list[dict[str, Any]], checked: Path
) -> None:
    assert not (checked / "adapters" / "nowhere").exists()
    base = ranks.read(checked, kind)
    lora.load(base.model, checked / "adapters" / (kind + way))
    logits = base.model.eval()(input_ids=ranks.rows(0)[0]).logits
    torch.testing.assert_close(logits, torch.tensor(found[0]["losses"][kind + way]["logits"]))


def test_a_rank_holds_about_half_of_the_base(found: list[dict[str, Any]]) -> None:
    for one in found:
        held = {kind: value["held"] for kind, value in one["losses"].items()}
        # The adapter is whole on each: a good part, beside a base as small as this.
        assert held["dense read"] == held["dense sharded"] < 0.6 * held["dense"]
        assert held["nf4 read"] == held["nf4 sharded"] < 0.75 * held["nf4"]


def test_every_start_is_that_on_the_whole_base(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert len(one["starts"]) > 5
        assert all(one["starts"].values()), one["starts"]


def test_blocks_are_found_in_other_models(found: list[dict[str, Any]]) -> None:
    assert len(found[0]["kinds"]) > 4
    assert max(found[0]["kinds"].values()) < 1e-6, found[0]["kinds"]


def test_gradients_are_those_of_torchs_own_data_parallel(found: list[dict[str, Any]]) -> None:
    assert found[0]["reference"] < 1e-6


def test_a_layer_of_a_base_in_pieces_can_be_called_alone(found: list[dict[str, Any]]) -> None:
    assert max(found[0]["alone"].values()) < 1e-6


def test_no_cast_of_the_whole_base_is_kept(found: list[dict[str, Any]]) -> None:
    assert found[0]["casts"] == 0


def test_messages(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["messages"] == {"same": [1.0] * 3, "gather": [{"rank": 0}, {"rank": 1}]}


def test_an_error_on_any_rank_ends_all_and_is_shown_once(found: list[dict[str, Any]]) -> None:
    assert found[0]["errors"] == {
        "()": "came out",
        "(0, 1)": "DataError: no such file, says 0.",
        "(1,)": "RunError: rank 1 of 2 cannot continue. DataError: no such file, says 1.",
        "(0,)": "DataError: no such file, says 0.",
    }
    assert set(found[1]["errors"].values()) == {"came out", "left with 2"}


def test_one_process_is_rank_0_of_1() -> None:
    tensor = torch.ones(2)
    with distributed.group(), distributed.alike():
        distributed.total([tensor])
        distributed.same([tensor])
        assert (distributed.rank(), distributed.size()) == (0, 1)
        assert distributed.gather(tensor) == [tensor]
    assert tensor.tolist() == [1, 1]
    assert distributed.device().type in ("cpu", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
def test_offloading_needs_an_accelerator(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no accelerator"):
        distributed.shard(ranks.build(folder, "dense"), offload=True)


@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_a_start_that_needs_the_whole_base_is_refused(start: str, folder: Path) -> None:
    base = ranks.load_base(str(folder), 2, "classification", 3, part=(0, 2))
    config = lora.LoRAConfig(r=2, target_modules=("q_proj",), init_lora_weights=start)
    more: Any = {"batches": [ranks.rows(0)[0]]} if start == "eva" else {"pack": ["model.layers.0"]}
    with pytest.raises(ConfigError, match="--init-lora-weights default"):
        lora.inject(base.model, config, **more)


@pytest.mark.slow
def test_torchrun_ends_the_ranks_when_one_is_killed(folder: Path) -> None:
    command = [*TORCHRUN, *WORKER, "die", str(folder)]
    began = time.monotonic()
    done = subprocess.run(command, env=AROUND, capture_output=True, text=True, timeout=90)
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr


@pytest.mark.slow
def test_a_rank_says_that_another_is_gone(folder: Path) -> None:
    """With nobody there to end it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    around = AROUND | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    both = [
        subprocess.Popen(
            [sys.executable, *WORKER, "die", str(folder)], stderr=subprocess.PIPE, text=True,
            env=around | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in (0, 1)
    ]  # fmt: skip
    said, _ = (process.communicate(timeout=90)[1] for process in both)
    assert [process.returncode for process in both] == [2, -signal.SIGKILL]
    assert "TrainingError: rank 0 of 2 waited for another rank, which is gone" in said


STUB = """
import os, signal, sys, time
rank, job = os.environ["RANK"], sys.argv[1]
def told(number, frame):
    os.write(1, f"rank {rank} told\\n".encode())  # one write: lines of two ranks do not mix
    time.sleep(0.5)
    sys.exit(0)
signal.signal(signal.SIGINT, told)
signal.signal(signal.SIGTERM, told)
if job == "threads":
    open(f"threads-{rank}", "w").write(os.environ["OMP_NUM_THREADS"])
    sys.exit(0)
if job == "fail" and rank == "1":
    sys.exit(3)
if job == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
os.write(1, f"rank {rank} began\\n".encode())
time.sleep(60)
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which `python -m lora` is a few lines that start at once."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "__main__.py").write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path


@pytest.mark.slow
def test_launch_passes_on_what_the_ranks_left_with(
    stub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    before = signal.getsignal(signal.SIGINT)
    assert distributed.launch(2, ["threads"]) == 0
    assert [(stub / f"threads-{number}").read_text() for number in (0, 1)] == ["3", "3"]
    assert distributed.launch(2, ["fail"]) == 3
    with pytest.raises(TrainingError, match=r"rank 1 of 2 \(process \d+\) was ended by SIGKILL"):
        distributed.launch(2, ["killed"])
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err == ""


def test_launch_wants_an_accelerator_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="found 1. Set --nproc 1,"):
        distributed.launch(2, [])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch_tells_each_rank_once(number: signal.Signals, stub: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from lora.finetune.distributed import launch
        sys.path.pop(0)
        sys.exit(launch(2, ["wait"]))
        """
    script = stub / "launcher.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    began = sorted(process.stdout.readline() for _ in range(2))
    assert began == ["rank 0 began\n", "rank 1 began\n"]
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.2)
    said, _ = process.communicate(timeout=60)
    assert sorted(said.splitlines()) == ["rank 0 told", "rank 1 told"]
    assert process.returncode == 128 + number
