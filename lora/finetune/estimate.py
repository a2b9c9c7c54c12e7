"""The result of a dry run: batches, memory by phase and use, and whether it fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora.report import Report

HOLES = 0.7
"""Heap fragmentation: free bytes between the blocks of glibc's heap, per byte in use. Measured for
`lora train` with four methods on the demo: 0.59 to 0.85 (benchmarks/results/plan.json)."""
MIB = 2**20


class Shape(NamedTuple):
    """The size of a batch, or of a part of it."""

    rows: int
    longest: int  # tokens of the longest row
    targets: int  # classes, quantities, or tokens with a label
    decoder_tokens: int = 0  # the longest decoder input of an encoder-decoder

    @property
    def positions(self) -> int:
        return self.rows * self.longest

    @property
    def size(self) -> int:
        """Positions of encoder and decoder. The largest batch is the one with the most."""
        return self.rows * (self.longest + self.decoder_tokens)

    def part(self, rows: int) -> Shape:
        """The first `rows` of its rows."""
        return self._replace(rows=rows, targets=-(-self.targets * rows // self.rows))


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. Each phase has the tensors that are alive at its peak, by use."""

    devices: int
    sharded: bool
    rows: int  # computed at a time
    loading: int
    training: dict[str, int]
    evaluation: dict[str, int]
    saving: dict[str, int]
    process: int = 0
    mapped: int = 0  # part of the base that is memory-mapped, in every phase
    on_heap: bool = False  # True on the CPU

    @property
    def tensors(self) -> int:
        """Bytes of tensors at the peak of the largest phase."""
        phases = (self.training, self.evaluation, self.saving)
        return max(self.loading, *(sum(phase.values()) for phase in phases))

    @property
    def peak(self) -> int:
        """The estimate of a run's peak_bytes: private memory of the process, or on a GPU the bytes
        that torch's allocator handed out."""
        return self.process + self.tensors + self.holes

    @property
    def holes(self) -> int:
        """Bytes lost to heap fragmentation."""
        return int(HOLES * self.tensors) if self.on_heap else 0


@dataclass(frozen=True)
class Estimate:
    """The result of a dry run; `str(estimate)` is what `lora plan` prints."""

    report: Report
    source: str
    splits: dict[str, int]  # rows
    epochs: int
    steps_per_epoch: int
    tokens: float  # mean per step, without padding
    padding: float  # share of the positions of all steps
    largest: Shape  # the largest batch
    evaluated: Shape
    dtype: str
    device: str
    flops: float  # of all matrix multiplications of the run
    rate: float  # FLOP/s of matrix multiplications on this device
    available: int  # bytes of memory that the machine or the GPU has
    memory: tuple[Memory, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        (rows, longest, *_), per_epoch = self.largest, self.steps_per_epoch
        sizes = ", ".join(f"{rows:,} {name}" for name, rows in self.splits.items())
        lines = [
            str(self.report),
            "",
            f"data    {self.source}: {sizes}",
            f"steps   {per_epoch:,} per epoch, {self.epochs * per_epoch:,} in total",
            f"tokens  {self.tokens:,.0f} per step; {self.padding:.1%} of all positions are padding;"
            f" the largest batch is {rows} × {longest}",
            f"time    at least {duration(self.seconds)}: {self.flops / 1e12:,.1f} TFLOP of matrix"
            f" multiplications at {self.rate / 1e12:,.2f} TFLOP/s, as timed now",
            "",
            *_table(self),
            "",
            *self.notes,
            self.verdict(),
        ]
        return "\n".join(lines)

    @property
    def seconds(self) -> float:
        """Seconds that the matrix multiplications of training and evaluation take on one device.
        The rest of a step adds to them, and so does generating answers."""
        return self.flops / self.rate

    def verdict(self) -> str:
        """Returns for each layout whether it fits, and what to set if it does not."""
        where = "the machine" if self.device == "cpu" else "the device"
        lines = []
        for memory in self.memory:
            need, what = memory.peak + memory.mapped, _layout(memory)
            if need <= self.available:
                lines.append(f"{what}: fits, {where} has {self.available / MIB:,.0f} MiB")
                continue
            lines.append(
                f"{what}: does not fit, {where} has {self.available / MIB:,.0f} MiB. Lower"
                " --micro-batch-size, --max-length or --r; set --activation-checkpointing, or"
                " --quantize nf4."
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Returns the JSON of --json: bytes, rows and tokens."""
        numbers = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("report", "memory")
        }
        plan = self.report.plan
        matched = [
            {"what": what, "layers": many, "shape": shape, "parameters": count}
            for what, many, shape, count in self.report.rows
        ]
        counts = {
            "method": plan.method.name,
            "targets": list(plan.targets),
            "matched": matched,
            "adapter_parameters": self.report.adapter_parameters,
            "trainable": self.report.trainable,
            "parameters": self.report.total,
        }
        return (
            counts
            | numbers
            | {
                "seconds": self.seconds,
                "steps": self.epochs * self.steps_per_epoch,
                "memory": [
                    {
                        **dataclasses.asdict(m),
                        "tensors": m.tensors,
                        "holes": m.holes,
                        "peak": m.peak,
                    }
                    for m in self.memory
                ],
            }
        )


def duration(seconds: float) -> str:
    """Returns a time in words: 12 s, 3 min, 1.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _layout(memory: Memory) -> str:
    if memory.devices == 1:
        return "one device"
    return f"{memory.devices} devices, {'base sharded' if memory.sharded else 'base on each'}"


def _table(estimate: Estimate) -> list[str]:
    """Returns the table of memory: a column for each layout, in MiB per device."""
    memories = estimate.memory
    longest = estimate.largest[1]
    labels = {
        "base": f"base, {estimate.dtype}",
        "trained": "trainable parameters",
        "gradients": "gradients",
        "optimiser": "AdamW's moments",
        "logits": "logits",
        "activations": "activations",
    }
    process = "  imports, tokenizer, data" if estimate.device == "cpu" else "  cuBLAS's workspaces"
    lines: list[tuple[str, list[int]]] = [
        (f"  {label}", [m.training.get(use, 0) for m in memories]) for use, label in labels.items()
    ]
    lines += [
        ("training step", [sum(m.training.values()) for m in memories]),
        ("evaluation, {} × {}".format(*estimate.evaluated[:2]),
         [sum(m.evaluation.values()) for m in memories]),
        ("loading the base", [m.loading for m in memories]),
        ("saving", [sum(m.saving.values()) for m in memories]),
        ("largest of these", [m.tensors for m in memories]),
        (process, [m.process for m in memories]),
        ("  heap fragmentation", [m.holes for m in memories]),
        ("peak per device", [m.peak for m in memories]),
        ("  base, memory-mapped", [m.mapped for m in memories]),
    ]  # fmt: skip
    always = ("peak per device", "training step")
    shown = [(name, sizes) for name, sizes in lines if any(sizes) or name in always]
    heads = [_layout(m) for m in memories]
    width = max(len("memory per device, MiB"), *(len(name) for name, _ in shown))
    spans = [max(len(head), 10) for head in heads]
    first = f"{'memory per device, MiB':<{width}}"
    table = ["  ".join([first, *(f"{h:>{s}}" for h, s in zip(heads, spans, strict=True))])]
    for name, sizes in shown:
        cells = [f"{size / MIB:>{s},.1f}" for size, s in zip(sizes, spans, strict=True)]
        table.append("  ".join([f"{name:<{width}}", *cells]))
    counts = ", ".join(f"{m.rows} × {longest}" for m in memories)
    return [*table, f"activations and logits of one micro-batch, rows × tokens: {counts}"]
