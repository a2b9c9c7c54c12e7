"""Layers that read one input are computed together, and compute what each would by itself."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from functools import partial
from itertools import permutations
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from lora import nf4
from lora.kernels import fused, siblings
from lora.kernels.dropout import Mask, draw

NAMES = ("q_proj", "k_proj", "v_proj")
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 3, "lora_alpha": 7.0}),
    "ranks": ("lora", {"r": 3, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 5.0}}),
    "pissa": ("lora", {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "pissa"}),
    "lora-fa": ("lora", {"r": 3, "use_lorafa": True}),
    "biases": ("lora", {"r": 3, "bias": "lora_only", "lora_bias": True}),
    "adalora": ("adalora", {"init_r": 3, "target_r": 1}),
    "dora": ("dora", {"r": 3}),
}


def call(layer: nn.Module, x: Tensor) -> Any:
    return layer(x)


class Attention(nn.Module):
    """Three layers of one input, and one of their sum; `wrap` is around each call."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.o_proj = nn.Linear(8, 12)
        self.wrap: Any = call

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q = self.wrap(self.q_proj, x)
        k = self.wrap(self.k_proj, other)
        v = self.wrap(self.v_proj, other)
        y: Tensor = self.wrap(self.o_proj, q + 2 * k - 3 * v)
        return y


def adapted(which: str = "lora", dropout: float = 0.0, packed: bool = False) -> nn.Sequential:
    """Two of them, off the start, in training; float64 but where weights are packed."""
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention())
    if packed:
        names = [f"{i}.{name}" for i in range(2) for name in (*NAMES, "o_proj")]
        nf4.quantize_layers(model, names)
    method, settings = SETTINGS[which]
    lora.inject(model, lora.METHODS[method].Config(lora_dropout=dropout, **settings))
    lora.testing.perturb(model)
    return (model if packed else model.double()).train()


@pytest.fixture
def one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mask for every input of one shape, whoever draws it."""

    def drawn(p: float, x: Tensor) -> Mask:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(x.shape[-1])
            return draw(p, x)

    monkeypatch.setattr("lora.adapter.draw", drawn)


def apart(model: nn.Module) -> nn.Module:
    """The same, each layer for itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        siblings.part(module)
    return model


def outcome(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    torch.manual_seed(1)
    leaves = [x.detach().requires_grad_() for x in inputs]
    model.zero_grad()
    y = model[0](*leaves) if len(leaves) > 1 else model(*leaves)  # type: ignore[operator]
    y.square().mean().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    given = {f"x{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return {"y": y.detach(), **given, **own}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], digits: float = 1e-10) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=digits, atol=digits)


def functions(y: Tensor) -> list[str]:
    """The names of the nodes behind y."""
    seen, todo, found = set(), [y.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            # Both compute the layers of a group in one node.
            found.append(node.name().replace("_Whole", "_LowRank"))
            todo += [behind for behind, _ in node.next_functions]
    return found


@pytest.mark.usefixtures("one_mask")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("which", list(SETTINGS))
def test_together_is_each_by_itself(which: str, dropout: float) -> None:
    model, x = adapted(which, dropout), torch.randn(2, 300, 12, dtype=torch.float64)
    same(outcome(model, x), outcome(apart(model), x))
    with fused.off():
        wanted = outcome(model, x)
    same(outcome(model, x), wanted, 1e-9)
    nodes = functions(model(x)).count("_LowRankBackward")
    assert nodes == (4 if which != "dora" else 0 if dropout else 8)


@pytest.mark.usefixtures("one_mask")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_packed_weights(dropout: float) -> None:
    model, x = adapted(dropout=dropout, packed=True), torch.randn(2, 30, 12)
    same(outcome(model, x), outcome(apart(model), x), 1e-4)
    assert functions(model(x)).count("_LowRankBackward") == 4


@pytest.mark.usefixtures("one_mask")
def test_in_bfloat16_under_autocast() -> None:
    model, x = adapted(dropout=0.3).float(), torch.randn(2, 30, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = outcome(model, x), outcome(apart(model), x)
    assert found["y"].dtype == torch.bfloat16
    for name in found:
        error = (found[name] - wanted[name]).float().abs().max()
        assert error <= 0.03 * wanted[name].float().abs().max(), name


def test_three_share_one_mask_and_the_next_has_another(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Mask] = []
    monkeypatch.setattr("lora.adapter.draw", lambda p, x: (drawn.append(draw(p, x)), drawn[-1])[1])
    adapted(dropout=0.3)(torch.randn(160, 12, dtype=torch.float64))
    assert [mask.bits.shape[1] for mask in drawn] == [12, 8, 12, 8]
    assert not torch.equal(drawn[0].bits, drawn[2].bits)
    assert not torch.equal(drawn[1].bits, drawn[3].bits)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of", [None, NAMES, NAMES[1:2], NAMES[:1], NAMES[::2]])
def test_recomputed_in_part_or_whole(reentrant: bool, of: tuple[str, ...] | None) -> None:
    """Gradients are the slopes of the loss: masks are those of forward, whatever is recomputed."""
    model, x = adapted(dropout=0.5), torch.randn(50, 12, dtype=torch.float64)

    def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: layer(x) * 1, x, use_reentrant=reentrant)
        return y

    for block in model:
        if of is None:
            block.forward = partial(checkpoint, block.forward, use_reentrant=reentrant)
        else:
            some = [getattr(block, name) for name in of]
            block.wrap = lambda layer, x, some=some: (
                recomputed(layer, x) if any(layer is one for one in some) else layer(x)
            )
    outcome(model, x)  # where a guess was wrong it is not made again
    found = outcome(model, x)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            step = 1e-5 * torch.randn_like(parameter)
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter += sign * step
                ends.append(outcome(model, x)["y"].square().mean())
                with torch.no_grad():
                    parameter -= sign * step
            slope = ((ends[0] - ends[1]) / 2).item()
            assert slope == pytest.approx((found[name] * step).sum().item(), rel=1e-3), name


@pytest.mark.usefixtures("one_mask")
def test_a_layer_that_reads_another_input_is_by_itself() -> None:
    x, other = torch.randn(2, 40, 12, dtype=torch.float64).unbind()
    for given in (other, x.clone()):  # another tensor all the same
        model = adapted(dropout=0.3)
        for _ in range(2):
            same(outcome(model, x, given), outcome(apart(model), x, given))
        assert model[0].__dict__[siblings.GROUPS] == ()  # not guessed again
        assert model[1].__dict__[siblings.GROUPS] == (NAMES,)


@pytest.mark.parametrize("order", list(permutations(NAMES)))
def test_in_any_order(order: tuple[str, ...]) -> None:
    model, x = adapted(), torch.randn(40, 12, dtype=torch.float64)

    def forward(self: Any, x: Tensor) -> Tensor:
        found = {name: getattr(self, name)(x) for name in order}
        y: Tensor = self.o_proj(found["q_proj"] + 2 * found["k_proj"] - 3 * found["v_proj"])
        return y

    for block in model:
        block.forward = MethodType(forward, block)
    same(outcome(model, x), outcome(apart(model), x))
    assert functions(model(x)).count("_LowRankBackward") == 4


def test_nothing_outlives_the_forward_it_was_made_in() -> None:
    """Weights that changed since, another adapter, another mode: each call is its own."""
    model, x = adapted(dropout=0.5), torch.randn(30, 12, dtype=torch.float64)
    block = model[0]

    def forward(x: Tensor) -> Tensor:  # reads k, and q later: v is never called
        y: Tensor = block.o_proj(block.k_proj(x) + block.q_proj(x))
        return y

    block.forward = forward
    model(x).sum().backward()
    model(x).sum().backward()
    model.eval()
    before = model(x)
    assert torch.equal(before, model(x))
    with torch.no_grad():
        block.k_proj.adapter("default").lora_B *= 3
    assert not torch.allclose(before, model(x))
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.func.grad(
        lambda trained: torch.func.functional_call(model, trained, (x,)).square().mean()
    )(trained)
    wanted = outcome(model, x)
    for name in grads:
        if "v_proj" not in name or "0." not in name:
            torch.testing.assert_close(grads[name], wanted[name])


def test_the_same_bits_with_gradients_and_without() -> None:
    model, x = adapted(dropout=0.5).float().eval(), torch.randn(64, 12)
    with torch.no_grad():
        without = model(x)
    assert torch.equal(model(x), without)
    model.train()
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = model(x)  # each by itself
    torch.manual_seed(0)
    assert not torch.equal(apart(model)(x), without)
    torch.manual_seed(0)
    assert torch.equal(apart(model)(x), dropped)


def test_layers_called_by_themselves_wait_for_nobody() -> None:
    block, x = adapted()[0], torch.randn(5, 12, dtype=torch.float64)
    block.q_proj(x).sum().backward()
    assert all(p.grad is None for p in block.k_proj.parameters())
    with torch.no_grad():
        block.k_proj.adapter("default").lora_B *= 3
    torch.testing.assert_close(block.k_proj(x), apart(block).k_proj(x))
    gone = weakref.ref(block.k_proj.base_layer.weight)
    gc.disable()
    try:
        block(x)
        del block
        assert gone() is None
    finally:
        gc.enable()


def test_written_between_two_calls_or_hooked_is_by_itself() -> None:
    model, x = adapted(), torch.randn(5, 12, dtype=torch.float64)

    def written(layer: nn.Module, x: Tensor) -> Any:
        y = layer(x)
        x.detach().add_(1.0)
        return y

    model[0].wrap = written
    torch.testing.assert_close(model[0](x.clone()), apart(model)[0](x.clone()))

    model = adapted()
    weight = model[0].k_proj.adapter("default").lora_B
    kept, wanted = weight.data.clone(), model(x).detach()
    weight.data.zero_()  # put away until its layer is called
    model[0].k_proj.register_forward_pre_hook(lambda *_: (weight.data.copy_(kept), None)[1])
    torch.testing.assert_close(model(x), wanted)

    seen: list[Tensor] = []
    for name in NAMES:
        layer = adapted()[0]
        layer.get_submodule(name).base_layer.register_forward_hook(lambda *a: seen.append(a[2]))
        layer(x)
    assert len(seen) == 3


def test_a_copy_a_file_and_an_end(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(5, 12, dtype=torch.float64)
    wanted = outcome(model, x)
    torch.save(model, tmp_path / "model.pt")
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        same(outcome(again, x), wanted)
        assert functions(again(x)).count("_LowRankBackward") == 4
    lora.eject(model)
    for block in model:
        assert not block._forward_hooks
        assert not block._forward_pre_hooks
        assert not block._forward_hooks_always_called
        assert siblings.GROUPS not in block.__dict__


def test_a_failed_forward_leaves_nothing() -> None:
    model, x = adapted(), torch.randn(5, 12, dtype=torch.float64)
    wanted = outcome(model, x)

    def fails(layer: nn.Module, x: Tensor) -> Any:
        if layer is model[0].k_proj:
            raise RuntimeError("no")
        return layer(x)

    model[0].wrap = fails
    with pytest.raises(RuntimeError, match="no"):
        model(x)
    assert siblings._open.forwards == []
    model[0].wrap = call
    same(outcome(model, x), wanted)
    assert functions(model(x)).count("_LowRankBackward") == 4


def test_layers_that_act_otherwise_are_not_of_the_group() -> None:
    model, x = adapted(dropout=0.3), torch.randn(50, 12, dtype=torch.float64)
    model.eval()
    k = model[0].k_proj(x)
    model.train()
    model[0].k_proj.eval()
    seen: list[Tensor] = []
    model[0].wrap = lambda layer, x: (seen.append(layer(x)), seen[-1])[1]
    model(x)
    torch.testing.assert_close(seen[1], k)  # nothing dropped
    assert functions(model[0](x)).count("_LowRankBackward") == 3


def test_a_second_adapter_on_some_of_them() -> None:
    model, x = adapted(), torch.randn(50, 12, dtype=torch.float64)
    config = lora.LoRAConfig(r=2, target_modules=("q_proj", "v_proj"), lora_dropout=0.4)
    lora.inject(model, config, name="other")
    lora.testing.perturb(model)
    lora.activate(model, "other")
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    assert functions(model(x)).count("_LowRankBackward") == 2
    with hooks:  # which a checkpoint may have set: each by itself
        y = model(x)
    bits = [t for t in kept if t.dtype == torch.int16]
    assert len(bits) == 4
    assert functions(y).count("_LowRankBackward") == 4
    lora.activate(model, "default", "other")
    assert functions(model(x)).count("_LowRankBackward") == 4  # k and o, which have one adapter


def test_compiled_after_an_uncompiled_forward() -> None:
    model, x = adapted().float(), torch.randn(5, 12)
    wanted = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-3, atol=1e-3)


def test_threads_have_their_own() -> None:
    model = adapted()
    inputs = [torch.randn(200, 12, dtype=torch.float64) for _ in range(4)]
    wanted = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.allclose(model(inputs[i]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_in_transformers_models() -> None:
    """As many Functions as inputs that are read; where a decoder reads two, each by itself."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**small, intermediate_size=24, num_key_value_heads=1)
    )
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**small, intermediate_size=24))
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=20,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )
    )  # fmt: skip
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    # q k v, o, gate up, down; q k v, output, two of ffn; twice q k v, o, wi, wo and q, k, v, o
    for model, count, more in (
        (llama, 4, {}),
        (bert, 4, {}),
        (t5, 12, {"labels": torch.ones(2, 3).long()}),
    ):
        lora.inject(model, lora.LoRAConfig(r=2))
        lora.testing.perturb(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)  # of the model's own dropout
        found = model(**ids, **more).logits
        assert functions(found).count("_LowRankBackward") == count, type(model)
        torch.manual_seed(0)
        wanted = apart(model)(**ids, **more).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
