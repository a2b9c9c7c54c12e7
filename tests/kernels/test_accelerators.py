"""What kernels do on an accelerator: on CUDA if there is one, else on tensors without values."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import llama
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora
from lora import kernels
from lora.finetune.generate import Writing, written
from lora.kernels import adapters_constant, off, products
from lora.kernels.dora import DoRAKernel
from lora.kernels.products import factor_pairs, summed
from lora.layers import views


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the name of every operation inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[Operations]:
    """Inside, tensors may be on CUDA without CUDA: they have no values."""
    with FakeTensorMode(allow_non_fake_inputs=True), Operations() as operations:
        yield operations


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_float32_without_a_copy_in_it(dtype: torch.dtype) -> None:
    with fake_cuda() as operations:
        left, right = (torch.empty(600, width, dtype=dtype, device="cuda") for width in (4, 96))
        operations.names.clear()
        assert summed(left, right).dtype == torch.float32
    assert [name for name in operations.names if "prim" not in name] == [
        "aten.t.default", "aten.mm.dtype",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summed_is_the_sum(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    left, right = (torch.randn(600, width, device=device).to(dtype) for width in (4, 400))
    expected = left.double().t() @ right.double()
    product = summed(left, right)
    assert product.dtype == torch.float32
    assert (product - expected).abs().max() < 1e-4 * expected.abs().max()


def test_16_bit_factors_on_a_gpu_have_a_multiple_of_8_rows() -> None:
    """cuBLAS takes two to three times as long otherwise."""
    with fake_cuda():
        A, B = torch.empty(5, 24, device="cuda"), torch.empty(16, 5, device="cuda")
        for dtype, rank in ((torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 5)):
            ((left, right),) = factor_pairs(A, B, 2.0, None, dtype)
            assert (left.shape, right.shape) == ((rank, 24), (rank, 16))
    ((left, _),) = factor_pairs(torch.ones(5, 24), torch.ones(16, 5), 2.0, None, torch.bfloat16)
    assert len(left) == 5


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_added_rows_change_no_output_and_no_gradient(
    dropout: float, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = lora.METHODS["dora" if "use_dora" in more else "lora"].Config
    settings = {name: value for name, value in more.items() if name != "use_dora"}
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(24, 16))
    lora.inject(layer, kind(r=5, target_modules="all-linear", lora_dropout=dropout, **settings))
    lora.testing.perturb(layer)
    x, results = torch.randn(7, 24, requires_grad=True), []
    for padded in (False, True):
        monkeypatch.setattr(products, "_rows_to_add", lambda A, dtype, n=3 * padded: n)
        torch.manual_seed(1)
        y = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
    torch.testing.assert_close(*results)


def test_dora_asks_an_accelerator_for_no_value() -> None:
    """Which rows cancelled is a value, for which the CPU would wait at every layer."""
    (view,) = views(nn.Linear(12, 16))
    with fake_cuda() as operations, torch.no_grad():
        W, A, B, m = (torch.empty(s, device="cuda") for s in ((16, 12), (2, 12), (16, 2), (16,)))
        operations.names.clear()
        assert DoRAKernel(view, A, B, 1.0, m).lengths(W).shape == (16,)
    assert operations.names
    assert not {"aten.nonzero.default", "aten._local_scalar_dense.default"} & {*operations.names}


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_never_waits_for_the_device(method: str, dropout: float) -> None:
    kind = lora.METHODS[method].Config
    more = {"lora_dropout": dropout} if hasattr(kind, "lora_dropout") else {}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).cuda()
    lora.inject(model, kind(target_modules="all-linear", **more))
    x = torch.randn(32, 64, device="cuda")
    model(x).sum().backward()  # makes what is made once
    try:
        torch.cuda.set_sync_debug_mode("error")
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_another_thread(loss: Tensor) -> list[BaseException]:
    """Runs backward as CUDA's does: in a thread without the caller's ContextVars."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def test_off_holds_in_the_backward_of_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation checkpointing computes layers again there, and must save the same tensors."""
    monkeypatch.setattr(products, "has_own_thread", lambda x: True)
    layer = nn.Sequential(nn.Linear(12, 16))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))
    x = torch.randn(7, 12, requires_grad=True)
    with off():
        y = checkpoint(layer, x, use_reentrant=False)
        assert in_another_thread(y.square().sum()) == []
    y = checkpoint(layer, x, use_reentrant=False)
    assert in_another_thread(y.square().sum()) == []


def test_off_does_not_reach_the_backward_of_another_caller() -> None:
    """One thread compares with the specification while another trains."""
    layer = nn.Sequential(nn.Linear(12, 16))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))
    y = checkpoint(layer, torch.randn(7, 12, requires_grad=True), use_reentrant=False)
    with off():
        assert in_another_thread(y.square().sum()) == []


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_checkpointed_layers_train_on_every_device(kernels: str, device: torch.device) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 16)).to(device)
    lora.inject(layer, lora.LoRAConfig(r=2, lora_dropout=0.2, target_modules="all-linear"))
    lora.testing.perturb(layer)
    x = torch.randn(7, 12, device=device, requires_grad=True)
    gradients = []
    for again in (False, True):
        torch.manual_seed(1)
        with off() if kernels == "off" else torch.enable_grad():
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_unchanged_adapters_make_their_factors_once(method: str, device: torch.device) -> None:
    """Each token of a text would else start small operations at every layer."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(12, 16)).to(device)
    lora.inject(layer, lora.METHODS[method].Config(r=2, target_modules="all-linear"))
    layer.eval()
    x = torch.randn(7, 12, device=device)
    for _ in range(2):
        lora.testing.perturb(layer)
        with off():
            expected = layer(x)
        names = []
        with torch.inference_mode(), adapters_constant():
            for _ in range(2):
                with Operations() as operations:
                    torch.testing.assert_close(layer(x), expected)
                names.append([name for name in operations.names if name == "aten.mul.out"])
        assert [len(each) for each in names] == [1, 0]


def test_a_hook_runs_that_is_set_while_adapters_are_constant() -> None:
    layer = nn.Sequential(nn.Linear(12, 16))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))
    x, shapes = torch.randn(7, 12), []
    with torch.inference_mode(), adapters_constant():
        layer(x)
        layer[0].base_layer.register_forward_hook(lambda _, __, y: shapes.append(y.shape))
        layer(x)
    assert shapes == [(7, 16)]


def test_adapters_that_are_constant_follow_a_new_base_layer() -> None:
    layer = nn.Sequential(nn.Linear(12, 16))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))
    x = torch.randn(7, 12)
    with torch.inference_mode(), adapters_constant():
        layer(x)
        layer[0].base_layer = nn.Linear(12, 16)
        found = layer(x)
    torch.testing.assert_close(found, layer(x))


def test_writing_promises_that_the_adapter_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[bool] = []
    model = llama()
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=("q_proj",)))
    real = model.generate

    def generate(**more: Any) -> Any:
        entered.append(products.KEPT.get() is not None)
        return real(**more)

    monkeypatch.setattr(model, "generate", generate)
    tokenizer = SimpleNamespace(
        eos_token_id=2, pad_token_id=0, batch_decode=lambda rows, **_: ["" for _ in rows]
    )
    written(model, tokenizer, [[5, 6]], Writing(max_new_tokens=3))
    assert entered == [True]
    assert products.KEPT.get() is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_constant_adapters_give_the_bits_of_others(
    packed: bool, bias: bool, autocast: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 128, bias=bias))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))
    lora.inject(layer, lora.LoRAConfig(r=4, target_modules="all-linear"), name="other")
    if packed:
        base = lora.nf4.NF4Linear.of(layer[0].base_layer)
        layer[0].base_layer = base
    layer.to(device).eval()
    lora.testing.perturb(layer)

    def outputs(x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for name in ("default", "other"):
            lora.activate(layer, name)
            found += [layer(x), layer(x[:1]), layer(x.double().float())]
            with lora.disabled(layer):
                found.append(layer(x))
            with off():
                found.append(layer(x))
        lora.activate(layer, "default", "other")
        return [*found, layer(x)]

    x = torch.randn(3, 5, 64, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        expected = outputs(x)
        with adapters_constant():
            for _ in range(2):
                assert all(map(torch.equal, outputs(x), expected))


def test_constant_adapters_drop_inputs_while_they_train() -> None:
    layer = nn.Sequential(nn.Linear(64, 128))
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear", lora_dropout=0.5))
    lora.testing.perturb(layer)
    x = torch.randn(3, 64)
    with torch.inference_mode(), adapters_constant():
        plain = layer.eval()(x)
        assert not torch.equal(layer.train()(x), plain)
        assert torch.equal(layer.eval()(x), plain)


def test_constant_adapters_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Sequential(nn.Linear(64, 128)).eval()
    lora.inject(layer, lora.LoRAConfig(r=2, target_modules="all-linear"))

    def attempt(*_: Any) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(kernels, "attempt", attempt)
    with torch.inference_mode(), adapters_constant():
        assert layer(torch.randn(3, 64)).shape == (3, 128)
    with torch.inference_mode(), pytest.raises(AssertionError, match="the long way"):
        layer(torch.randn(3, 64))
