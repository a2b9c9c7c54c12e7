"""The dry run: computes a run's parameters, steps and memory from its configuration and its data.

No weights are read. The base is built from config.json under FakeTensorMode: its tensors have a
shape, a dtype and a device, but no values, so the adapters, the fused kernels, autocast and the
attention kernels are those of the run. The run's own functions take two optimizer steps with it at
the largest batch (the first one makes AdamW's moments), then compute the largest batch of the
evaluation. A Ledger counts every tensor storage from the operation that makes it until it is freed.
torch's allocator, measured in a real step, reports the same bytes.

On a CPU a process needs more memory than its tensors:

    process     imports, tokenizer and data: measured, since this process has them too
    mapped      a base in float32 files is memory-mapped, so it is no private memory
    saving      the adapter's file is in memory twice while it is written
    holes       fragmentation of glibc's heap: HOLES times the tensors at the peak
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora import nf4
from lora.checkpoint import read_adapter
from lora.errors import ModelError
from lora.finetune.assemble import resized_for, resolve, starts_on_device, with_tokens
from lora.finetune.config import RunConfig
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.tokens import Encoded, layout, sorted_batches
from lora.finetune.distributed import device as device_here
from lora.finetune.environment import product_rate, total_memory
from lora.finetune.estimate import Estimate, Memory, Shape
from lora.finetune.evaluate import EVALUATED, TOKENS, autocast
from lora.finetune.forgetting import read_unrelated
from lora.finetune.inputs import inputs_of, read_corpus
from lora.finetune.ledger import Ledger
from lora.finetune.losses import token_scores
from lora.finetune.memory import auto_dtype_note, checkpoint_activations, set_dtype
from lora.finetune.methods import method_named
from lora.finetune.metrics import score
from lora.finetune.models import Base, load_skeleton
from lora.finetune.peak import private_bytes
from lora.finetune.quantized import packable, unfilled
from lora.finetune.train import Part, adamw, add_gradients, batch_plan, check_room, steps_per_epoch
from lora.injection import build, place, planned_of
from lora.inventory import with_views
from lora.method import Calibrated, Packs
from lora.report import Report
from lora.settings import whole_number
from lora.training import check_steps

WORKSPACES = 2**26
"""Bytes that cuBLAS takes for itself on a GPU; torch's allocator hands them out."""
WALKED = 100_000
"""Number of steps whose batches are laid out, rounded up to whole epochs."""


def shape_of(encoded: Encoded, rows: Sequence[int]) -> Shape:
    """Returns the size of the batch that these examples make."""
    laid_out = layout(encoded, rows)
    longest = max(sum(encoded.lengths[row] for row in together) for together in laid_out)
    decoder_tokens = max(encoded.counts[row] for row in rows) if encoded.shown is not None else 0
    targets = sum(encoded.counts[row] for row in rows)
    return Shape(len(laid_out), longest, targets, decoder_tokens)


def plan(config: RunConfig[Any], devices: int = 1) -> Estimate:
    """Returns the estimate for one device and, if there are several, for that number too.

    Each of several devices computes its share of a batch's rows. It holds the whole base or, if
    sharded, its share of the frozen weights and one whole block, the largest. Raises what
    `lora train` raises before its first step, and ModelError if the model cannot run without
    values.
    """
    whole_number("nproc", devices, most=1024)
    device, before = device_here(config.device), private_bytes()
    dtype_note = [auto_dtype_note(device)] if config.dtype == "auto" else []
    config, corpus, bare, note = _opened(config, device)
    inputs = inputs_of(config, corpus, bare)
    read_unrelated(config, bare)
    corpus, splits = inputs.corpus, inputs.splits
    # A run imports its metrics too, which takes memory.
    score("text" if corpus.task == "text" else "classification", ["0", "1"], [["0"], ["1"]])
    process = private_bytes() - before if device.type == "cpu" else WORKSPACES

    batches = _batches_to_plan(config, splits)
    report, memories, work = _memories(config, corpus, splits["train"], batches, devices)
    return Estimate(
        report=report,
        source=" ".join(config.data),
        splits={name: len(split.lengths) for name, split in splits.items()},
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch(splits["train"], config.batch_size),
        tokens=batches.tokens,
        padding=batches.padding,
        largest=batches.largest,
        evaluated=batches.evaluated,
        dtype="nf4" if config.quantize == "nf4" else config.dtype,
        device=device.type,
        flops=_flops(config, splits, batches, work),
        rate=product_rate(device, getattr(torch, config.dtype)),
        available=total_memory(device),
        memory=tuple(dataclasses.replace(memory, process=process) for memory in memories),
        notes=(
            *(f"data: {line}" for line in corpus.summary),
            *dtype_note,
            *([bare.note] if bare.note else []),
            *(f"note: {n}" for n in (*corpus.notes, *inputs.notes, note, batches.note) if n),
        ),
    )


def report_for(config: RunConfig[Any]) -> Report:
    """Returns the report of the injection that a run begins with. No weights are read."""
    config, corpus, _, _ = _opened(config, device_here(config.device))
    return _injected(config, corpus)[1]


def _opened(
    config: RunConfig[Any], device: torch.device
) -> tuple[RunConfig[Any], Corpus, Base, str]:
    """Returns the configuration without open settings, the data, the base without values, and a
    note for the user."""
    corpus = read_corpus(config)
    labels = len(corpus.labels) or 1
    bare = load_skeleton(config.base, labels, corpus.task, config.quantize, config.dense)
    bare = with_tokens(bare, config, corpus.task, resized_for(config))
    config, note = resolve(config, corpus, bare, device)
    return config, corpus, bare, note


class _Batches(NamedTuple):
    """The batches of a run."""

    largest: Shape
    typical: Shape
    evaluated: Shape  # the largest of an evaluation
    tokens: float  # mean per step, without padding
    padding: float
    note: str  # "" if the batches of every epoch were laid out


def _batches_to_plan(config: RunConfig[Any], splits: Mapping[str, Encoded]) -> _Batches:
    train = splits["train"]
    epochs = min(config.epochs, -(-WALKED // steps_per_epoch(train, config.batch_size)))
    steps = batch_plan(train, config.batch_size, epochs, config.seed)
    shapes = [shape_of(train, rows) for _, rows in steps]
    by_size = sorted(shapes, key=lambda shape: shape.size)
    unpacked = [dataclasses.replace(split, row=None) for n, split in splits.items() if n != "train"]
    evaluated = [
        shape_of(split, rows)
        for split in unpacked
        for rows in sorted_batches(split.lengths, EVALUATED, TOKENS)
    ]
    tokens = epochs * sum(train.lengths)
    return _Batches(
        largest=max(shapes, key=lambda shape: shape.size),
        typical=by_size[len(shapes) // 2],
        evaluated=max(evaluated, key=lambda shape: shape.size),
        tokens=tokens / len(shapes),
        padding=1 - tokens / sum(shape.positions for shape in shapes),
        note=""
        if epochs == config.epochs
        else f"only the batches of the first {epochs} epochs were counted.",
    )


class _Work(NamedTuple):
    """Floating-point operations of products for one position of a batch."""

    training: float
    evaluation: float


def _flops(
    config: RunConfig[Any], splits: Mapping[str, Encoded], batches: _Batches, work: _Work
) -> float:
    """Returns the operations of the run: of its steps, with padding, and of its evaluations."""
    steps = config.epochs * steps_per_epoch(splits["train"], config.batch_size)
    evaluations = -(-steps // config.eval_steps) if config.eval_steps else config.epochs
    evaluated = evaluations * sum(splits["dev"].lengths)
    evaluated += sum(splits["test"].lengths) if "test" in splits else 0
    positions = steps * batches.tokens / (1 - batches.padding)
    return work.training * positions + work.evaluation * evaluated


def _memories(
    config: RunConfig[Any], corpus: Corpus, train: Encoded, batches: _Batches, devices: int
) -> tuple[Report, list[Memory], _Work]:
    """Returns the memory of one device, and of each of several: with the whole base, and with the
    base sharded; and the work."""
    memories, work = [], []
    for count in dict.fromkeys((1, devices)):
        rows = batches.largest.rows
        part = min(config.micro_batch_size or rows, -(-rows // count))
        parts = -(-rows // (count * part))
        shapes = [batches.typical.part(min(part, batches.typical.rows)), batches.largest.part(part)]
        dry_run = _DryRun(config, corpus, train, device_here(config.device))
        report, whole = dry_run.measure(shapes, parts, batches.evaluated)
        work.append(dry_run.work)
        whole = dataclasses.replace(whole, devices=count)
        memories.append(whole)
        if count > 1:
            memories.append(dry_run.sharded(whole))
    return report, memories, work[0]


def _injected(config: RunConfig[Any], corpus: Corpus) -> tuple[Base, Report]:
    """Returns the base with adapters injected as inject() does, but without values."""
    method, shown, packs = method_named(config.method), False, False
    if issubclass(method, Calibrated):
        shown = method.needs_batches(config.settings)
    if issubclass(method, Packs) and config.quantize == "nf4":
        packs = method.takes_up(config.settings)
    labels = len(corpus.labels) or 1
    quantize = "none" if packs else config.quantize
    base = load_skeleton(config.base, labels, corpus.task, quantize, config.dense)
    base = with_tokens(base, config, corpus.task, resized_for(config))
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
    return base, report


class _DryRun:
    """The run's model without values, and the memory while it is trained and evaluated."""

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
        self.work = _Work(0, 0)

    def measure(
        self, shapes: Sequence[Shape], parts: int, evaluated: Shape
    ) -> tuple[Report, Memory]:
        """Takes one optimizer step with each shape, the last one in `parts` micro-batches, and one
        evaluation. Returns the report and the memory."""
        # Imported here, since a run does not import it: it must not count as the run's memory.
        from torch._subclasses.fake_tensor import FakeTensorMode

        nf4.pairs(self.device)  # cached for the process, so they need values: outside the mode
        nf4.dynamic_map(self.device)
        ledger = self.ledger
        base, report = self._ready_to_train()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), ledger:
                self._to_device(base.model)
                texts = self.corpus.task == "text"
                head = base.model.get_output_embeddings() if texts else base.model
                head.register_forward_hook(self._count_logits)
                at_start = Counter(ledger.now)
                optimizer = adamw(base.model, 1.0, 0.0)
                with ledger.phase("activations") as training:
                    for shape in shapes[:-1]:
                        self._step(base.model, optimizer, shape, 1)
                    stepped = ledger.flops
                    self._step(base.model, optimizer, shapes[-1], parts)
                with ledger.phase("activations") as evaluation:
                    before = ledger.flops
                    self._evaluate(base.model, evaluated)
                self.work = _Work(
                    stepped / sum(shape.size for shape in shapes[:-1]),
                    (ledger.flops - before) / evaluated.size,
                )
                after = Counter({name: size for name, size in ledger.now.items() if size})
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise ModelError(
                f"--base {self.config.base} cannot run without its values: {reason}. Run"
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
            loading=self._loading(base, report, at_start),
            training=dict(training),
            evaluation=dict(evaluation),
            saving=dict(saving) if self.device.type == "cpu" else {},
            mapped=mapped,
            on_heap=self.device.type == "cpu",
        )
        return report, memory

    def _ready_to_train(self) -> tuple[Base, Report]:
        config = self.config
        base, report = _injected(config, self.corpus)
        check_steps(base.model, config.epochs * steps_per_epoch(self.encoded, config.batch_size))
        set_dtype(base.model, config.dtype, self.device)
        return base, report

    def _to_device(self, model: Any) -> None:
        """Replace the model's tensors on the meta device by tensors of the device; keeps ties.

        Called after the injection, which copies tensors: a copy of a fake tensor would belong to
        FakeTensorMode too.
        """
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        new = torch.empty_strided(
                            old.shape, old.stride(), dtype=old.dtype, device=self.device
                        )
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = old, new
                    tensors[name] = made[id(old)][1]
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

    def _count_logits(self, head: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of a head or a whole classifier that counts its output as logits."""
        self.ledger.enter(getattr(output, "logits", output), "logits")

    def _batch(self, shape: Shape) -> tuple[dict[str, Tensor], Tensor]:
        """Returns inputs and targets of a shape, with arbitrary values."""
        names, task = list(self.encoded.fields), self.corpus.task
        ones = torch.ones(shape.rows, shape.longest, dtype=torch.long, device=self.device)
        batch = {name: ones.clone() for name in names}
        if self.encoded.row is not None:
            batch["position_ids"] = ones.clone()
        if self.encoded.shown is not None:
            batch["decoder_input_ids"] = ones[:, :1].repeat(1, shape.decoder_tokens)
        size = (2, shape.targets) if task == "text" else (shape.rows,)
        dtype = torch.float32 if task == "regression" else torch.long
        return batch, torch.zeros(size, dtype=dtype, device=self.device)

    def _step(self, model: Any, optimizer: torch.optim.Optimizer, shape: Shape, parts: int) -> None:
        """Does what a step of train.fit() does, in the same order."""
        ledger, task = self.ledger, self.corpus.task
        model.train()
        for _ in range(min(parts, 2)):  # a third micro-batch needs what the second one needed
            ledger.use = "activations"
            batch, targets = self._batch(shape)
            add_gradients(model, Part(batch, targets), task, shape.targets, penalized=True)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        ledger.use = "optimiser"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _evaluate(self, model: Any, shape: Shape) -> None:
        """Does what evaluate.predict() does with a batch."""
        model.eval()
        batch, targets = self._batch(shape)
        with torch.inference_mode(), autocast(model):
            if self.corpus.task == "text":
                token_scores(model, batch, targets)
            else:
                model(**batch).logits.float()

    def _mapped(self, base: Base) -> int:
        """Returns the bytes of the base that are memory-mapped: frozen weights that are float32
        both in the files and in the run. Those of a GGUF file are copies."""
        copied = base.stored != torch.float32 or bool(base.gguf) or _quantized(base.model)
        if copied or self.device.type != "cpu":
            return 0
        return sum(
            p.numel() * p.element_size()
            for p in base.model.parameters()
            if not p.requires_grad and p.dtype == torch.float32
        )

    def _loading(self, base: Base, report: Report, at_start: Mapping[str, int]) -> int:
        """Returns the peak before training begins."""
        quantized, loaded = _quantized(base.model), sum(at_start.values())
        if self.device.type != "cpu":  # it is loaded and cast before it goes to the device
            return 4 * report.total if starts_on_device(self.config) else loaded
        if quantized and self.config.base != "demo" and not base.gguf:
            return loaded  # each layer is quantized when it is read
        if base.stored == torch.float32 and not base.gguf:
            return loaded - self._mapped(base)
        # The whole base in float32, and beside it the quantized weights or the adapters.
        return 4 * report.total + (loaded if quantized else loaded - _frozen(base.model))

    def sharded(self, memory: Memory) -> Memory:
        """Returns the memory if each device holds its share of the frozen base and one whole
        block."""
        whole = memory.mapped + memory.training.get("base", 0)
        share = -(-whole // memory.devices) + self.block

        def with_share(phase: dict[str, int]) -> dict[str, int]:
            return {**phase, "base": min(whole, share)} if phase else {}

        return dataclasses.replace(
            memory,
            sharded=True,
            loading=min(memory.loading, share),
            training=with_share(memory.training),
            evaluation=with_share(memory.evaluation),
            saving=with_share(memory.saving),
            mapped=0,
        )


def _frozen(module: nn.Module) -> int:
    """Returns the bytes of the frozen parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if not p.requires_grad)


def _quantized(model: nn.Module) -> bool:
    return any(isinstance(module, nf4.NF4Linear) for module in model.modules())
