"""The fast path: what it keeps, where it stands back, and its first derivatives alone."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import llama
from torch import Tensor, nn

import lora
from lora.errors import TrainingError
from lora.kernels import lowrank, off, products
from lora.kernels.products import possible
from lora.kernels.scratch import scratch

METHODS = {
    "lora": {"r": 3, "lora_alpha": 7.0},
    "lora, pissa": {"r": 3, "lora_alpha": 7.0, "init_lora_weights": "pissa"},
    "lora, bias": {"r": 3, "bias": "lora_only", "lora_bias": True},
    "dora": {"r": 3, "lora_alpha": 7.0},
    "dora, pissa": {"r": 3, "init_lora_weights": "pissa"},
    "adalora": {"init_r": 3, "target_r": 1},
    "vera": {"r": 5, "d_initial": 0.7},
}


def adapted(which: str = "lora", dropout: float = 0.0, **more: Any) -> nn.Sequential:
    """Two layers with a method on both, moved off its start, in training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 10))
    method = which.partition(",")[0]
    key = {"vera": "vera_dropout"}.get(method, "lora_dropout")
    settings = {**METHODS[which], key: dropout, **more}
    lora.inject(model, lora.METHODS[method].Config(**settings))
    lora.testing.perturb(model)
    return model.train()


def outcome(model: nn.Module, x: Tensor, plain: bool) -> dict[str, Tensor]:
    """Output and gradients, with the masks of one seed."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    model.zero_grad()
    with off() if plain else torch.enable_grad():
        y = model(x)
        y.float().square().mean().backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **own}


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("tokens", [1, 7, 300, 600])  # less than a part, one, and two with a rest
def test_both_roads_agree_with_the_same_mask(which: str, dropout: float, tokens: int) -> None:
    model = adapted(which, dropout).double()
    x = torch.randn(tokens, 12, dtype=torch.float64)
    fast, slow = outcome(model, x, False), outcome(model, x, True)
    assert fast.keys() == slow.keys()
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_call_without_gradients_gives_the_same_bits(which: str, dropout: float) -> None:
    model, x = adapted(which, dropout), torch.randn(2, 7, 12)
    outputs = []
    for gradients in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(gradients):
            outputs.append(model(x).detach())
    assert torch.equal(*outputs)


def test_a_call_without_gradients_starts_no_function(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(), torch.randn(2, 12)
    monkeypatch.setattr(lowrank._LowRank, "apply", None)
    with torch.no_grad():
        assert model(x).shape == (2, 10)


def test_a_mask_in_several_blocks_is_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(dropout=0.3).double(), torch.randn(50, 12, dtype=torch.float64)
    whole = outcome(model, x, False)
    monkeypatch.setattr("lora.kernels.dropout.BLOCK", 800)  # 8 rows, then 4
    for name, found in outcome(model, x, False).items():
        torch.testing.assert_close(found, whole[name], rtol=1e-12, atol=1e-15)


def test_inputs_need_not_lie_in_a_row() -> None:
    model = adapted(dropout=0.3).double()
    x = torch.randn(12, 5, 7, dtype=torch.float64).permute(2, 1, 0)
    y = model(x)
    assert y.shape == (7, 5, 10)
    fast, slow = outcome(model, x, False), outcome(model, x, True)
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-9, atol=1e-12)


def saved_by(forward: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        forward()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_input_by_reference_and_what_is_thin(
    dropout: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "SMALL", math.inf)
    layer = adapted(dropout=dropout).to(dtype)[0]
    layer.adapter("default").float()
    x = torch.randn(64, 12, dtype=dtype, requires_grad=True)
    kept = saved_by(lambda: layer(x))
    wide = [t for t in kept if t.dim() == 2 and t.shape[0] == 64 and t.shape[1] > 3]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]
    known = {p.data_ptr() for p in (*layer.parameters(), x)}
    others = [t for t in kept if t.data_ptr() not in known]
    bits = [t for t in others if t.dtype == torch.int16]
    assert [t.shape for t in bits] == ([(64 // 16, 12)] if dropout else [])  # one an element
    # h, and the factors as they are multiplied with: fewer than the optimiser keeps of them
    factors = 3 * 16 + (3 * 12 if dtype == torch.bfloat16 else 0)
    assert sum(t.numel() for t in others if t.dtype == dtype) == 64 * 3 + factors
    assert len(others) == (3 if dtype == torch.bfloat16 else 2) + len(bits)


def test_a_small_weight_is_kept_merged_beside_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", 0)
    layer = adapted()[0]
    x = torch.randn(64, 12, requires_grad=True)
    kept = saved_by(lambda: layer(x))
    known = {p.data_ptr() for p in (*layer.parameters(), x)}
    assert [tuple(t.shape) for t in kept if t.data_ptr() not in known] == [(16, 12)]


def nodes(y: Tensor) -> set[str]:
    """The names of the nodes behind y."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [behind for behind, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("settings", [{}, {"init_lora_weights": "pissa"}, {"use_lorafa": True}])
def test_both_ways_of_a_low_rank_are_one_equation(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for small in (0, math.inf):
        monkeypatch.setattr(lowrank, "SMALL", small)
        torch.manual_seed(0)
        model = llama().double()
        lora.inject(model, lora.LoRAConfig(r=3, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        embedded = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
        y = model(inputs_embeds=embedded).logits
        assert nodes(y) & {"_MergedBackward", "_LowRankBackward"} == {
            "_MergedBackward" if small == 0 else "_LowRankBackward"
        }
        y.square().sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        with torch.no_grad():  # as it is when nothing trains
            assert torch.equal(model.requires_grad_(False)(inputs_embeds=embedded).logits, y)
        found.append([y.detach(), embedded.grad, *grads])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tokens", "whole"),
    [(torch.float32, 64, True), (torch.float32, 3, False), (torch.bfloat16, 64, False)],
)
def test_a_weight_is_merged_where_it_is_small_and_loses_nothing(
    dtype: torch.dtype, tokens: int, whole: bool
) -> None:
    layer = adapted().to(dtype)[0]
    y = layer(torch.randn(tokens, 12, dtype=dtype))
    assert ("_MergedBackward" in nodes(y)) == whole


@pytest.mark.parametrize("small", [0, math.inf])
def test_lora_fa_keeps_no_input(small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "SMALL", small)
    layer = adapted(use_lorafa=True)[0]
    x = torch.randn(64, 12, requires_grad=True)
    assert not [t for t in saved_by(lambda: layer(x)) if t.shape == (64, 12)]


def test_a_second_derivative_is_refused_and_the_way_out_works() -> None:
    model, x = adapted(), torch.randn(4, 12, requires_grad=True)
    with pytest.raises(TrainingError, match=r"create_graph=True.*lora\.kernels\.off\(\)"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with off():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    assert second.abs().sum() > 0


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_output_may_be_written_over(which: str, dropout: float) -> None:
    model, x = adapted(which, dropout), torch.randn(2, 5, 12)
    before = outcome(nn.Sequential(model[0], nn.ReLU(), model[1]), x, False)
    after = outcome(nn.Sequential(model[0], nn.ReLU(inplace=True), model[1]), x, False)
    for name, found in after.items():
        torch.testing.assert_close(found, before[name])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_goes_around_the_functions() -> None:
    model, x, t = adapted(), torch.randn(4, 12), torch.randn(4, 12)
    with torch.autograd.forward_ad.dual_level():
        dual = model(torch.autograd.forward_ad.make_dual(x, t))
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, model(x + t) - model(x), rtol=1e-4, atol=1e-4)


def test_scratch_is_one_but_what_a_mode_makes_is_not_found_later() -> None:
    """Tensors without values, as of a memory estimate, between two steps."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert type(scratch("a test", (4,), torch.float32, "cpu")) is not Tensor
    first = scratch("a test", (2, 3), torch.float32, "cpu")
    with FakeTensorMode():
        assert type(scratch("a test", (4,), torch.float32, "cpu")) is not Tensor
    again = scratch("a test", (3,), torch.float32, "cpu")
    assert type(first) is type(again) is Tensor
    assert first.data_ptr() == again.data_ptr()
    assert scratch("another", (3,), torch.float32, "cpu").data_ptr() != again.data_ptr()
    assert scratch("a test", (3,), torch.float32, "meta").is_meta


def test_several_gradients_at_once() -> None:
    model, x = adapted(dropout=0.3), torch.randn(4, 12)
    own = [p for p in model.parameters() if p.requires_grad]
    y = model(x)
    ways = torch.randn(3, *y.shape)
    found = torch.autograd.grad(y, own, ways, is_grads_batched=True, retain_graph=True)
    for i, way in enumerate(ways):
        for one, many in zip(torch.autograd.grad(y, own, way, retain_graph=True), found):
            torch.testing.assert_close(many[i], one, rtol=1e-4, atol=1e-5)


def test_parameters_may_be_others_for_a_call() -> None:
    """torch.func's own way of writing it: all of them, detached."""
    model, x = adapted(), torch.randn(4, 12)
    others = {name: 2 * p.detach() for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, others, (x,))
    for parameter in model.parameters():
        parameter.data.mul_(2)
    torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("bias", [True, False])
def test_a_replica_of_data_parallel_computes(
    which: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies that nn.DataParallel makes for each device; here for one processor, twice."""
    model, x = adapted(which), torch.randn(4, 12)
    if not bias:
        for layer in model:
            layer.base_layer.bias = None
    monkeypatch.setattr(
        sys.modules["torch.nn.parallel.replicate"],
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    for replica in torch.nn.parallel.replicate(model, [0, 1]):
        torch.testing.assert_close(replica(x), model(x))


def test_unfrozen_matrices_of_vera_get_their_gradients() -> None:
    model, x = adapted("vera"), torch.randn(4, 12)
    for layer in model:
        layer.adapters["default"].vera_A.requires_grad_()
        layer.adapters["default"].vera_B.requires_grad_()
    fast, slow = outcome(model, x, False), outcome(model, x, True)
    assert "0.adapters.default.vera_A" in fast
    assert fast.keys() == slow.keys()
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name])


def test_a_base_weight_that_trains_gets_its_gradient() -> None:
    model, x = adapted(), torch.randn(4, 12)
    for layer in model:
        layer.base_layer.weight.requires_grad_()
    fast, slow = outcome(model, x, False), outcome(model, x, True)
    assert "0.base_layer.weight" in fast
    assert fast.keys() == slow.keys()
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name])


@pytest.mark.parametrize(
    "register",
    ["register_forward_pre_hook", "register_full_backward_hook", "register_full_backward_pre_hook"],
)
def test_every_kind_of_hook_on_the_layer_below_is_heard(register: str) -> None:
    model, heard = adapted(), []
    getattr(model[0].base_layer, register)(lambda *_: heard.append(1))
    model(torch.randn(4, 12, requires_grad=True)).sum().backward()
    assert heard


@pytest.mark.filterwarnings("ignore::UserWarning")  # nested tensors are a prototype
def test_nested_inputs_go_around_the_functions() -> None:
    view = adapted()[0].view
    assert possible(view, torch.randn(2, 12))
    nested = torch.nested.nested_tensor([torch.randn(2, 12), torch.randn(3, 12)])
    assert not possible(view, nested)


@pytest.mark.filterwarnings("ignore")  # the tracer's own
def test_a_trace_goes_around_the_functions() -> None:
    view, found = adapted()[0].view, []

    def look(x: Tensor) -> Tensor:
        found.append(possible(view, x))
        return x * 1

    torch.jit.trace(look, torch.randn(2, 12), check_trace=False)
    assert found == [False]


def test_autocast_leaves_float64_alone() -> None:
    model, x = adapted().double(), torch.randn(4, 12, dtype=torch.float64)
    wanted = outcome(model, x, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(model, x, False)
    assert found["y"].dtype == torch.float64
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("which", list(METHODS))
def test_no_tokens_give_gradients_of_zero(which: str) -> None:
    model = adapted(which, dropout=0.3)
    model(torch.empty(0, 12)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            assert not p.grad.any(), name


def test_off_is_off_for_its_own_thread_alone() -> None:
    model, x = adapted(), torch.randn(4, 12, requires_grad=True)
    with off():
        elsewhere: list[str] = []
        thread = threading.Thread(
            target=lambda: elsewhere.append(model(x).grad_fn.next_functions[0][0].name())
        )
        thread.start()
        thread.join()
        assert "LowRank" not in model(x).grad_fn.name()
    assert elsewhere == ["_LowRankBackward"]


def test_hooks_on_every_module_are_heard_by_the_layer_below() -> None:
    model, heard = adapted(), []
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: heard.append(module)
    ):
        model(torch.randn(4, 12))
    assert [layer.base_layer for layer in model] == [m for m in heard if type(m) is nn.Linear]


def test_hooks_on_the_layer_below_are_heard() -> None:
    model, heard = adapted(), []
    handle = model[0].base_layer.register_forward_hook(lambda *_: heard.append(1))
    x = torch.randn(4, 12)
    with_hook = model(x)
    assert heard == [1]
    handle.remove()
    torch.testing.assert_close(model(x), with_hook)
    assert heard == [1]


def test_a_replaced_forward_is_called() -> None:
    """accelerate fetches an offloaded weight in one."""
    model, heard = adapted(), []
    layer = model[0].base_layer
    original = layer.forward
    layer.forward = lambda x: (heard.append(1), original(x))[1]
    model(torch.randn(4, 12))
    assert heard == [1]


def test_per_sample_gradients() -> None:
    """torch.func goes around the Functions. In float64: how a processor sums does not show."""
    model, x = adapted().double(), torch.randn(5, 12).double()
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], one: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (one[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(own, x)
    for i in range(5):
        model.zero_grad()
        model(x[i : i + 1]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if name in own:
                torch.testing.assert_close(found[name][i], parameter.grad, rtol=1e-10, atol=1e-12)


def test_gradients_are_summed_in_float32() -> None:
    """Of 4,096 tokens in bfloat16: nearer the exact sum than bfloat16 could say."""
    model = adapted().to(torch.bfloat16)
    layer = model[0]
    adapter = layer.adapter("default").float()
    x = torch.randn(4096, 12).bfloat16()
    layer(x).sum().backward()
    B = (adapter.scaling * adapter.lora_B.detach()).to(torch.bfloat16).double()
    gh = (torch.ones(4096, 16).double() @ B).to(torch.bfloat16).double()
    wanted = gh.T @ x.double()
    assert adapter.lora_A.grad.dtype == torch.float32
    off = (adapter.lora_A.grad - wanted).abs().max() / wanted.abs().max()
    assert off < 1e-5 < torch.finfo(torch.bfloat16).eps / 8


def casts_of(model: nn.Module) -> list[int]:
    return [products._casts[layer.base_layer.weight][1].data_ptr() for layer in model]


def test_autocast_casts_a_frozen_weight_once() -> None:
    model, x = adapted(), torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.inference_mode():
            model(x)  # an evaluation first: its cast serves training
        first = casts_of(model)
        model(x).sum().backward()
        assert casts_of(model) == first
        before = model(x).detach()
        with torch.no_grad():
            model[0].base_layer.weight.mul_(2)
        after = model(x)
    assert casts_of(model)[0] != first[0]
    assert casts_of(model)[1] == first[1]
    assert not torch.equal(before, after)


def test_a_weight_in_memory_that_another_had_is_cast_anew() -> None:
    model, x = adapted(), torch.randn(4, 12)
    weight = model[0].base_layer.weight
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            before = model(x).detach()
            for _ in range(2):  # the second's memory is often the one before the first's
                weight.data = weight.data * 1.5
            assert not torch.equal(model(x), before)


def test_doras_lengths_are_exact_under_autocast() -> None:
    """Where the update takes most of W away, and its rounding would be most of what is left."""
    model = adapted("dora")
    adapter, base = model[0].adapter("default"), model[0].base_layer
    with torch.no_grad():
        base.weight.copy_(torch.randn(16, 3) @ torch.randn(3, 12))
        A = torch.linalg.svd(base.weight)[2][:3]
        adapter.lora_A.copy_(A)
        adapter.lora_B.copy_(-0.9 * base.weight @ A.T / adapter.scaling)
    wanted = (base.weight.double() + adapter.update().double()).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        factor = adapter.kernel(model[0].view).factor()
    found = adapter.lora_magnitude_vector / factor
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_merging_under_autocast_is_merging() -> None:
    alone, within = adapted(), adapted()
    lora.merge(alone)
    with torch.autocast("cpu", torch.bfloat16):
        lora.merge(within)
    for one, other in zip(alone, within):
        assert torch.equal(one.base_layer.weight, other.base_layer.weight)


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_meta_device_gives_shapes(which: str, dropout: float) -> None:
    model = adapted(which, dropout).to("meta")
    assert model(torch.empty(2, 5, 12, device="meta")).shape == (2, 5, 10)


@pytest.mark.parametrize("which", list(METHODS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_in_its_dtype_and_backward_within_it_too(
    which: str, dropout: float
) -> None:
    model, x = adapted(which, dropout), torch.randn(40, 12)
    truth = outcome(model, x, True)
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(model, x, False)
    assert found["y"].dtype == torch.bfloat16
    for name, wanted in truth.items():
        off = (found[name].float() - wanted).abs().max() / wanted.abs().max()
        assert off < 8 * torch.finfo(torch.bfloat16).eps, name
        assert name == "y" or found[name].dtype == torch.float32


@pytest.mark.parametrize(
    "which", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dora", "vera"))]
)
def test_training_with_dropout_compiles_to_one_graph(which: str) -> None:
    model, x = adapted(which, 0.3), torch.randn(8, 12)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.manual_seed(1)
    one = compiled(x)
    two = compiled(x)
    assert not torch.equal(one, two)  # the mask is no constant of the graph
    two.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
