"""The loop against the same loop written out by hand, and what it must not do."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import distilbert
from torch import Tensor, nn

import lora
from lora.errors import ConfigError, TrainingError
from lora.finetune.data.tokens import Encoded, batches, collate, layout
from lora.finetune.evaluate import predict
from lora.finetune.generate import random_kept
from lora.finetune.memory import set_dtype
from lora.finetune.record import Step
from lora.finetune.train import Hyperparameters, batch_plan, begin, check_room, fit, slope

CPU = torch.device("cpu")


def encoded(rows: int = 37) -> Encoded:
    """Rows of 3 to 19 tokens, with labels of no meaning."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 20, (rows,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    ids = torch.randint(1, 99, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Encoded(fields, offsets, torch.randint(0, 2, (rows,), generator=generator), pad=0)


def adapted() -> nn.Module:
    """Dropout in the base and in the adapters: what it draws must be the same too."""
    model = distilbert(dropout=0.1)
    heads = ("pre_classifier", "classifier")
    lora.inject(model, lora.LoRAConfig(r=2, lora_dropout=0.2, modules_to_save=heads))
    return model


def by_hand(
    model: nn.Module, data: Encoded, epochs: int, size: int, peak: float, decay: float,
    warmup: float, clip: float, seed: int,
) -> list[float]:  # fmt: skip
    """AdamW (Loshchilov and Hutter 2017, algorithm 2), its rate, decay and clipping, spelt out."""
    torch.manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    first, second = ([torch.zeros_like(p) for p in trained] for _ in range(2))
    plan = [rows for epoch in range(epochs) for rows in batches(data.lengths, size, seed, epoch)]
    rise = math.ceil(warmup * len(plan))
    losses = []
    for t, rows in enumerate(plan, 1):
        model.train()
        logits = model(**collate(data, layout(data, rows), CPU)[0]).logits
        picked = logits.log_softmax(-1)[torch.arange(len(rows)), data.targets[rows]]
        loss = -picked.sum() / len(rows)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, trained)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        shrink = min(1.0, clip / (norm + 1e-6))
        rate = peak * (t / rise if t <= rise else (len(plan) - t + 1) / (len(plan) - rise))
        with torch.no_grad():
            for p, g, m, v in zip(trained, gradients, first, second, strict=True):
                m.mul_(0.9).add_(shrink * g, alpha=0.1)
                v.mul_(0.999).addcmul_(shrink * g, shrink * g, value=0.001)
                p.mul_(1 - rate * (decay if p.dim() > 1 else 0.0))
                step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
                p.sub_(rate * step)
    return losses


SETTINGS = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2}


def steps_of(
    model: nn.Module, data: Encoded, epochs: int, batch_size: int, learning_rate: float,
    weight_decay: float = 0.0, seed: int = 0, **more: Any,
) -> Iterator[Step]:  # fmt: skip
    training = begin(model, learning_rate, weight_decay, seed)
    settings = Hyperparameters(epochs, batch_size, seed=seed, **more)
    return fit(training, data, "classification", settings)


def test_the_loop_is_adamw_with_warm_up_decay_and_clipping() -> None:
    data, ours, theirs = encoded(), adapted(), adapted()
    steps = list(
        steps_of(ours, data, **SETTINGS, weight_decay=0.3, warmup=0.2,
            max_grad_norm=0.1, seed=4)
    )  # fmt: skip
    wanted = by_hand(theirs, data, 3, 8, 1e-2, 0.3, 0.2, 0.1, 4)
    assert [step.loss for step in steps] == pytest.approx(wanted, abs=1e-5)
    for (name, mine), his in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, his, atol=1e-5), name
    assert all(step.gradient_norm > 0.1 for step in steps)  # so that clipping acts at every step


@pytest.mark.parametrize(
    "other", [{"weight_decay": 0.0}, {"warmup": 0.9}, {"max_grad_norm": 1e9}, {"seed": 5}]
)
def test_every_setting_acts(other: dict[str, float]) -> None:
    settings = SETTINGS | {"weight_decay": 0.3, "warmup": 0.2, "max_grad_norm": 0.1, "seed": 4}
    ends = []
    for chosen in (settings, settings | other):
        model = adapted()
        list(steps_of(model, encoded(), **chosen))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)


@pytest.mark.parametrize("method", [lora.LoRAConfig(r=2), lora.AdaLoRAConfig(init_r=3, target_r=2)])
def test_parts_of_a_batch_add_up_to_it(method: lora.settings.AdapterConfig) -> None:
    """The mean over 8 rows is not the mean of the means over 3, 3 and 2; a penalty counts once."""
    losses, norms = [], []
    for micro in (None, 3):
        model = distilbert(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
        lora.inject(model, method)
        steps = list(steps_of(model, encoded(), 3, 8, 1e-2, micro_batch_size=micro))
        losses.append([step.loss for step in steps])
        norms.append([step.gradient_norm for step in steps])
        assert sum(step.examples for step in steps) == 3 * 37
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [(), (0.3, 4.0)])
def test_weights_and_smoothing_are_torchs_on_the_whole_batch(
    weights: tuple[float, ...], smoothing: float
) -> None:
    """In parts of 3, the losses and the trained weights are those of torch's cross_entropy on each
    batch of 8, whose mean is over the weights of the rows."""
    still = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    data, ours, reference = encoded(), distilbert(**still), distilbert(**still)
    for model in (ours, reference):
        lora.inject(model, lora.LoRAConfig(r=2, modules_to_save=("classifier",)))
    more = {"micro_batch_size": 3, "class_weights": weights, "label_smoothing": smoothing}
    steps = list(steps_of(ours, data, 3, 8, 1e-2, schedule="constant", warmup=0.0, **more))
    trained = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    reference.train()
    wanted = []
    for _, rows in batch_plan(data, 8, 3, 0):
        batch, targets = collate(data, layout(data, rows), CPU)
        weight = torch.tensor(weights) if weights else None
        logits = reference(**batch).logits
        loss = F.cross_entropy(logits, targets, weight=weight, label_smoothing=smoothing)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    assert [step.loss for step in steps] == pytest.approx(wanted, rel=1e-4)
    assert {step.targets for step in steps} == {8, 5}
    for (name, mine), other in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-4), name


def test_the_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    assert [slope(i, 5, 0.4) for i in range(5)] == pytest.approx([1 / 2, 1, 1, 2 / 3, 1 / 3])
    assert [slope(i, 4, 0.0) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [slope(i, 2, 1.0) for i in range(2)] == [0.5, 1]
    assert slope(0, 1, 0.06) == 1
    half = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert [slope(i, 5, 0.2, "cosine") for i in range(5)] == pytest.approx([1, *half])
    assert [slope(i, 5, 0.2, "constant") for i in range(5)] == [1] * 5
    assert [slope(i, 5, 0.4, "constant") for i in range(3)] == [0.5, 1, 1]


def test_the_plan_goes_on_where_it_was() -> None:
    whole = list(batch_plan(encoded(), 8, 3, 4))
    assert len(whole) == 15
    for first in (0, 1, 5, 14, 15):
        assert list(batch_plan(encoded(), 8, 3, 4, first)) == whole[first:]


def test_an_evaluation_between_steps_changes_no_bit() -> None:
    def losses(evaluated: bool) -> list[float]:
        model, found = adapted(), []
        for step in steps_of(model, encoded(), **SETTINGS):
            found.append(step.loss)
            if evaluated:
                predict(model, encoded(), 5)
        return found

    assert losses(True) == losses(False)


def test_predictions_drop_nothing_and_attend_to_no_padding() -> None:
    data, model = encoded(), adapted()
    model.train()
    found = predict(model, data, 8)
    assert torch.equal(predict(model.train(), data, 8), found)
    alone = torch.cat([predict(model, _row(data, i), 1) for i in range(len(data.lengths))])
    assert torch.allclose(found, alone, atol=1e-6)
    set_dtype(model, "bfloat16")
    half = predict(model, data, 8)
    assert half.dtype == torch.float32
    assert 0 < float((half - found).abs().max()) < 0.1


def _row(data: Encoded, i: int) -> Encoded:
    start, end = data.offsets[i : i + 2].tolist()
    fields = {name: flat[start:end] for name, flat in data.fields.items()}
    return Encoded(fields, torch.tensor([0, end - start]), data.targets[i : i + 1], data.pad)


def test_steps_count_examples_and_tokens() -> None:
    data = encoded()
    steps = list(steps_of(adapted(), data, **(SETTINGS | {"epochs": 2})))
    assert [step.epoch_ends for step in steps] == [False] * 4 + [True] + [False] * 4 + [True]
    for epoch in (1, 2):
        own = [step for step in steps if step.epoch == epoch]
        assert sum(step.examples for step in own) == 37
        assert sum(step.tokens for step in own) == sum(data.lengths)
    assert all(0 <= step.padding < 0.5 for step in steps)


def test_nothing_is_read_from_the_device_before_the_last_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On an accelerator each read would wait for all that was started before it."""
    model, events, thread = adapted(), list[str](), threading.current_thread()

    def recorded(name: str, what: str) -> None:
        real = getattr(Tensor, name)

        def call(self: Tensor, *args: Any, **more: Any) -> Any:
            if threading.current_thread() is thread:  # batches are made in another
                events.append(what)
            return real(self, *args, **more)

        monkeypatch.setattr(Tensor, name, call)

    recorded("backward", "backward")
    for name in ("item", "tolist", "__float__", "cpu"):
        recorded(name, "read")
    steps = steps_of(model, encoded(), **SETTINGS, micro_batch_size=3)
    next(steps)  # which also looks for adapters without a gradient
    events.clear()
    next(steps)
    assert events.count("backward") == 3
    assert "read" in events
    assert events.index("read") > max(i for i, event in enumerate(events) if event == "backward")


def test_epochs_without_end_begin_at_once() -> None:
    """The plan of the batches is not held: it would fill the memory before the first step."""
    step = next(steps_of(adapted(), encoded(), 10**12, 8, 1e-2))
    assert step.steps == 5 * 10**12


def test_batches_do_not_run_from_short_to_long() -> None:
    lengths = range(3, 603)
    one, two = (batches(lengths, 8, 0, epoch) for epoch in (0, 1))
    rises = sum(a[0] < b[0] for a, b in itertools.pairwise(one))
    assert len(one) / 4 < rises < 3 * len(one) / 4
    # Sorted within stretches only: each epoch puts other rows together.
    assert not {frozenset(rows) for rows in one} & {frozenset(rows) for rows in two}


def test_a_loss_that_is_no_number_stops_before_the_step() -> None:
    model = adapted()
    with torch.no_grad():
        model.distilbert.embeddings.LayerNorm.weight.fill_(torch.nan)
    before: dict[str, Tensor] = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(TrainingError, match=r"step 1 of 15 \(epoch 1, learning rate .*loss nan"):
        next(steps_of(model, encoded(), **SETTINGS))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), before[name].nan_to_num(7)), name


def test_only_frozen_matrices_are_held_in_bfloat16() -> None:
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    set_dtype(model, "float32")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    set_dtype(model, "bfloat16")
    for name, parameter in model.named_parameters():
        frozen_matrix = re.search(r"(_lin|lin[12]|classifier).*weight$", name)
        held = bool(frozen_matrix) and not parameter.requires_grad
        assert parameter.dtype == (torch.bfloat16 if held else torch.float32), name
        assert torch.equal(parameter.float(), before[name].to(parameter.dtype).float())
    settings = SETTINGS | {"epochs": 20}
    losses = [step.loss for step in steps_of(model, encoded(), **settings)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_model_trains_the_same() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses = []
    for compiled in (False, True):
        model = distilbert(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
        lora.inject(model, lora.LoRAConfig(r=2, target_modules=("q_lin",)))
        if compiled:
            model.compile(dynamic=True)
        losses.append([s.loss for s in steps_of(model, encoded(), **SETTINGS)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert torch._dynamo.utils.counters["inductor"]


def test_what_the_optimiser_needs_has_to_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(10, 10)  # 440 bytes, four times of it in training
    for pages, fits in ((176, True), (175, False)):
        monkeypatch.setattr(
            "lora.injection.os.sysconf", lambda name, n=pages: n if "PHYS" in name else 10
        )
        if fits:
            check_room(model)
        else:
            with pytest.raises(ConfigError, match="gradients and optimiser need .* GiB"):
                check_room(model)


def test_writing_keeps_the_random_state_of_its_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fork_rng without names would start a context on every device of the machine."""
    calls: list[Any] = []
    monkeypatch.setattr(
        torch.random,
        "fork_rng",
        lambda devices, device_type="cuda": calls.append((devices, device_type)),
    )
    random_kept(torch.device("cpu"))
    random_kept(torch.device("cuda", 1))
    random_kept(torch.device("xpu"))
    assert calls == [([], "cuda"), ([1], "cuda"), ([0], "xpu")]
