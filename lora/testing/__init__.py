"""Tests a method against the contract: `check_method(MyMethod)` runs every clause on every case.

A case is a kind of layer, with or without bias, in a dtype. A clause raises ContractError, or
returns. If a method is exempt from a clause, the report shows the reason that the method gives.

    >>> print(lora.testing.check_method(lora.METHODS["lora"]))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lora.adapter import Adapter
from lora.errors import ContractError
from lora.method import Method, method_of
from lora.settings import AdapterConfig, MethodConfig
from lora.testing import _equation, _reversal, _saving, _training
from lora.testing._requirements import require
from lora.testing._requirements import snapshot as snapshot
from lora.testing._requirements import unchanged as unchanged
from lora.testing._toys import Case as Case
from lora.testing._toys import cases as cases
from lora.testing._toys import perturb as perturb
from lora.testing._toys import trains


def check_method(
    method: type[Method], config: MethodConfig | None = None, device: str = "cpu"
) -> ContractReport:
    """Check every clause on every case on the device, and return the report.

    `config` is by default the method's `example`. To test other settings, such as the method's
    `variants`, call this once for each. Raises ContractError listing every clause and case that
    failed.
    """
    config = config or method.Config(**method.example)
    require(method_of(config) is method, f"{method.name}: its Config belongs to another method")
    report = ContractReport(
        method.name,
        tuple(run_clause(name, method, config, case) for name in CLAUSES for case in cases(device)),
    )
    failed = [r for r in report.results if r.outcome.startswith("failed")]
    if failed:
        lines = [f"{r.clause} ({r.case}): {r.outcome.removeprefix('failed: ')}" for r in failed]
        raise ContractError(f"{method.name} breaks its contract:\n  " + "\n  ".join(lines))
    return report


Check = Callable[[type[Method], MethodConfig, Case], None]
CLAUSES: dict[str, Check] = {check.__name__: check for check in (
    _equation.identity_at_the_start,
    _equation.merged_is_forward,
    _equation.sixteen_bits_stay_near_float32,
    _equation.adapters_are_held_in_float32,
    _equation.active_together,
    _equation.fast_is_specification,
    _equation.gradients_in_its_dtype,
    _equation.dropout_is_the_mask_alone,
    _equation.a_hook_below_runs_once,
    _training.base_bits_stay,
    _training.only_the_adapter_trains,
    _reversal.disabled_is_base,
    _reversal.a_base_that_is_gone_says_so,
    _saving.saved_and_loaded_bits,
    _saving.config_and_json,
    _saving.a_failed_load_changes_nothing,
    _saving.an_edited_config_is_found_out,
    _saving.another_base_is_found_out,
    _equation.output_dtype,
    _reversal.copies_and_moves,
    _reversal.restore_is_bit_exact,
    _reversal.ejected_is_plain,
    _reversal.a_shared_module_is_wrapped_once,
    _reversal.a_tied_weight_is_not_merged,
    _equation.gradient_checkpointing,
    _equation.torch_compile,
    _training.parameter_count,
    _training.same_seed_same_bits,
    _training.another_seed_other_bits,
    _reversal.what_does_not_fit_is_named,
)}  # fmt: skip
"""Every clause by name, in the order of the report."""

WRAPPING = {
    "merged_is_forward",
    "sixteen_bits_stay_near_float32",
    "adapters_are_held_in_float32",
    "active_together",
    "fast_is_specification",
    "gradients_in_its_dtype",
    "dropout_is_the_mask_alone",
    "a_hook_below_runs_once",
    "an_edited_config_is_found_out",
    "a_shared_module_is_wrapped_once",
    "a_tied_weight_is_not_merged",
    "parameter_count",
    "another_seed_other_bits",
    "what_does_not_fit_is_named",
}
"""The clauses that apply only to methods that wrap layers."""


def run_clause(name: str, method: type[Method], config: MethodConfig, case: Case) -> Result:
    """Check one clause on one case, and return its outcome. Raises nothing."""
    reason = method.exemption(name, config, case.bias)
    if reason is not None:
        return Result(name, case, f"exempt: {reason}")
    if not issubclass(method, Adapter):
        if name in WRAPPING:
            return Result(name, case, "exempt: the method wraps no layer")
        if case.kind == "NF4Linear" and not trains(config, case):
            return Result(name, case, "exempt: a 4-bit weight cannot be trained")
    if case.kind == "Embedding" and isinstance(config, AdapterConfig):
        config = replace(config, target_modules=("first", "second"))  # not all-linear's
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            CLAUSES[name](method, config, case)
    except ContractError as error:
        return Result(name, case, f"failed: {error}")
    except Exception as error:  # from the code of the method, which may raise anything
        return Result(name, case, f"failed: {type(error).__name__}: {error}")
    return Result(name, case, "passed")


@dataclass(frozen=True)
class Result:
    """The outcome of one clause on one case."""

    clause: str
    case: Case
    outcome: str  # "passed", "exempt: REASON" or "failed: REASON"


@dataclass(frozen=True)
class ContractReport:
    """The outcomes of all clauses on all cases. `str(report)` is a table, one line per clause."""

    method: str
    results: tuple[Result, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}: the contract on {len({r.case for r in self.results})} cases"]
        for name in dict.fromkeys(result.clause for result in self.results):
            outcomes = dict.fromkeys(r.outcome for r in self.results if r.clause == name)
            lines.append(f"  {name:<32} {'; '.join(outcomes)}")
        return "\n".join(lines)
