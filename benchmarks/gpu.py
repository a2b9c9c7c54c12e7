"""LoRA on a GPU, measured by one script: limits, correctness, steps, NF4, resume, generation.

python -m benchmarks.gpu [--device cuda] [--minutes 6] [--only SECTION ...] [--json FILE]
python -m benchmarks.gpu --device cpu --tiny       the whole script, on small sizes

A section that would not fit into the time left is skipped by name, and an error in one is recorded
while the others go on. The file is written anew after each section. Ratios are of interleaved
rounds. Do not compare ratios from different files: the card and its state differ.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers

import lora
from benchmarks import gpu_steps
from benchmarks.gpu_steps import Bench, R, autocast, loss_of, pack_blocks
from benchmarks.machine import RESULTS, write
from lora import nf4
from lora.finetune.demo.bases import build_demo
from lora.finetune.record import StepRow, metrics_of
from lora.kernels.products import summed
from lora.testing import CLAUSES, cases, run_clause

ROOT = Path(__file__).parents[1]
TINY_RUN = (
    "--base", "demo-lm-tiny", "--data", "tasks/copy", "--limit", "64", "--batch-size", "8",
    "--epochs", "2", "--r", "4", "--learning-rate", "0.001", "--max-length", "64",
    "--dev-limit", "8", "--test-limit", "8", "--max-new-tokens", "4",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One part of the script. `run` gets the bench and the results so far."""

    seconds: int  # about what it takes on an H200
    run: Callable[[Bench, dict[str, Any]], dict[str, Any]]


def ceilings(bench: Bench, results: dict[str, Any]) -> dict[str, Any]:
    """The rates that limit everything else: copies, and products with W and with A."""
    size = 2**12 if bench.tiny else 2**29  # elements of 2 bytes
    source = torch.empty(size, dtype=torch.bfloat16, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.compare({"copy": lambda: target.copy_(source)})["seconds"]["copy"]
    bandwidth = 2 * source.nbytes / copy
    side = 64 if bench.tiny else 8192
    square = product(bench, side, side, side)
    tokens, wide, deep = (64, 32, 48) if bench.tiny else (8192, 4096, 14336)
    shapes = ((wide, wide), (wide, wide // 4), (wide, deep), (deep, wide))
    layers = {shape: orders(bench, tokens, *shape) for shape in shapes}
    result: dict[str, Any] = {
        "copy bytes per second": bandwidth,
        "products flops": square,
        "layer flops": {
            f"{i} to {o}": 2 * tokens * i * o / seconds["wide product alone"]
            for (i, o), seconds in layers.items()
        },
        "order of the update, seconds": {f"{i} to {o}": each for (i, o), each in layers.items()},
    }
    x = torch.randn(tokens, wide, dtype=torch.bfloat16, device=bench.device)
    thin = {
        r: torch.randn(r, wide, dtype=torch.bfloat16, device=bench.device) for r in (8, 16, 48, 5)
    }
    result["thin product, share of the copy"] = {
        r: x.nbytes / bandwidth / bench.device_seconds(partial(torch.mm, x, A.t()))
        for r, A in thin.items()
    }
    h = torch.randn(tokens, R, dtype=torch.bfloat16, device=bench.device)
    forms: dict[str, Callable[[], Any]] = {
        "bfloat16": lambda: h.t() @ x,
        "float32": lambda: h.float().t() @ x.float(),
        "ours": lambda: summed(h, x),
    }
    if bench.on_cuda:
        forms["out_dtype"] = lambda: torch.mm(h.t(), x, out_dtype=torch.float32)
    result["gradient of A, seconds"] = {
        name: bench.device_seconds(form) for name, form in forms.items()
    }
    return result


def product(bench: Bench, m: int, k: int, n: int) -> float:
    """Returns the FLOP/s of x (m, k) Wᵀ with W (n, k), in bfloat16."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=bench.device)
    W = torch.randn(n, k, dtype=torch.bfloat16, device=bench.device)
    seconds = bench.compare({"product": lambda: x @ W.t()})["seconds"]["product"]
    return 2 * m * k * n / seconds


def orders(bench: Bench, m: int, k: int, n: int) -> dict[str, float]:
    """Returns the seconds of x Wᵀ alone, and with h Bᵀ added before or after it, in bfloat16."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=bench.device)
    W = torch.randn(n, k, dtype=torch.bfloat16, device=bench.device)
    h = torch.randn(m, R, dtype=torch.bfloat16, device=bench.device)
    up = torch.randn(R, n, dtype=torch.bfloat16, device=bench.device)
    forms: dict[str, Callable[[], Any]] = {
        "wide product alone": lambda: x @ W.t(),
        "update first": lambda: (h @ up).addmm_(x, W.t()),
        "wide product first": lambda: (x @ W.t()).addmm_(h, up),
    }
    seconds: dict[str, float] = bench.compare(forms)["seconds"]
    return seconds


def correctness(bench: Bench, results: dict[str, Any]) -> dict[str, Any]:
    """The contract on the device, the tests that need one, steps without a synchronisation, whole
    runs in the modes that only a device shows, stopped and resumed ones, and the plan of memory.

    The runs are processes, two at a time beside the contract: nothing here is timed, and more
    processes on one GPU take longer. One that fails, or has not ended when the script's time is
    over, is recorded as such."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        pending = {
            "resume": resumed(bench, folder, pool),
            "plan": planned(bench, folder, pool),
            "runs": {
                mode: pool.submit(trained, bench, folder / mode, *TINY_RUN, *flags)
                for mode, flags in modes(bench).items()
            },
        }
        if bench.on_cuda:
            pending["tests"] = {"kernels": pool.submit(device_tests, bench)}
        result: dict[str, Any] = {"synchronisations": {
            name: outcome(partial(synchronisations, bench, name))
            for name in ("lora", "lora on NF4", "dora")
        }}  # fmt: skip
        result["contract"] = {
            method: outcome(partial(contract, bench, method))
            for method in (["lora"] if bench.tiny else lora.METHODS)
        }
        for key, futures in pending.items():
            result[key] = {name: outcome(each.result) for name, each in futures.items()}
    return result


def outcome(found: Callable[[], Any]) -> Any:
    """Returns what a process or a check found, or the error that it ended with."""
    try:
        return found()
    except Exception as error:  # the others' results are kept, whatever this one met
        return {"error": f"{type(error).__name__}: {error}"[-1000:]}


def process(bench: Bench, command: Sequence[str], check: bool = True) -> str:
    """Returns what a process printed. It is killed when the script's time is over.

    Raises RuntimeError with what it said last if it fails, unless not `check`."""
    left = max(1.0, bench.ends - time.perf_counter())
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=left
    )
    if done.returncode and check:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout.strip() or done.stderr.strip()


def modes(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Returns the flags of the small runs."""
    if bench.tiny:  # the resumed run is in float16
        return {}
    return {
        "plain": (), "float16": ("--dtype", "float16"),
        "compiled": ("--compile",), "offloaded": ("--offload",), "sharded": ("--shard",),
        "nf4": ("--quantize", "nf4", "--activation-checkpointing", "--lora-dropout", "0.1"),
        "dora": ("--method", "dora"),
    }  # fmt: skip


def device_tests(bench: Bench) -> dict[str, Any]:
    """Returns how the tests that need a GPU ended."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
    command += ["tests/kernels", "-k", "cuda or device"]
    lines = process(bench, command, check=False).splitlines()
    return {"last line": lines[-1], "failed": [x for x in lines if x.startswith("FAILED")]}


def contract(bench: Bench, name: str) -> dict[str, Any]:
    """Returns how many checks of a method's contract held, and a line for each that failed; for
    which clauses no time was left, if there are any."""
    method = lora.METHODS[name]
    config = method.Config(**method.example)
    held, failed, left = 0, list[str](), list(CLAUSES)
    every = list(cases(str(bench.device)))
    if bench.tiny:  # tests/core runs them all on the processor
        every = every[:1]
    while left and time.perf_counter() < bench.ends:
        clause = left.pop(0)
        for case in every:
            found = run_clause(clause, method, config, case).outcome
            held += found == "passed"
            if found.startswith("failed"):
                failed.append(f"{clause}, {case}: {found}")
    return {"held": held, "failed": failed} | ({"no time for": left} if left else {})


def synchronisations(bench: Bench, name: str) -> str:
    """Returns "none", or the error that a synchronisation in forward or backward raises."""
    model = bench.llama(1, head=False)
    if "NF4" in name:
        pack_blocks(model)
    gpu_steps.ours(model, "dora" if name == "dora" else "lora")
    ids = bench.ids(2, 64, model)

    def one_step() -> None:
        # transformers asks the device once a forward whether rows are packed; that is not ours.
        asked = mock.patch("transformers.masking_utils.find_packed_sequence_indices")
        with asked as indices, autocast(bench):
            indices.return_value = None
            loss_of(model, ids).backward()

    for _ in range(2):  # caches are made, and counters are read, in the first step
        one_step()
    if bench.on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        one_step()
        return "none"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        if bench.on_cuda:
            torch.cuda.set_sync_debug_mode("default")


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora", *map(str, arguments)]


def trained(bench: Bench, folder: Path, *flags: str) -> dict[str, Any]:
    """Returns the loss and the scores of a `lora train` on the device, and its peak in bytes."""
    process(bench, command_line("train", *flags, "--device", bench.device, "--run-dir", folder))
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("loss", "metrics", "peak_bytes")}


def planned(bench: Bench, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Future[Any]]:
    """Begins runs on a larger base, whose peak `lora plan` foretells."""
    flags = larger_run(bench, folder)
    kinds = {"plain": (), "checkpointed": ("--activation-checkpointing",)}
    kinds["nf4, checkpointed"] = ("--quantize", "nf4", *kinds["checkpointed"])
    if bench.tiny:
        del kinds["plain"], kinds["checkpointed"]
    return {
        kind: pool.submit(beside_its_plan, bench, folder / f"planned, {kind}", *flags, *more)
        for kind, more in kinds.items()
    }


def beside_its_plan(bench: Bench, folder: Path, *flags: str) -> dict[str, Any]:
    """Returns the peak that `lora plan` expects of a run, and the measured one, in bytes."""
    from lora.finetune.config import parse_run
    from lora.finetune.plan import plan

    row = trained(bench, folder, *flags)
    device = ("--device", str(bench.device))
    row["planned"] = plan(parse_run([*flags, *device], "lora plan")).memory[0].peak
    row["planned / measured"] = row["planned"] / row["peak_bytes"]
    return row


def larger_run(bench: Bench, folder: Path) -> tuple[str, ...]:
    """Writes a base of 0.7 billion random weights and rows of 1,000 letters; returns the flags of a
    run on them."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16}
    if bench.tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    _, tokenizer, _ = build_demo("demo-lm-tiny", 0, "text", weights=False)
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=16, num_key_value_heads=4, vocab_size=len(tokenizer),
        max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.device(bench.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    del model
    bench.free()
    letters = random.Random(0)
    length = 50 if bench.tiny else 1000
    rows = [{"text": "".join(letters.choices("abcdefgh ", k=length))} for _ in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "--base", str(folder / "base"), "--data", str(folder / "rows.jsonl"), "--batch-size", "8",
        "--task", "text", "--epochs", "1", "--max-length", "1024",
    )  # fmt: skip


def step(bench: Bench, results: dict[str, Any]) -> dict[str, Any]:
    """Steps of 8 layers, the contenders interleaved."""
    rate = (
        results.get("ceilings", {}).get("products flops") or ceilings(bench, {})["products flops"]
    )
    return gpu_steps.steps_of_8_layers(bench, rate)


def packed(bench: Bench, results: dict[str, Any]) -> dict[str, Any]:
    """NF4 dequantised on the device: the time over a copy's of the same bytes, and the bits."""
    result: dict[str, Any] = {}
    shapes = ((64, 128),) if bench.tiny else ((4096, 4096), (14336, 4096))
    bandwidth = results.get("ceilings", {}).get("copy bytes per second")
    for shape in shapes:
        generator = torch.Generator(device="cpu").manual_seed(0)
        W = torch.randn(shape, generator=generator).to(torch.bfloat16)
        q = nf4.quantize(W.to(bench.device), double_quant=True)
        on_cpu = nf4.dequantize(nf4.quantize(W, double_quant=True), torch.bfloat16)
        ours = nf4.dequantize(q, torch.bfloat16)
        forms: dict[str, Callable[[], Any]] = {
            "ours": lambda q=q: nf4.dequantize(q, torch.bfloat16)
        }
        if bench.on_cuda and gpu_steps.have("bitsandbytes"):
            import bitsandbytes.functional as theirs

            w4, state = theirs.quantize_4bit(
                W.to(bench.device), quant_type="nf4", compress_statistics=True
            )
            forms["bitsandbytes"] = lambda w4=w4, state=state: theirs.dequantize_4bit(w4, state)
        seconds = {name: bench.device_seconds(form) for name, form in forms.items()}
        moved = W.numel() * (0.5 + 1 / 64 + 2)  # codes and scales read, bfloat16 written
        row: dict[str, Any] = {"bits as on the CPU": torch.equal(ours.cpu(), on_cpu)}
        row["seconds"] = seconds
        if bandwidth:
            row["over the copy limit"] = {n: s * bandwidth / moved for n, s in seconds.items()}
        result[" x ".join(map(str, shape))] = row
    return result


def resumed(bench: Bench, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Future[Any]]:
    """Begins runs that are stopped and resumed. The section step has what --deterministic costs."""
    kinds = {"plain": (), "deterministic": ("--deterministic",)}
    if bench.tiny:  # on a CPU both are the same
        kinds = {"deterministic": (*kinds["deterministic"], "--dtype", "float16")}
    epochs = ("--epochs", "1" if bench.tiny else "20")  # long enough to be stopped on a GPU
    begun = {}
    for kind, more in kinds.items():
        flags = (*TINY_RUN, *epochs, "--lora-dropout", "0.1", *more)
        into = folder / f"resumed, {kind}"
        whole = pool.submit(trained, bench, into / "whole", *flags)
        begun[kind] = pool.submit(stopped_and_resumed, bench, into, flags, whole)
    return begun


def stopped_and_resumed(
    bench: Bench, folder: Path, flags: Sequence[str], whole_run: Future[dict[str, Any]]
) -> dict[str, Any]:
    """Returns what the whole run found, and whether the resumed run equals it."""
    whole, cut = folder / "whole", folder / "cut"
    with subprocess.Popen(
        command_line("train", *flags, "--device", bench.device, "--run-dir", cut),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        while running.poll() is None and len(steps_of(cut)) < 3:
            time.sleep(0.02)
        running.send_signal(signal.SIGTERM)
    stopped_at = len(steps_of(cut))
    process(bench, command_line("train", "--resume", cut))
    found = whole_run.result()
    adapters = [
        (run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, cut)
    ]
    losses = [[row["loss"] for row in steps_of(run)] for run in (whole, cut)]
    return found | {
        "stopped at": stopped_at,
        "adapters are equal": adapters[0] == adapters[1],
        "losses are equal": losses[0] == losses[1],
    }


def steps_of(run: Path) -> list[StepRow]:
    """Returns the recorded steps of a run, none if it has not begun."""
    if not (run / "metrics.jsonl").is_file():
        return []
    return [row for row in metrics_of(run) if row["kind"] == "step"]


# What has to run alone comes first.
SECTIONS: dict[str, Section] = {
    "ceilings": Section(5, ceilings),
    "step": Section(25, step),
    "all layers": Section(80, lambda bench, _: gpu_steps.all_layers(bench)),
    "nf4": Section(5, packed),
    "qlora": Section(50, lambda bench, _: gpu_steps.qlora(bench)),
    "writing": Section(90, lambda bench, _: gpu_steps.writing(bench)),
    "correctness": Section(105, correctness),
}


@contextmanager
def recording(results: dict[str, Any], name: str, path: Path, about: dict[str, Any]) -> Any:
    """Writes the file after the section, also if it fails."""
    started = time.perf_counter()
    try:
        yield
    except Exception as error:  # the next section must run, whatever this one met
        results[name] = {"error": f"{type(error).__name__}: {error}"[:2000]}
        results[name]["traceback"] = traceback.format_exc()[-2000:]
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    results[name]["took seconds"] = round(time.perf_counter() - started, 1)
    write(path, {**about, "sections": results})


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"card": properties.name, "memory bytes": properties.total_memory}
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    for package in ("triton", "peft", "bitsandbytes"):
        with_it = gpu_steps.have(package)
        found[package] = sys.modules[package].__version__ if with_it else None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--device", default="cuda", help="cuda, or cpu with --tiny")
    flags.add_argument("--tiny", action="store_true", help="small sizes: does every line run?")
    flags.add_argument("--minutes", type=float, default=6, help="stop before this much time")
    flags.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    flags.add_argument("--json", type=Path, default=RESULTS / "gpu" / "gpu.json")
    given = flags.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this machine has no CUDA device. Try --device cpu --tiny.")
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "2")  # of the processes that run beside each other
    # A small processor has an hour: it is asked whether every line runs.
    ends = time.perf_counter() + 60 * (60 if given.tiny else given.minutes)
    bench = Bench(device, given.tiny, ends)
    results: dict[str, Any] = {}
    if given.json.is_file():  # sections that --only leaves out keep what was measured
        results = json.loads(given.json.read_text()).get("sections", {})
    for name in given.only:
        left = ends - time.perf_counter()
        if left < SECTIONS[name].seconds:
            skipped = f"{left:.0f} s were left, it takes {SECTIONS[name].seconds}"
            results.setdefault(name, {"skipped": skipped})  # what was measured before stays
            print(f"{name}: skipped: {skipped}", file=sys.stderr)
            continue
        with recording(results, name, given.json, about(device)):
            results[name] = SECTIONS[name].run(bench, results)
        bench.free()
    write(given.json, {**about(device), "sections": results})
    text = json.dumps(results, indent=2)
    print(text)
    return int('"error":' in text)


if __name__ == "__main__":
    sys.exit(main())
