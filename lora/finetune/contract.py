"""`lora methods check`: runs the contract on a method, with a progress bar, and prints a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora.errors import ContractError, command
from lora.finetune.comparison.tables import markdown
from lora.finetune.methods import method_named
from lora.finetune.screen import progress_bar
from lora.testing import CLAUSES, Result, cases, run_clause


def check_named(name: str) -> str:
    """Runs the contract on --method NAME and returns its table.

    Every clause runs on every kind of layer and dtype, with the settings in the method's `example`
    and in each of its `variants`. If a clause fails, prints the table and raises ContractError.
    Raises ConfigError if the method cannot be used at all.
    """
    method = method_named(name)
    settings = {"": method.example, **method.variants}
    configs = {variant: method.Config(**values) for variant, values in settings.items()}
    jobs = [(v, clause, case) for v in configs for clause in CLAUSES for case in cases()]
    results: list[Result] = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(jobs))
        for variant, clause, case in jobs:
            about = f"{clause} on {case}{f' ({variant})' if variant else ''}"
            progress.update(task, description=about)
            results.append(run_clause(clause, method, configs[variant], case))
            progress.advance(task)
    table = markdown(clause_rows(results))
    failed = {result.clause for result in results if result.outcome.startswith("failed")}
    if failed:
        print(table, end="")
        raise ContractError(
            f"{method.name} fails {len(failed)} of the {len(CLAUSES)} clauses: see the table above."
            f" Fix the method, then run {command('lora', 'methods', 'check', name)} again."
        )
    return table


def clause_rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """Returns the table: a head, then a row per clause."""
    table: list[tuple[str, ...]] = [("clause", "outcome", "reason")]
    for clause in dict.fromkeys(result.clause for result in results):
        table.append((clause, *_outcome([r for r in results if r.clause == clause])))
    return table


def _outcome(results: Sequence[Result]) -> tuple[str, str]:
    """Returns a clause's outcome over all cases, and the reason: the first failed case, or why
    cases are exempt."""
    failed = [result for result in results if result.outcome.startswith("failed: ")]
    if failed:
        reason = " ".join(failed[0].outcome.removeprefix("failed: ").split())
        share = f"{len(failed)} of {len(results)} cases"
        return "failed", f"{share}, first on {failed[0].case}: {reason}"
    reasons = Counter(r.outcome.removeprefix("exempt: ") for r in results if r.outcome != "passed")
    if sum(reasons.values()) == len(results):
        return "exempt", "; ".join(reasons)
    exempt = "; ".join(f"exempt on {count} cases: {reason}" for reason, count in reasons.items())
    return "passed", exempt
