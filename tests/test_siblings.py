"""Layers that read one input are computed together, and compute what each would by itself."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from lora import fused, nf4
from lora.adapter import AdaptedLayer

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


def apart(model: nn.Module) -> nn.Module:
    """The same, each layer for itself but with the masks that siblings share."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AdaptedLayer) and module.siblings:
            module.adapter("default").low_rank = lambda view: None  # type: ignore[method-assign]
    return model


def outcome(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients, and where the generator stands after it."""
    torch.manual_seed(1)
    leaves = [x.detach().requires_grad_() for x in inputs]
    model.zero_grad()
    y = model[0](*leaves) if len(leaves) > 1 else model(*leaves)  # type: ignore[operator]
    y.square().mean().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    given = {f"x{i}": x.grad for i, x in enumerate(leaves) if x.grad is not None}
    return {"y": y.detach(), **given, **own, "generator": torch.get_rng_state()}


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
            found.append(node.name())
            todo += [behind for behind, _ in node.next_functions]
    return found


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_packed_weights(dropout: float) -> None:
    model, x = adapted(dropout=dropout, packed=True), torch.randn(2, 30, 12)
    same(outcome(model, x), outcome(apart(model), x), 1e-4)
    assert functions(model(x)).count("_LowRankBackward") == 4


def test_in_bfloat16_under_autocast() -> None:
    model, x = adapted(dropout=0.3).float(), torch.randn(2, 30, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = outcome(model, x), outcome(apart(model), x)
    assert found["y"].dtype == torch.bfloat16
    for name in set(found) - {"generator"}:
        error = (found[name] - wanted[name]).float().abs().max()
        assert error <= 0.03 * wanted[name].float().abs().max(), name


def test_three_share_one_mask_and_the_next_has_another() -> None:
    model = adapted(dropout=0.3)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks:
        model(torch.randn(160, 12, dtype=torch.float64))
    bits = [t for t in kept if t.dtype == torch.int16]
    assert [t.shape[1] for t in bits] == [12, 8, 12, 8]
    assert not torch.equal(bits[0], bits[2])
    assert not torch.equal(bits[1], bits[3])
    assert not torch.equal(bits[0][:, :8], bits[1])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("of", [NAMES, NAMES[1:2], NAMES[:1], NAMES[2:]])
def test_recomputed_in_part_or_whole(reentrant: bool, whole: bool, of: tuple[str, ...]) -> None:
    """The masks are those of forward, whichever of the layers are recomputed, and how."""
    model, x = adapted(dropout=0.5), torch.randn(50, 12, dtype=torch.float64)
    wanted = outcome(model, x)

    def recomputed(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda x: layer(x) * 1, x, use_reentrant=reentrant)
        return y

    for block in model:
        if whole:
            own, block.forward = block.forward, None
            block.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=reentrant)
        else:
            layers = [getattr(block, name) for name in of]
            block.wrap = lambda layer, x, layers=layers: (
                recomputed(layer, x) if any(layer is one for one in layers) else layer(x)
            )
    found = outcome(model, x)
    same(found, wanted)


def test_a_layer_that_reads_another_input_is_by_itself() -> None:
    model = adapted(dropout=0.3)
    x, other = torch.randn(2, 40, 12, dtype=torch.float64).unbind()
    same(outcome(model, x, other), outcome(apart(model), x, other))
    equal = x.clone()  # another tensor all the same
    same(outcome(model, x, equal), outcome(apart(model), x, equal))


def test_an_input_that_was_written_since_is_another() -> None:
    model, x = adapted()[0], torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj(x)
        x += 1
        torch.testing.assert_close(model.k_proj(x), apart(model).k_proj(x))


def test_what_was_made_without_gradients_is_not_taken_with_them() -> None:
    model, x = adapted()[0], torch.randn(5, 12, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj(x)
    assert model.k_proj(x).requires_grad
    model.q_proj(x)
    with torch.no_grad():
        assert not model.v_proj(x).requires_grad
    model.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float().v_proj(x.float()).dtype == torch.bfloat16


def test_one_that_is_never_called_has_no_gradient_and_keeps_nothing_from_working() -> None:
    model, x = adapted(), torch.randn(5, 12, dtype=torch.float64)
    model[0].q_proj(x).sum().backward()  # k and v wait
    assert model[0].q_proj.adapter("default").lora_B.grad is not None
    assert all(p.grad is None for p in model[0].k_proj.parameters())
    again = pickle.loads(pickle.dumps(copy.deepcopy(model).float()))
    same(outcome(again, x.float()), outcome(model.float(), x.float()), 1e-6)


def test_layers_that_act_otherwise_are_not_of_the_group() -> None:
    model, x = adapted(dropout=0.3)[0], torch.randn(50, 12, dtype=torch.float64)
    model.k_proj.eval()
    k = model.k_proj(x)
    model.q_proj(x)
    torch.testing.assert_close(model.k_proj(x), k)  # nothing dropped
    with lora.disabled(model.v_proj):
        model.q_proj(x)
        base = model.v_proj.base_layer(x)
        torch.testing.assert_close(model.v_proj(x), base)


def test_a_second_adapter_on_some_of_them() -> None:
    model, x = adapted(), torch.randn(50, 12, dtype=torch.float64)
    config = lora.LoRAConfig(r=2, target_modules=("q_proj", "v_proj"), lora_dropout=0.4)
    lora.inject(model, config, name="other")
    lora.testing.perturb(model)
    lora.activate(model, "other")
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks:
        y = model(x)
    bits = [t for t in kept if t.dtype == torch.int16]
    assert len(bits) == 2
    assert not torch.equal(*bits)
    assert functions(y).count("_LowRankBackward") == 2
    lora.activate(model, "default", "other")
    assert functions(model(x)).count("_LowRankBackward") == 4  # k and o, which have one adapter


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
        lora.inject(model, lora.LoRAConfig(r=2, lora_dropout=0.5))
        lora.testing.perturb(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        found = model(**ids, **more).logits
        assert functions(found).count("_LowRankBackward") == count, type(model)
        torch.manual_seed(0)
        wanted = apart(model)(**ids, **more).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
