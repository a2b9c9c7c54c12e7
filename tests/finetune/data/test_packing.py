"""Texts that share a row, and epochs of several tasks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import CAUSAL, build
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import lora
from lora.errors import ModelError
from lora.finetune import losses
from lora.finetune.data.tokens import IGNORED, Encoded, collate, drawn, layout, parts_of
from lora.finetune.losses import batch_loss, check_language
from lora.finetune.train import Hyperparameters, batch_plan, begin, fit

CPU = torch.device("cpu")


def texts(lengths: list[int], seed: int = 0, row: int | None = None) -> Encoded:
    """Texts of so many tokens; of each the last half is to be learned."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    ids = torch.randint(3, 300, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    labels = ids.roll(-1)
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        labels[start : start + (end - start) // 2] = IGNORED
        labels[end - 1] = IGNORED
    return Encoded({"input_ids": ids}, offsets, labels, 0, labels=offsets, row=row)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(30, 64))
def test_every_example_has_its_place_once(lengths: list[int], row: int) -> None:
    encoded = texts([max(2, n) for n in lengths], row=row)
    rows = list(range(len(lengths)))
    laid = layout(encoded, rows)
    assert sorted(example for some in laid for example in some) == rows
    sums = [sum(encoded.lengths[example] for example in some) for some in laid]
    assert max(sums) <= row
    assert len(laid) < 2 * sum(encoded.lengths) / row + 1  # first fit leaves no two rows half empty
    batch, targets = collate(encoded, laid, CPU)
    ids = batch["input_ids"].flatten()
    assert int((ids != 0).sum()) == sum(encoded.lengths)
    assert targets.shape[1] == sum(encoded.counts)
    # A label is what follows its place, in the same example.
    follows = targets[1] == ids[(targets[0] + 1).clamp(max=len(ids) - 1)]
    assert follows.all()
    places = batch["position_ids"].flatten()
    assert (places[targets[0] + 1] == places[targets[0]] + 1).all()


@pytest.mark.parametrize("name", CAUSAL)
def test_a_packed_texts_logits_are_its_own(name: str) -> None:
    model: Any = build(name)
    encoded = texts([7, 3, 9, 5, 4, 8], row=16)
    laid = layout(encoded, range(6))
    assert len(laid) == 3
    batch, _ = collate(encoded, laid, CPU)
    apart, _ = collate(replace(encoded, row=None), [[i] for i in range(6)], CPU)
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        for row, some in enumerate(laid):
            start = 0
            for example in some:
                length = encoded.lengths[example]
                own = model(input_ids=apart["input_ids"][example : example + 1, :length]).logits
                near = (packed[row, start : start + length] - own[0]).abs().max()
                assert near <= 1e-5 * own.abs().max(), (name, example)
                start += length


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
def test_packing_changes_no_gradient(name: str) -> None:
    found = []
    for row in (None, 24):
        model: Any = build(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # GPT-2's own; it draws by rows
                module.p = 0.0
        lora.inject(model, lora.LoRAConfig(r=2))
        encoded = texts([7, 3, 9, 5, 4, 8, 12, 6], row=row)
        steps = list(fit(begin(model, 1e-3), encoded, "text", Hyperparameters(3, 4, warmup=0.0)))
        found.append(([s.loss for s in steps], [s.gradient_norm for s in steps], steps))
    for one, two in zip(found[0][:2], found[1][:2], strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    assert [s.tokens for s in found[0][2]] == [s.tokens for s in found[1][2]]


def test_a_step_is_the_mean_over_the_tokens_that_are_learned() -> None:
    """In parts too, of uneven numbers of labels; a mean of means is another number."""
    encoded = texts([4, 20, 6, 30, 5, 9])
    losses_ = []
    for size in (None, 1, 2, 4):
        model: Any = build("llama")
        lora.inject(model, lora.LoRAConfig(r=2))
        training = begin(model, 1e-3)
        losses_.append(
            [
                s.loss
                for s in fit(training, encoded, "text", Hyperparameters(4, 6, size, warmup=0.0))
            ]
        )
    model = build("llama")
    batch, targets = collate(encoded, [[i] for i in range(6)], CPU)
    want = float(batch_loss(model, batch, targets, "text").detach()) / sum(encoded.counts)
    assert losses_[0][0] == pytest.approx(want, rel=1e-6)
    for other in losses_[1:]:
        assert other == pytest.approx(losses_[0], rel=1e-5)


@pytest.mark.parametrize("name", CAUSAL)
def test_every_architecture_keeps_packed_texts_apart(name: str) -> None:
    check_language(build(name), packs=True)


def test_rounding_over_many_layers_is_no_text_that_is_seen() -> None:
    config: Any = CAUSAL["llama"][1]()
    config.num_hidden_layers, config.initializer_range = 32, 0.2
    torch.manual_seed(0)
    check_language(CAUSAL["llama"][0](config), packs=True)


def test_texts_that_see_one_another_are_refused() -> None:
    model: Any = build("llama")
    real = model.model.forward
    model.model.forward = lambda position_ids=None, **given: real(**given)
    with pytest.raises(ModelError, match="see one another"):
        check_language(model, packs=True)
    check_language(model)


def test_what_is_packed_says_how_full_its_rows_are() -> None:
    model: Any = build("llama")
    lora.inject(model, lora.LoRAConfig(r=2))
    step = next(fit(begin(model, 1e-3), texts([8, 8, 8, 6], row=16), "text", Hyperparameters(1, 4)))
    assert step.tokens == 30
    assert step.padding == pytest.approx(1 - 30 / 32)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(10, 500))
def test_parts_add_up_and_are_near(weights: list[float], total: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    found = parts_of(total, shares)
    assert sum(found) == total
    assert all(abs(part - share * total) < 1 + 1e-9 for part, share in zip(found, shares))


def mixture(sizes: list[int], shares: list[float]) -> Encoded:
    tasks = tuple(task for task, size in enumerate(sizes) for _ in range(size))
    return replace(texts([4] * sum(sizes)), tasks=tasks, shares=tuple(shares))


def test_an_epoch_has_each_tasks_share_and_repeats_none_early() -> None:
    encoded = mixture([100, 20], [0.5, 0.5])
    seen: Counter[int] = Counter()
    for epoch in range(7):
        rows = drawn(encoded, 0, epoch)
        assert len(rows) == 120
        assert sum(row >= 100 for row in rows) == 60
        assert rows == drawn(encoded, 0, epoch)
        seen.update(rows)
        of = [seen[row] for row in range(100)], [seen[row] for row in range(100, 120)]
        assert all(max(some) - min(some) <= 1 for some in of)
    assert drawn(encoded, 1, 0) != drawn(encoded, 0, 0)


def test_the_plan_of_a_mixture_goes_on_anywhere() -> None:
    encoded = mixture([30, 7], [0.4, 0.6])
    whole = list(batch_plan(encoded, 8, 3, 5))
    assert len(whole) == 3 * math.ceil(37 / 8)
    for first in (1, 5, 9):
        assert list(batch_plan(encoded, 8, 3, 5, first)) == whole[first:]


def test_stretches_do_not_change_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for most in (2**24, 300):
        monkeypatch.setattr(losses, "AT_ONCE", most)
        model: Any = build("gemma2")
        lora.inject(model, lora.LoRAConfig(r=2))
        found.append(
            [
                s.loss
                for s in fit(begin(model, 1e-2), texts([9, 12, 5]), "text", Hyperparameters(6, 3))
            ]
        )
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0][-1] < found[0][0]
