"""Every method keeps every clause, and the clauses catch what they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lora
import lora.methods
from benchmarks import methods
from lora.adapter import Adapter
from lora.kernels.dropout import Mask, draw, drop
from lora.kernels.products import possible
from lora.layers import View, apply
from lora.method import METHODS
from lora.methods.lora import LoRA, LoRAConfig
from lora.testing import CLAUSES, Case, cases, check_method, run_clause

CASES = cases()


# Every kind of layer, every dtype, with and without a bias, packed and not: each pair of these that
# has a branch of its own in the code. The slow tests run every case.
QUICK = [
    Case("Linear", True, torch.float32),
    Case("Linear", False, torch.bfloat16),
    Case("Linear", True, torch.float16),
    Case("NF4Linear", True, torch.float32),
    Case("NF4Linear", False, torch.bfloat16),
    Case("Embedding", False, torch.float32),
    Case("Conv1D", True, torch.bfloat16),
]
# The variants of a method run with the slow tests; its own settings run with every change.
RUNS = [(label, QUICK) for label in methods.settings() if " " not in label]
RUNS += [
    pytest.param(label, CASES, marks=pytest.mark.slow, id=f"{label}, all cases")
    for label in methods.settings()
]
CELLS = methods.read_cells(methods.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("clause", list(CLAUSES))
@pytest.mark.parametrize(("label", "chosen"), RUNS)
def test_every_method_keeps_every_clause(label: str, chosen: list[Case], clause: str) -> None:
    found = methods.outcomes(label, clause, chosen)
    assert not [outcome for outcome in found if outcome.startswith("failed")]
    assert CELLS[label, clause] == methods.cell(found), "run python -m benchmarks.methods"
    if "passed" not in found:
        pytest.skip("; ".join(found))


def test_the_page_of_the_methods_is_what_the_code_makes_of_it() -> None:
    text = methods.PAGE.read_text(encoding="utf-8")
    assert methods.page(CELLS) == text, "run python -m benchmarks.methods"


def test_every_kind_of_layer_is_a_case() -> None:
    assert {case.kind for case in CASES} == {"Linear", "Conv1D", "Embedding", "NF4Linear"}


def test_the_report_is_a_table_of_clauses() -> None:
    text = str(check_method(METHODS["full"]))
    assert all(clause in text for clause in CLAUSES)
    assert "exempt: the original weights are not kept" in text


def broken(change: Callable[[type[LoRA]], None]) -> type[LoRA]:
    """LoRA with one thing wrong; it declares no name in its body, so that nothing registers it."""

    class Broken(LoRA):
        def compute(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
            kernel = super().kernel(view)
            return kernel.fused(x, mask) if possible(view, x) else kernel.composed(x, mask)

        def added(self, view: View, x: Tensor, mask: Mask | None) -> Tensor:
            return super().kernel(view).delta(x, mask)

        def kernel(self, view: View) -> Road:
            return Road(self, view)

    Broken.name = "broken"
    Broken.Config = BrokenConfig
    change(Broken)
    return Broken


class BrokenConfig(LoRAConfig):
    pass


@dataclass(frozen=True)
class Road:
    """A kernel whose every road is what a mutation made of the method's compute() and added()."""

    adapter: Any
    view: View

    def fused(self, x: Tensor, mask: Mask | None) -> Tensor:
        return self.adapter.compute(self.view, x, mask)

    composed = fused

    def delta(self, x: Tensor, mask: Mask | None) -> Tensor:
        return self.adapter.added(self.view, x, mask)


def wrong_scaling(cls: type[LoRA]) -> None:
    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        dropped = drop(x, mask)
        y: Tensor = (
            view.module(x) + (dropped.to(self.lora_A.dtype) @ self.lora_A.T) @ self.lora_B.T * 2
        )
        return y.to(x.dtype)

    cls.compute = compute


def noisy_start(cls: type[LoRA]) -> None:
    def fill(self: LoRA, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.lora_A.normal_(generator=generator("lora_A"))
        self.lora_B.normal_(generator=generator("lora_B"))

    cls.fill = fill


def global_random_start(cls: type[LoRA]) -> None:
    def fill(self: LoRA, view: View, generator: Callable[[str], torch.Generator]) -> None:
        self.lora_A.normal_()
        self.lora_B.zero_()

    cls.fill = fill


def dropped_bias(cls: type[LoRA]) -> None:
    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        W, _ = view.read()
        dropped = drop(x, mask)
        h = dropped.to(self.lora_A.dtype) @ self.lora_A.T
        y: Tensor = x @ W.T + (self.scaling * h @ self.lora_B.T).to(x.dtype)
        return y

    cls.compute = compute


def ignored_mask(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: good(self, view, x, None)


def detached_factor(cls: type[LoRA]) -> None:
    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        dropped = drop(x, mask).to(self.lora_A.dtype)
        h = dropped @ self.lora_A.detach().T
        return (view.module(x) + self.scaling * h @ self.lora_B.T).to(x.dtype)

    cls.compute = compute


def float32_output(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: good(self, view, x, mask).float()


def unscaled(cls: type[LoRA]) -> None:
    good = cls.added
    cls.added = lambda self, view, x, mask: good(self, view, x, mask) / self.scaling


def skewed_in_sixteen_bits(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: (
        good(self, view, x, mask) * (1.05 if x.dtype.itemsize == 2 else 1)
    )


def base_alone_under_autocast(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: (
        view.module(x) if torch.is_autocast_enabled("cpu") else good(self, view, x, mask)
    )


def deaf(cls: type[LoRA]) -> None:
    cls.compute = lambda self, view, x, mask: apply(view, x, *self.merged(*view.read()))


def doubled_in_training(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: (
        good(self, view, x, mask) * (2 if self.training and mask is None else 1)
    )


def cut_to_five(cls: type[LoRA]) -> None:
    good = cls.compute

    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        y = good(self, view, x, mask)
        return torch.cat([y[..., :5, :], y[..., 5:, :] * 0], dim=-2) if y.dim() > 1 else y

    cls.compute = compute


def false_to_the_sum(cls: type[LoRA]) -> None:
    cls.merged = lambda self, W, b: (W * 1.5 + self.scaling * self.lora_B @ self.lora_A, b)


def weight_alone(cls: type[LoRA]) -> None:
    good = cls.merged
    cls.merged = lambda self, W, b: good(self, W, b)[0]


def one_row(cls: type[LoRA]) -> None:
    good = cls.merged
    cls.merged = lambda self, W, b: (good(self, W, b)[0][:1], b)


def miscounted(cls: type[LoRA]) -> None:
    cls.size = classmethod(lambda cls, view, config, module: config.r * view.in_features)


def merges_into_the_base(cls: type[LoRA]) -> None:
    good = cls.compute

    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        y = good(self, view, x, mask)
        with torch.no_grad():
            view.parameters()[0].mul_(1.0009765625)
        return y

    cls.compute = compute


class Doubled(torch.autograd.Function):
    """x, and twice its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return 2 * gradient


def doubled_gradient(when: Callable[[Tensor], bool]) -> Callable[[type[LoRA]], None]:
    def change(cls: type[LoRA]) -> None:
        good = cls.compute

        def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
            found = good(self, view, x, mask)
            return Doubled.apply(found) if when(x) else found

        cls.compute = compute

    return change


doubled_in_sixteen_bits = doubled_gradient(lambda x: x.dtype.itemsize == 2)
doubled_in_float32 = doubled_gradient(lambda x: x.dtype == torch.float32)
doubled_under_autocast = doubled_gradient(lambda x: torch.is_autocast_enabled("cpu"))


def input_detached_in_training(cls: type[LoRA]) -> None:
    good = cls.compute
    cls.compute = lambda self, view, x, mask: good(
        self, view, x.detach() if self.training else x, mask
    )


def mask_lost_on_the_road_of_several(cls: type[LoRA]) -> None:
    good = cls.added

    def compute(self: LoRA, view: View, x: Tensor, mask: Mask | None) -> Tensor:
        y: Tensor = view.module(x)
        return (y + good(self, view, x, mask)).to(y.dtype)

    cls.compute = compute
    cls.added = lambda self, view, x, mask: good(self, view, x, None)


def one_mask_for_ever(cls: type[LoRA]) -> None:
    def draw_mask(self: LoRA, x: Tensor, again: bool = False) -> Mask | None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return draw(self.dropout, x, again) if self.drops(x) else None

    cls.draw_mask = draw_mask


def reseeds_the_process(cls: type[LoRA]) -> None:
    def fill(self: LoRA, view: View, generator: Callable[[str], torch.Generator]) -> None:
        torch.manual_seed(generator("lora_A").initial_seed())
        self.lora_A.normal_()
        self.lora_B.zero_()

    cls.fill = fill


@pytest.mark.parametrize(
    ("mutation", "clause"),
    [
        (doubled_in_sixteen_bits, "gradients_in_its_dtype"),
        (doubled_in_float32, "gradients_in_its_dtype"),
        (doubled_under_autocast, "gradients_in_its_dtype"),
        (input_detached_in_training, "fast_is_specification"),
        (mask_lost_on_the_road_of_several, "fast_is_specification"),
        (one_mask_for_ever, "dropout_is_the_mask_alone"),
        (reseeds_the_process, "same_seed_same_bits"),
        (wrong_scaling, "fast_is_specification"),
        (wrong_scaling, "merged_is_forward"),
        (noisy_start, "identity_at_the_start"),
        (global_random_start, "same_seed_same_bits"),
        (dropped_bias, "fast_is_specification"),
        (dropped_bias, "identity_at_the_start"),
        (ignored_mask, "dropout_is_the_mask_alone"),
        (detached_factor, "fast_is_specification"),
        (detached_factor, "only_the_adapter_trains"),
        (float32_output, "output_dtype"),
        (miscounted, "parameter_count"),
        (unscaled, "fast_is_specification"),
        (skewed_in_sixteen_bits, "sixteen_bits_stay_near_float32"),
        (base_alone_under_autocast, "output_dtype"),
        (doubled_in_training, "dropout_is_the_mask_alone"),
        (cut_to_five, "fast_is_specification"),
        (false_to_the_sum, "active_together"),
        (merges_into_the_base, "base_bits_stay"),
        (deaf, "a_hook_below_runs_once"),
    ],
)
def test_a_clause_catches_the_fault_it_is_for(
    mutation: Callable[[type[LoRA]], None], clause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = broken(mutation)
    monkeypatch.setitem(METHODS, "broken", cls)
    outcomes = [
        run_clause(clause, cls, BrokenConfig(r=3, lora_alpha=7.0), case).outcome for case in CASES
    ]
    assert any(outcome.startswith("failed") for outcome in outcomes)


def test_check_method_names_the_clause_and_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    cls = broken(noisy_start)
    monkeypatch.setitem(METHODS, "broken", cls)
    with pytest.raises(
        lora.errors.ContractError, match=r"identity_at_the_start \(Linear, float32\)"
    ):
        check_method(cls)


@pytest.mark.parametrize(
    ("mutation", "reason"),
    [
        (weight_alone, r"must return a pair, (W', b'), found Tensor"),
        (one_row, "returns a W' of (1, "),
    ],
)
def test_what_merged_returns_is_said(
    mutation: Callable[[type[LoRA]], None], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls = broken(mutation)
    monkeypatch.setitem(METHODS, "broken", cls)
    config = BrokenConfig(r=3, lora_alpha=7.0)
    found = run_clause("identity_at_the_start", cls, config, CASES[0]).outcome
    assert reason in found


def test_a_file_dropped_in_is_a_method(tmp_path: object) -> None:
    """What methods/ promises: a subclass with a name and a Config is all there is to register."""
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class ScaleConfig(lora.AdapterConfig):
        pass

    class Scale(Adapter):
        """W' = (1 + g) W with one trained g per output."""

        name, paper, Config, peft_type = "scale_test", "none", ScaleConfig, "SCALE_TEST"

        def __init__(self, view: View, config: ScaleConfig, module: str) -> None:
            super().__init__(view, config, module)
            self.gain = self.new(view, view.out_features, 1)

        @classmethod
        def size(cls, view: View, config: ScaleConfig, module: str) -> int:
            return view.out_features

        def fill(self, view: View, generator: Callable[[str], torch.Generator]) -> None:
            self.gain.zero_()

        def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return (1 + self.gain) * W, b

    try:
        check_method(Scale)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        lora.inject(model, ScaleConfig())
        lora.inject(model, LoRAConfig(r=1), name="other")
        with pytest.raises(lora.MergeError, match="deltas of scale_test do not add up"):
            lora.activate(model, "default", "other")
    finally:
        del METHODS["scale_test"]


def test_hira_shows_that_a_new_method_is_cheap() -> None:
    """Under 60 lines, its settings and imports with it."""
    assert len((methods.PAGE.parents[1] / "lora/methods/hira.py").read_text().splitlines()) < 60
