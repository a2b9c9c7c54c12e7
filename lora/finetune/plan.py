"""The dry run: what a run would match, train, take and need, from its configuration and its data.

No weight is read. The base is built from config.json under FakeTensorMode, whose tensors have a
shape, a dtype and a device, and no values, so that the adapters, the fused path, autocast and the
attention's kernels are those of the run. Two optimiser steps are taken with it at the largest
batch (the moments are made in the first), then the largest batch of the evaluation is computed,
and every storage is counted from its first operation until nothing refers to it. torch's own
allocator, measured in a real step, comes to the same bytes.

On a processor a process holds more than its tensors, and each part is had from where it comes from:

    process     imports, tokenizer and data: this process has them too, and is measured
    mapped      a base in float32 files is not copied but mapped: pages of the file, not anonymous
    saving      the adapter's file lies in memory twice while it is written
    holes       between the blocks of glibc's heap: HOLES of what lives at the peak
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lora import nf4
from lora.checkpoint import read_adapter
from lora.errors import ModelError
from lora.finetune.assemble import resized_for, resolve, with_tokens
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.tokens import Encoded, layout, sorted_batches
from lora.finetune.distributed import device as device_here
from lora.finetune.environment import PeakMemory, total_memory
from lora.finetune.evaluate import EVALUATED, TOKENS, autocast
from lora.finetune.inputs import inputs_of, read_corpus
from lora.finetune.losses import token_scores
from lora.finetune.memory import checkpoint_activations, hold
from lora.finetune.methods import method_named
from lora.finetune.metrics import score
from lora.finetune.models import Base, load_skeleton
from lora.finetune.quantized import packable, unfilled
from lora.finetune.train import Part, adamw, add_gradients, batch_plan, check_room, steps_per_epoch
from lora.injection import build, place, planned_of
from lora.inventory import with_views
from lora.method import Calibrated, Packs
from lora.report import Report
from lora.settings import whole_number
from lora.training import check_steps

HOLES = 0.7
"""Of glibc's heap, over what lives in it, as `lora train` came to with the demo's four methods:
0.59 to 0.85 (benchmarks/results/plan.json)."""
MIB = 2**20
WALKED = 100_000  # steps whose batches are looked at, and at least one epoch's


class Shape(NamedTuple):
    """Of a batch, or of a part of it."""

    rows: int
    longest: int  # tokens of the longest row
    targets: int  # classes, quantities, or tokens with a label
    shown: int = 0  # tokens of the longest answer that a decoder of its own is shown

    @property
    def positions(self) -> int:
        return self.rows * self.longest

    @property
    def size(self) -> int:
        """Positions, a decoder's own too: by it the largest is told."""
        return self.rows * (self.longest + self.shown)

    def part(self, rows: int) -> Shape:
        """So many of its rows."""
        return self._replace(rows=rows, targets=-(-self.targets * rows // self.rows))


def shape_of(encoded: Encoded, rows: Sequence[int]) -> Shape:
    """Of the batch that some examples are."""
    laid = layout(encoded, rows)
    longest = max(sum(encoded.lengths[row] for row in some) for some in laid)
    shown = max(encoded.counts[row] for row in rows) if encoded.shown is not None else 0
    return Shape(len(laid), longest, sum(encoded.counts[row] for row in rows), shown)


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of every storage that is made within it, by what it is for.

    A mode, since a tracker that hooks modules (torch's MemTracker) would turn the fused path off.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.use = "base"  # of what is made from here on
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.held: dict[Any, Tensor] = {}  # lora.kernels.scratch keeps what it makes here
        self.known: Any = WeakIdKeyDictionary()  # storage -> [use, bytes]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:  # which depends on values: of none it finds none
            return torch.empty((0, args[0].dim()), dtype=torch.long, device=args[0].device)
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.enter(leaf)
        return found

    def enter(self, tensor: Tensor, use: str | None = None) -> None:
        """Count a tensor's storage, under another use from now on where one is given."""
        storage = tensor.untyped_storage()
        entry: list[Any] | None = self.known.get(storage)
        if entry is None:
            size = storage.nbytes()
            entry = [use or self.use, size]
            self.known[storage] = entry
            weakref.finalize(storage, self._leave, entry)
            self.now[entry[0]] += size
            if self.now.total() > self.most.total():
                self.most = Counter(self.now)
        elif use is not None:
            self.now[entry[0]] -= entry[1]
            entry[0] = use
            self.now[use] += entry[1]

    def _leave(self, entry: list[Any]) -> None:
        self.now[entry[0]] -= entry[1]

    @contextmanager
    def phase(self, use: str) -> Iterator[Counter[str]]:
        """Yields what lived at the phase's peak, filled when it ends."""
        self.use, self.most, found = use, Counter(self.now), Counter[str]()
        yield found
        found.update({name: size for name, size in self.most.items() if size})


@dataclass(frozen=True)
class Memory:
    """Bytes of one device. The phases hold what lives at the peak of each, by what it is for."""

    devices: int
    sharded: bool
    rows: int  # computed at a time
    loading: int
    training: dict[str, int]
    evaluation: dict[str, int]
    saving: dict[str, int]
    process: int = 0
    mapped: int = 0  # of the base, in every phase: pages of its files
    on_heap: bool = False  # the CPU's

    @property
    def tensors(self) -> int:
        """The most that lives at once, in whichever phase."""
        phases = (self.training, self.evaluation, self.saving)
        return max(self.loading, *(sum(phase.values()) for phase in phases))

    @property
    def peak(self) -> int:
        """What is measured as peak_bytes: of a process its anonymous memory, of a GPU what its
        allocator has given out."""
        return self.process + self.tensors + self.holes

    @property
    def holes(self) -> int:
        """Of the heap, between the blocks."""
        return int(HOLES * self.tensors) if self.on_heap else 0


@dataclass(frozen=True)
class Estimate:
    """What a dry run found; `str(estimate)` is its tables."""

    report: Report
    source: str
    splits: dict[str, int]  # rows
    epochs: int
    steps_per_epoch: int
    tokens: float  # of a step, without padding, mean
    padding: float  # share of the positions of all steps
    largest: Shape  # the largest batch
    evaluated: Shape
    dtype: str
    device: str
    there: int  # bytes that the machine or the device has
    memory: tuple[Memory, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        (rows, longest, *_), per_epoch = self.largest, self.steps_per_epoch
        sizes = ", ".join(f"{rows:,} {name}" for name, rows in self.splits.items())
        lines = [
            str(self.report),
            "",
            f"data    {self.source}: {sizes}",
            f"steps   {per_epoch:,} an epoch, {self.epochs * per_epoch:,} in all",
            f"tokens  {self.tokens:,.0f} a step, and {self.padding:.1%} of all positions padding;"
            f" the largest batch is {rows} × {longest}",
            "",
            *_table(self),
            "",
            *self.notes,
            self.verdict(),
        ]
        return "\n".join(lines)

    def verdict(self) -> str:
        """Whether it fits, and what to set where it does not."""
        where = "the machine" if self.device == "cpu" else "the device"
        lines = []
        for memory in self.memory:
            need, what = memory.peak + memory.mapped, _layout(memory)
            if need <= self.there:
                lines.append(f"{what}: fits, {where} has {self.there / MIB:,.0f} MiB")
                continue
            lines.append(
                f"{what}: does not fit, {where} has {self.there / MIB:,.0f} MiB. Lower"
                " --micro-batch-size, --max-length or --r; set --activation-checkpointing, or"
                " --quantize nf4."
            )
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For --json: bytes, rows and tokens."""
        own = {
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
            | own
            | {
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


def _layout(memory: Memory) -> str:
    if memory.devices == 1:
        return "one device"
    return f"{memory.devices} devices, {'base sharded' if memory.sharded else 'base on each'}"


def _table(estimate: Estimate) -> list[str]:
    """Memory: a column for each layout, MiB of one device."""
    memories = estimate.memory
    longest = estimate.largest[1]
    names = {
        "base": f"base, {estimate.dtype}",
        "trained": "what trains",
        "gradients": "gradients",
        "optimiser": "moments of AdamW",
        "logits": "logits",
        "activations": "activations",
    }
    lines: list[tuple[str, list[int]]] = [
        (f"  {said}", [m.training.get(name, 0) for m in memories]) for name, said in names.items()
    ]
    lines += [
        ("training step", [sum(m.training.values()) for m in memories]),
        ("evaluation, {} × {}".format(*estimate.evaluated[:2]),
         [sum(m.evaluation.values()) for m in memories]),
        ("loading the base", [m.loading for m in memories]),
        ("saving", [sum(m.saving.values()) for m in memories]),
        ("the largest of these", [m.tensors for m in memories]),
        ("  imports, tokenizer, data", [m.process for m in memories]),
        ("  holes of the heap", [m.holes for m in memories]),
        ("peak of a device", [m.peak for m in memories]),
        ("  base mapped from its files", [m.mapped for m in memories]),
    ]  # fmt: skip
    always = ("peak of a device", "training step")
    shown = [(name, sizes) for name, sizes in lines if any(sizes) or name in always]
    heads = [_layout(m) for m in memories]
    width = max(len("memory of a device, MiB"), *(len(name) for name, _ in shown))
    spans = [max(len(head), 10) for head in heads]
    first = f"{'memory of a device, MiB':<{width}}"
    found = ["  ".join([first, *(f"{h:>{s}}" for h, s in zip(heads, spans, strict=True))])]
    for name, sizes in shown:
        cells = [f"{size / MIB:>{s},.1f}" for size, s in zip(sizes, spans, strict=True)]
        found.append("  ".join([f"{name:<{width}}", *cells]))
    counts = ", ".join(f"{m.rows} × {longest}" for m in memories)
    return [*found, f"activations and logits are of rows × tokens at a time: {counts}"]


def plan(config: RunConfig[Any], devices: int = 1) -> Estimate:
    """The dry run of a configuration: on one device and, of several, on each of them.

    Of several devices each takes its share of a batch's rows, and has the whole base, or where it
    is sharded its share of what is frozen and the largest block whole. Raises what `lora train`
    would raise before its first step, and ModelError where the model cannot be followed without
    values.
    """
    whole_number("nproc", devices, most=1024)
    anonymous, device = PeakMemory(), device_here()
    before = anonymous.now()
    corpus = read_corpus(config)
    asked = len(corpus.labels) or 1, corpus.task, config.quantize, config.dense
    bare = load_skeleton(config.base, *asked)
    bare = with_tokens(bare, config, corpus.task, resized_for(config))
    config, said = resolve(config, corpus, bare, device)
    inputs = inputs_of(config, corpus, bare)
    corpus = inputs.corpus
    splits = inputs.splits
    score("text" if corpus.task == "text" else "classification", ["0", "1"], [["0"], ["1"]])
    process = anonymous.now() - before if device.type == "cpu" else 0

    train = splits["train"]
    per_epoch = steps_per_epoch(train, config.batch_size)
    walked = min(config.epochs, -(-WALKED // per_epoch))
    plan_of_batches = batch_plan(train, config.batch_size, walked, config.seed)
    each = [shape_of(train, rows) for _, rows in plan_of_batches]
    largest = max(each, key=lambda shape: shape.size)
    typical = sorted(each, key=lambda shape: shape.size)[len(each) // 2]
    apart = [dataclasses.replace(split, row=None) for n, split in splits.items() if n != "train"]
    evaluated = max(
        (shape_of(s, rows) for s in apart for rows in sorted_batches(s.lengths, EVALUATED, TOKENS)),
        key=lambda shape: shape.size,
    )
    positions, total = sum(shape.positions for shape in each), walked * sum(train.lengths)
    seen = "" if walked == config.epochs else f"the batches are those of the first {walked} epochs."
    report, memory = None, []
    for count in dict.fromkeys((1, devices)):
        piece = min(config.micro_batch_size or largest.rows, -(-largest.rows // count))
        pieces = -(-largest.rows // (count * piece))
        shapes = [typical.part(min(piece, typical.rows)), largest.part(piece)]
        found = _Step(config, corpus, splits["train"], device)
        report, whole = found.measure(shapes, pieces, evaluated)
        whole = dataclasses.replace(whole, devices=count, process=process)
        memory.append(whole)
        if count > 1:
            memory.append(found.shard(whole))
    assert report is not None
    return Estimate(
        report=report,
        source=" ".join(config.data),
        splits={name: len(split.lengths) for name, split in splits.items()},
        epochs=config.epochs,
        steps_per_epoch=per_epoch,
        tokens=total / len(each),
        padding=1 - total / positions,
        largest=largest,
        evaluated=evaluated,
        dtype="nf4" if config.quantize == "nf4" else config.dtype,
        device=device.type,
        there=total_memory(device),
        memory=tuple(memory),
        notes=(
            *(f"data: {line}" for line in corpus.said),
            *(f"note: {line}" for line in (corpus.note, *inputs.said, said, seen) if line),
        ),
    )


class _Step:
    """The run's model, without values, and what lives while it is trained and evaluated."""

    def __init__(
        self,
        config: RunConfig[Any],
        corpus: Corpus,
        encoded: Encoded,
        device: torch.device,
    ) -> None:
        self.config, self.corpus, self.encoded, self.device = config, corpus, encoded, device
        self.ledger = Ledger()
        self.block = 0  # frozen bytes of the largest block

    def measure(
        self, shapes: Sequence[Shape], pieces: int, evaluated: Shape
    ) -> tuple[Report, Memory]:
        """One optimiser step of each shape, the last of them in so many pieces; an evaluation."""
        # Not above: what it imports is none of a run's, and would hide in what is measured of it.
        from torch._subclasses.fake_tensor import FakeTensorMode

        nf4.pairs(self.device)  # cached for the process: with values, and not as the mode's
        nf4.dynamic_map(self.device)
        ledger = self.ledger
        base, report = self._placed()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), ledger:
                self._moved(base.model)
                texts = self.corpus.task == "text"
                head = base.model.get_output_embeddings() if texts else base.model
                head.register_forward_hook(self._seen)
                held = Counter(ledger.now)
                optimizer = adamw(base.model, 1.0, 0.0)
                with ledger.phase("activations") as training:
                    for shape in shapes[:-1]:
                        self._step(base.model, optimizer, shape, 1)
                    self._step(base.model, optimizer, shapes[-1], pieces)
                with ledger.phase("activations") as evaluation:
                    self._evaluate(base.model, evaluated)
                after = Counter({name: size for name, size in ledger.now.items() if size})
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"--base {self.config.base} cannot be followed without its values: {reason}. Run"
                " lora train --epochs 1 --limit 100, and read peak_bytes in its summary.json."
            ) from error
        trained = [p for p in base.model.parameters() if p.requires_grad]
        file = [p.numel() * p.element_size() for p in trained]
        saving = Counter({**after, "file": 2 * sum(file)})
        mapped = self._mapped(base)
        for phase in (training, evaluation, saving):
            phase["base"] -= mapped
        memory = Memory(
            devices=1,
            sharded=False,
            rows=shapes[-1].rows,
            loading=self._loading(base, report, held) if self.device.type == "cpu" else 0,
            training=dict(training),
            evaluation=dict(evaluation),
            saving=dict(saving) if self.device.type == "cpu" else {},
            mapped=mapped,
            on_heap=self.device.type == "cpu",
        )
        return report, memory

    def _placed(self) -> tuple[Base, Report]:
        """The base with the adapters on it, placed as inject() does, and filled with nothing."""
        config = self.config
        method, shown, packs = method_named(config.method), False, False
        if issubclass(method, Calibrated):
            shown = method.needs_batches(config.settings)
        if issubclass(method, Packs) and config.quantize == "nf4":
            packs = method.takes_up(config.settings)
        asked = len(self.corpus.labels) or 1, self.corpus.task
        quantize = "none" if packs else config.quantize
        base = load_skeleton(config.base, *asked, quantize, config.dense)
        base = with_tokens(base, config, self.corpus.task, resized_for(config))
        model = base.model
        names = packable(model, config.dense) if packs else ()
        if config.adapter is not None:
            filed = read_adapter(model, config.adapter, trainable=True)
            planned, parts = filed.plan, filed.parts
        else:
            planned = planned_of(model, config.settings, "default", shown, packs)
            parts = build(model, planned)
        fresh: Any = unfilled(model, names, "meta")
        for adapter, view in with_views(model, parts.adapters).values():
            if id(view.module) in fresh and isinstance(adapter, Packs):
                packed = fresh[id(view.module)].quantized()
                with torch.no_grad():
                    adapter.pack(view.read()[0], lambda W, q=packed: q)  # type: ignore[misc]
        report = place(model, planned, parts, fresh, "default")
        check_steps(model, config.epochs * steps_per_epoch(self.encoded, config.batch_size))
        hold(model, config.dtype)
        return base, report

    def _moved(self, model: Any) -> None:
        """Give the model the device's tensors for those of the meta device, ties kept.

        Not before: a copy of a tensor of FakeTensorMode's would be one of the mode as well.
        """
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        new = torch.empty_strided(
                            old.shape, old.stride(), dtype=old.dtype, device=self.device
                        )
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = old, new
                    held[name] = made[id(old)][1]
        check_room(model)
        if self.config.activation_checkpointing:
            checkpoint_activations(model)
        for parameter in model.parameters():
            trains = parameter.requires_grad
            self.ledger.enter(parameter, "trained" if trains else "base")
            if trains:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: None if p.grad is None else self.ledger.enter(p.grad, "gradients")
                )
        blocks = [b for m in model.modules() if isinstance(m, nn.ModuleList) for b in m]
        self.block = max(map(_frozen, blocks), default=_frozen(model))

    def _seen(self, head: nn.Module, given: Any, found: Any) -> None:
        """Logits as such, of a head or of a whole classifier."""
        self.ledger.enter(getattr(found, "logits", found), "logits")

    def _batch(self, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and targets of a shape, of no meaning."""
        names, task = list(self.encoded.fields), self.corpus.task
        ones = torch.ones(shape.rows, shape.longest, dtype=torch.long, device=self.device)
        batch = {name: ones.clone() for name in names}
        if self.encoded.row is not None:
            batch["position_ids"] = ones.clone()
        if self.encoded.shown is not None:
            batch["decoder_input_ids"] = ones[:, :1].repeat(1, shape.shown)
        size = (2, shape.targets) if task == "text" else (shape.rows,)
        dtype = torch.float32 if task == "regression" else torch.long
        return batch, torch.zeros(size, dtype=dtype, device=self.device)

    def _step(
        self, model: Any, optimizer: torch.optim.Optimizer, shape: Shape, pieces: int
    ) -> None:
        """What train.fit() does of one, in its order."""
        ledger, task = self.ledger, self.corpus.task
        model.train()
        for _ in range(pieces if pieces == 1 else 2):  # the third finds what the second found
            ledger.use = "activations"
            batch, targets = self._batch(shape)
            add_gradients(model, Part(batch, targets), task, shape.targets, penalized=True)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        ledger.use = "optimiser"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, model: Any, shape: Shape) -> None:
        """What evaluate.predict() does of a batch."""
        model.eval()
        batch, targets = self._batch(shape)
        with torch.inference_mode(), autocast(model):
            if self.corpus.task == "text":
                token_scores(model, batch, targets)
            else:
                model(**batch).logits.float()

    def _mapped(self, base: Base) -> int:
        """Bytes of the base that stay in its files: float32 there, float32 here, and frozen."""
        if self.device.type != "cpu" or base.stored != torch.float32 or _packs(base.model):
            return 0
        return sum(
            p.numel() * p.element_size()
            for p in base.model.parameters()
            if not p.requires_grad and p.dtype == torch.float32
        )

    def _loading(self, base: Base, report: Report, held: Mapping[str, int]) -> int:
        """The most that lives until training begins."""
        packs, inside = _packs(base.model), sum(held.values())
        if packs and self.config.base != "demo":  # packed one by one, as they are read
            return inside
        if base.stored == torch.float32:
            return inside - self._mapped(base)
        # All in float32, and then beside it what is packed, or the adapters.
        return 4 * report.total + (inside - _frozen(base.model) if not packs else inside)

    def shard(self, memory: Memory) -> Memory:
        """The same where each device has its share of the frozen base, and one block whole."""
        whole = memory.mapped + memory.training.get("base", 0)
        share = -(-whole // memory.devices) + self.block

        def own(phase: dict[str, int]) -> dict[str, int]:
            return {**phase, "base": min(whole, share)} if phase else {}

        return dataclasses.replace(
            memory,
            sharded=True,
            loading=min(memory.loading, share),
            training=own(memory.training),
            evaluation=own(memory.evaluation),
            saving=own(memory.saving),
            mapped=0,
        )


def _frozen(module: nn.Module) -> int:
    """Bytes of what does not train."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def _packs(model: nn.Module) -> bool:
    return any(isinstance(module, nf4.NF4Linear) for module in model.modules())
