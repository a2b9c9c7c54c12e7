"""The loss of a text: equal to the model's own, and never with all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import CAUSAL, SEQUENCES, build
from torch import Tensor, nn

import lora
from benchmarks.memory import most_held
from lora.errors import ModelError
from lora.finetune import losses
from lora.finetune.losses import batch_loss, check_language, token_scores

EVERY = [*CAUSAL, *SEQUENCES]


def batch(name: str) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs, and targets at some of the places."""
    generator = torch.Generator().manual_seed(0)
    given = {"input_ids": torch.randint(3, 300, (3, 9), generator=generator)}
    length = 9
    if name in SEQUENCES:
        length = 5
        given["decoder_input_ids"] = torch.randint(3, 300, (3, 5), generator=generator)
    places = torch.arange(3 * length)[2:-3:2]
    return given, torch.stack([places, torch.randint(3, 300, places.shape, generator=generator)])


def plain(model: Any, given: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The loss of each target over the model's own logits."""
    logits = model(**given).logits.flatten(0, 1)[targets[0]]
    return F.cross_entropy(logits, targets[1], reduction="none")


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def near(one: Tensor, two: Tensor, share: float = 1e-5) -> bool:
    return bool((one - two).abs().max() <= share * two.abs().max())


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_loss_and_gradients_are_the_plain_losss(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In stretches of 7 tokens; with `head` an adapter on the head trains too."""
    model: Any = build(name) if name == "mixtral" else build(name).double()
    if method != "full":
        targets = [".*(query|c_attn|qkv_proj|query_key_value|q_proj|\\.q)$"]
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        pattern = "|".join([*targets, *([head] if method == "head" else [])])
        lora.inject(model, lora.LoRAConfig(r=2, target_modules=pattern))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)
    monkeypatch.setattr(losses, "AT_ONCE", 7 * 300)
    given, targets = batch(name)
    want = plain(model, given, targets).sum()
    by_plain = gradients(model, want)
    got = batch_loss(model, given, targets, "text")
    by_ours = gradients(model, got)
    assert near(got.detach(), want.detach(), 1e-6)
    assert by_ours.keys() == by_plain.keys()
    largest = max(g.abs().max() for g in by_plain.values())
    assert all((by_ours[n] - by_plain[n]).abs().max() <= 1e-5 * largest for n in by_plain)


@pytest.mark.parametrize("name", EVERY)
def test_scores_are_of_each_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "AT_ONCE", 5 * 300)
    model = build(name)
    given, targets = batch(name)
    with torch.no_grad():
        assert near(token_scores(model, given, targets)[0], plain(model, given, targets), 1e-6)
        best = model(**given).logits.argmax(-1).flatten()[targets[0]]
    best[0] += 1
    hits = token_scores(model, given, torch.stack([targets[0], best]))[1]
    assert hits.tolist() == [0.0] + [1.0] * (len(best) - 1)


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_passes_the_check(name: str) -> None:
    check_language(build(name))


def test_a_head_that_does_more_is_refused() -> None:
    model: Any = build("llama")
    real = type(model).forward

    class Doubles(type(model)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            found = real(self, *given, **named)
            found.logits = found.logits * 1.1
            return found

    model.__class__ = Doubles
    with pytest.raises(ModelError, match="more after its head"):
        check_language(model)


def test_the_models_forward_is_its_own_again() -> None:
    model: Any = build("llama")
    given, targets = batch("llama")
    with pytest.raises(IndexError):
        batch_loss(model, {"input_ids": given["input_ids"] + 10_000}, targets, "text")
    assert "forward" not in model.__dict__


def test_logits_are_never_there_as_a_whole() -> None:
    """Peak memory at 128 k tokens of vocabulary, above what the model and its gradient take."""
    torch.manual_seed(0)
    make, config = CAUSAL["llama"]
    shape = config()
    shape.vocab_size = 131_072
    model = make(shape)
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, y: y.requires_grad_())
    ids = torch.arange(2048).view(4, 512)
    positions = {"position_ids": torch.arange(64).repeat(8)[None]}
    targets = torch.stack([ids.flatten(), ids.flatten() + 1])
    batch = {"input_ids": ids, **positions}
    most = most_held(lambda: batch_loss(model, batch, targets, "text").backward())
    assert most < 2048 * 131_072 * 4 / 2  # a half of the logits in float32


def test_an_accelerator_gets_longer_chunks() -> None:
    """A chunk too short would read the head again and again."""
    model: Any = build("llama")
    width = model.get_output_embeddings().out_features
    for device, logits in (("cpu", losses.AT_ONCE), ("meta", losses.AT_ONCE_ON_ACCELERATORS)):
        h = torch.empty(2 * logits // width, 1, device=device)
        first = next(losses._chunks(model, h))
        assert first.stop * width <= logits < (first.stop + 1) * width
