"""The Triton kernels give what torch operations give, and compile without spilling registers.

A test that takes `device` runs on a GPU. Without one, test_in_the_interpreter runs all of them on
the CPU in Triton's interpreter, in another process: Triton reads the switch when it is imported.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora
from lora import nf4
from lora.kernels import triton
from lora.kernels.dropout import Mask, draw
from lora.kernels.products import dropped_product, thin_gradients

NO_TRITON = "NO TRITON, so its kernels are not tested: pip install -r requirements.txt on Linux"
compiler = pytest.importorskip("triton", reason=NO_TRITON)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lora.kernels.triton import dropout as dropout_kernels  # noqa: E402
from lora.kernels.triton import nf4 as nf4_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
slow = pytest.mark.slow
FLOATS = [torch.float32, pytest.param(torch.float16, marks=slow), torch.bfloat16]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The GPU, or the CPU in the interpreter. Kernels run on it."""
    if INTERPRETED:
        monkeypatch.setattr(triton, "usable", lambda device: True)
        monkeypatch.setattr(dropout_kernels, "programs", lambda device: 8)
        yield torch.device("cpu")
    elif torch.cuda.is_available():
        assert triton.usable(torch.device("cuda", 0))
        yield torch.device("cuda", 0)
    else:
        pytest.skip("no GPU; test_in_the_interpreter runs this on the CPU")


@pytest.fixture(params=FLOATS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if INTERPRETED and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bfloat16 and multiplies it wrongly")
    assert isinstance(request.param, torch.dtype)
    return request.param


@contextmanager
def plain() -> Iterator[None]:
    """Inside, ordinary torch operations run in place of the kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "usable", lambda device: False)
        yield


def spy(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[str]:
    """A list that grows by a function's name whenever it is called."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(module, name, watched(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=slow)])
def test_in_the_interpreter(which: str) -> None:
    """The tests below, on the CPU."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("the tests below run here")
    options = ["-q", "-x", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-m", which, "-k", "on_the_device", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-6000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 15


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((33, 72), 64),  # a short last block
        ((300, 16), 48),  # no power of 2
        ((9000,), 8192),  # longer than a program's part
        pytest.param((64, 48), 64, marks=slow),
        pytest.param((8,), 64, marks=slow),
    ],
)
def test_nf4_is_bit_equal_on_the_device(
    shape: tuple[int, ...], block_size: int, double_quant: bool, dtype: torch.dtype,
    device: torch.device, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    generator = torch.Generator(device="cpu").manual_seed(0)
    w = torch.randn(shape, generator=generator, device="cpu").to(device)
    q = nf4.quantize(w, block_size, double_quant)
    calls = spy(monkeypatch, nf4_kernels, "write_values")
    values = nf4.dequantize(q, dtype)
    assert calls == ["write_values"]
    assert torch.equal(values, nf4.reference(q).to(dtype))


@pytest.mark.parametrize("shape", [(5, 8), (5, 7)])
def test_nf4_writes_into_a_given_tensor_on_the_device(
    shape: tuple[int, int], device: torch.device
) -> None:
    q, count = nf4.quantize(torch.randn(shape, device=device)), math.prod(shape)
    memory = torch.zeros(count + 5, device=device)
    out = memory[2 : count + 2].view(shape)
    assert nf4.dequantize(q, out=out) is out
    assert torch.equal(out, nf4.reference(q))
    assert memory[:2].tolist() == [0, 0]
    assert memory[count + 2 :].tolist() == [0, 0, 0]


@pytest.mark.parametrize("case", ["odd count", "odd block", "odd start", "empty"])
def test_nf4_of_no_whole_words_is_computed_plainly_on_the_device(
    case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"odd count": (33, 65), "empty": (0, 4)}.get(case, (33, 72))
    q = nf4.quantize(torch.randn(shape, device=device), 36 if case == "odd block" else 64)
    calls = spy(monkeypatch, nf4_kernels, "write_values")
    if case == "odd start":  # of the codes in their memory
        q = replace(q, codes=torch.cat([q.codes[:1], q.codes])[1:])
    assert torch.equal(nf4.dequantize(q), nf4.reference(q))
    assert calls == (["write_values"] if case == "empty" else [])


@pytest.mark.parametrize(
    ("p", "shape"),
    [(0.1, (5, 7, 12)), (0.5, (17, 4100)), (1e-9, (1, 8)), (1 - 2**-16, (1, 8)), (0.5, (0, 8))],
)
def test_a_mask_is_the_cpus_of_the_same_seed_on_the_device(
    p: float, shape: tuple[int, ...], device: torch.device, 
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    calls = spy(monkeypatch, dropout_kernels, "draw_bits")
    torch.manual_seed(3)
    masks = [draw(p, torch.empty(shape, device=device)) for _ in range(2)]
    assert calls == ["draw_bits"] * 2
    torch.manual_seed(3)
    with plain():
        expected = [draw(p, torch.empty(shape, device="cpu")) for _ in range(2)]
    for mask, same in zip(masks, expected, strict=True):
        assert mask.p == p
        assert torch.equal(mask.bits.cpu(), same.bits)


def test_a_width_of_no_whole_words_has_a_mask_on_the_device(device: torch.device) -> None:
    x = torch.ones(100, 7, device=device)
    assert 0.3 < draw(0.5, x).keep(x).mean().item() < 0.7


def thin_case(
    tokens: int, width: int, ranks: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, list[tuple[Tensor, Tensor]], Mask]:
    """x (tokens, width), pairs of gh (tokens, r) and A (r, width), and a mask."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    pairs = [
        (
            torch.randn(tokens, rank, dtype=dtype, device=device),
            torch.randn(rank, width, dtype=dtype, device=device),
        )
        for rank in ranks
    ]
    return x, pairs, draw(0.3, x)


def assert_near(result: Tensor | None, expected: Tensor | None, terms: int) -> None:
    """Equal up to the rounding of a sum of so many products."""
    assert result is not None
    assert expected is not None
    assert result.dtype == expected.dtype
    near = 4 * torch.finfo(result.dtype).eps * terms**0.5
    torch.testing.assert_close(result, expected, rtol=near, atol=near)


SHAPES = [
    (37, 68, [16]),
    pytest.param(1, 8, [3], marks=slow),
    pytest.param(70, 36, [1], marks=slow),
    pytest.param(20, 12, [64], marks=slow),
]


@pytest.mark.parametrize(("tokens", "width", "ranks"), SHAPES)
def test_the_product_with_a_mask_on_the_device(
    tokens: int, width: int, ranks: list[int], dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, [(_, A)], mask = thin_case(tokens, width, ranks, dtype, device)
    x[mask.keep(x) == 0] = torch.inf  # a dropped element counts as 0
    calls = spy(monkeypatch, dropout_kernels, "mask_product")
    h = dropped_product(x, A, mask)
    assert calls == ["mask_product"]
    with plain():
        assert_near(h, dropped_product(x, A, mask), width)


@pytest.mark.parametrize(("tokens", "width", "ranks"), [*SHAPES, (37, 36, [16, 16])])
def test_the_gradients_with_a_mask_on_the_device(
    tokens: int, width: int, ranks: list[int], dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, thin, mask = thin_case(tokens, width, ranks, dtype, device)
    x[mask.keep(x) == 0] = torch.inf
    calls = spy(monkeypatch, dropout_kernels, "grad_of_factor", "grad_of_input")
    gA, gx = thin_gradients(thin, x, mask, True)
    assert calls == ["grad_of_factor", "grad_of_input"]
    with plain():
        expected_gA, expected_gx = thin_gradients(thin, x, mask, True)
    assert_near(gA, expected_gA, tokens)
    assert_near(gx, expected_gx, sum(ranks))


def test_an_input_of_another_dtype_on_the_device(device: torch.device) -> None:
    """As under autocast: x in float32, products in 16 bits."""
    x, thin, mask = thin_case(20, 24, [8], torch.float16, device)
    gA, gx = thin_gradients(thin, x.float(), mask, False)
    assert gx is None
    with plain():
        assert_near(gA, thin_gradients(thin, x.float(), mask, False)[0], 20)


@pytest.mark.parametrize("rows", ["too wide", "float64", "empty"])
def test_what_no_kernel_takes_is_computed_plainly_on_the_device(
    rows: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = torch.float64 if rows == "float64" else torch.float32
    tokens, rank = (0 if rows == "empty" else 20), (200 if rows == "too wide" else 4)
    x, thin, mask = thin_case(tokens, 8, [rank], dtype, device)
    calls = spy(monkeypatch, dropout_kernels, "mask_product", "grad_of_factor", "grad_of_input")
    h, (gA, gx) = dropped_product(x, thin[0][1], mask), thin_gradients(thin, x, mask, True)
    assert calls == []
    assert h.shape == (tokens, rank)
    assert gA is not None
    assert gA.shape == (rank, 8)
    assert gx is not None
    assert gx.shape == (tokens, 8)


@pytest.mark.parametrize(
    ("method", "expected_calls"),
    [
        ("lora", {"draw_bits", "mask_product", "grad_of_factor", "grad_of_input"}),
        pytest.param(
            "pissa on nf4",
            {"draw_bits", "mask_product", "grad_of_factor", "grad_of_input"},
            marks=slow,
        ),
        pytest.param("vera", {"draw_bits", "mask_product", "grad_of_input"}, marks=slow),
        pytest.param("dora", {"draw_bits", "grad_of_factor"}, marks=slow),
    ],
)
def test_a_layer_under_an_adapter_on_the_device(
    method: str, expected_calls: set[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 4)).to(device)
    if method == "vera":
        config: Any = lora.VeRAConfig(r=8, vera_dropout=0.3, target_modules="all-linear")
    else:
        kind = lora.DoRAConfig if method == "dora" else lora.LoRAConfig
        start = {"init_lora_weights": "pissa"} if "pissa" in method else {}
        config = kind(r=4, lora_dropout=0.3, target_modules="all-linear", **start)
    lora.inject(model, config, pack=["0", "1"] if "nf4" in method else None)
    lora.testing.perturb(model)
    model.train()

    def outcome() -> dict[str, Tensor]:
        torch.manual_seed(1)
        x = torch.ones(20, 16, device=device, requires_grad=True)
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert x.grad is not None
        return {"y": y.detach(), "x": x.grad, **grads}

    calls = spy(
        monkeypatch, dropout_kernels, "draw_bits", "mask_product", "grad_of_factor", "grad_of_input"
    )
    result = outcome()
    assert set(calls) == expected_calls
    with lora.kernels.off():
        expected = outcome()
    assert result.keys() == expected.keys()
    for name, value in result.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@slow
def test_a_cpu_never_loads_triton() -> None:
    code = """
import sys, torch, lora
from torch import nn
model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
lora.inject(model, lora.LoRAConfig(lora_dropout=0.5, target_modules="all-linear"), pack=["0"])
model.train()(torch.ones(3, 8)).sum().backward()
assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_where_no_kernel_runs_a_warning_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU machine without a C compiler."""
    if INTERPRETED:
        pytest.skip("there a kernel runs")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    device = torch.device("cpu")  # where a compiled kernel cannot run
    triton._works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="cannot run a kernel on cpu: .*Install a C compiler"):
            assert not triton._works(device)
        assert not triton._works(device)  # filterwarnings = error
    finally:
        triton._works.cache_clear()


def test_what_follows_every_operation_gets_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_works", lambda device: True)
    gpu = torch.device("cuda", 0)
    assert triton.usable(gpu)
    assert not triton.usable(torch.device("cpu"))
    with FakeTensorMode():
        assert not triton.usable(gpu)
    seen = []
    torch.func.vmap(lambda x: seen.append(triton.usable(gpu)) or x)(torch.ones(2))
    assert seen == [False]


def compiled(
    function: Any, types: str, constants: dict[str, int], capability: int, **options: Any
) -> Any:
    """A kernel compiled for a GPU that need not be here. Sizes and pointers are multiples of 16,
    but what `constants` names."""
    names = function.arg_names
    types_by_name = {n: t for n, t in zip(names, types.split()) if n not in constants}
    signature = {name: types_by_name.get(name, "constexpr") for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in types_by_name.items()
        if type_ != "i64"
    }
    source = ASTSource(
        function, signature, {(names.index(n),): v for n, v in constants.items()}, divisible
    )
    return compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_no_spill(kernel: Any, folder: Path) -> None:
    """A kernel that keeps values on the stack ran out of registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    registers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert registers is not None, usage
    assert int(registers[2]) == 0, usage
    assert kernel.metadata.shared <= 99 * 1024  # of an RTX 30 or 40


CAPABILITIES = [pytest.param(80, marks=slow), 90]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("out", ["bf16", pytest.param("fp32", marks=slow)])
@pytest.mark.parametrize("nested", [pytest.param(0, marks=slow), 256])
def test_dequantization_keeps_to_registers(
    capability: int, out: str, nested: int, tmp_path: Path
) -> None:
    needs_a_compiler()
    types = f"*{'u8' if nested else 'fp32'} *fp32 *fp32 *fp32 *fp32 *{out} i32 i32"
    constants = {"NESTED": nested, "WORDS": nf4_kernels.WORDS_PER_PROGRAM}
    kernel = compiled(
        nf4_kernels._write_values, f"*i32 {types}", constants, capability, enable_fp_fusion=False
    )
    assert_no_spill(kernel, tmp_path)
    assert ".f32" in kernel.asm["ptx"]
    assert "fma" not in kernel.asm["ptx"]  # which rounds once, where torch rounds twice


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_drawing_keeps_to_registers(capability: int, tmp_path: Path) -> None:
    needs_a_compiler()
    types, constants = "*i64 i64 i32 i32 i32", {"COLUMNS": dropout_kernels.COLUMNS}
    kernel = compiled(dropout_kernels._draw, types, constants, capability, enable_fp_fusion=False)
    assert_no_spill(kernel, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("_mask_product", marks=slow),
        pytest.param("_grad_of_input", marks=slow),
        "_grad_of_factor",  # which needs the most registers
    ],
)
@pytest.mark.parametrize(
    ("dtype", "rank"),
    [
        (torch.bfloat16, 128),
        pytest.param(torch.bfloat16, 16, marks=slow),
        pytest.param(torch.bfloat16, 64, marks=slow),
        pytest.param(torch.float32, 16, marks=slow),
        pytest.param(torch.float32, 64, marks=slow),
    ],
)
def test_products_keep_to_registers(
    capability: int, name: str, dtype: torch.dtype, rank: int, tmp_path: Path
) -> None:
    needs_a_compiler()
    x = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    out = "*fp32" if name == "_grad_of_factor" else x
    sizes = "i32 i32 i32 i32" + ("" if name == "_grad_of_input" else " i32")
    types, options = f"{x} {x} *i16 {out} {sizes}", dropout_kernels._options(rank, dtype)
    constants = {key: options.pop(key) for key in ("GROUPS", "INPUTS", "RANK")}
    function = getattr(dropout_kernels, name)
    assert_no_spill(compiled(function, types, constants, capability, **options), tmp_path)
    if rank == 16:  # Triton compiles a size that is 1 in
        ones = constants | {"tokens": 1, "groups": 1, "rank": 1}
        assert_no_spill(compiled(function, types, ones, capability, **options), tmp_path)


def needs_a_compiler() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter compiles nothing")
