"""The report of an injection: the trainable parameters, the layers not adapted, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lora.inventory import adapter_parts, injected, with_views
from lora.layers import VIEWS, inside, kind, views
from lora.settings import SHORTHANDS
from lora.targets import Plan, base_paths, beside_saved, peft_saves_too, walk
from lora.training import groups_of


@dataclass(frozen=True)
class Report:
    """What an injection did. `str(report)` is its table."""

    plan: Plan
    rows: tuple[tuple[str, int, str, int], ...]  # (name, how many, shape, parameters)
    adapter_parameters: int  # of the method itself, without modules_to_save
    trainable: int  # all parameters that require a gradient
    total: int  # all parameters of the model, adapters included
    left: tuple[tuple[str, int], ...] = ()  # (name, how many) of layers that are not adapted
    note: str = ""

    def __str__(self) -> str:
        width = max((len(row[0]) for row in self.rows), default=0)
        lines = [
            f"  {name:<{width}}  ×{number:<4} {shape:<14} {count:>13,}"
            for name, number, shape, count in self.rows
        ]
        share = self.trainable / max(self.total, 1)
        head = f"{self.plan.method.name}: {self.trainable:,} of {self.total:,} parameters"
        left = ", ".join(f"{name} ×{number}" for name, number in self.left)
        tail = [f"  not adapted: {left}" if left else "", self.note]
        return "\n".join([f"{head} train ({share:.2%})", *lines, *filter(None, tail)])


def report_of(model: nn.Module, name: str, note: str = "") -> Report:
    """Returns the report on adapter `name` of this model."""
    plan, parts = injected(model)[name], adapter_parts(model, name)
    sizes: dict[tuple[str, str], list[int]] = {}
    for path, (adapter, view) in with_views(model, parts.adapters).items():
        shape = f"{view.in_features} -> {view.out_features}"
        count = sum(p.numel() for group in groups_of(adapter).values() for p in group)
        sizes.setdefault((path.rpartition(".")[2], shape), []).append(count)
    if plan.selected:
        counts = [parts.selected[name].numel() for name in plan.selected]
        sizes["parameters of the base", ""] = counts
    adapter_parameters = sum(map(sum, sizes.values()))
    for path, module in parts.copies.items():
        sizes[f"(saved) {path}", "whole"] = [count_parameters(module)]
    return Report(
        plan=plan,
        rows=tuple((label, len(s), shape, sum(s)) for (label, shape), s in sizes.items()),
        adapter_parameters=adapter_parameters,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=count_parameters(model),
        left=not_adapted(model, plan) if plan.targets else (),
        note=note,
    )


def not_adapted(model: nn.Module, plan: Plan) -> tuple[tuple[str, int], ...]:
    """Returns the layers that the plan does not adapt, counted by the last part of their names."""
    left: Counter[str] = Counter()
    for path, module in walk(model):
        if path in plan.targets or any(inside(path, whole) for whole in plan.saved):
            continue
        if kind(module):
            left[path.rpartition(".")[2]] += 1
        elif any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            left[f"{path.rpartition('.')[2]} (no view)"] += 1  # such as Mixtral's experts
    return tuple(left.items())


def count_parameters(module: nn.Module) -> int:
    """Returns the number of parameters of a module.

    A packed weight counts as its values: two to each byte, and no scales.
    """
    count = sum(parameter.numel() for parameter in module.parameters())
    for view in (v for m in module.modules() if type(m) in VIEWS for v in views(m)):
        count += view.out_features * view.in_features - sum(t.numel() for t in view.stored())
    return count


def notes_on(model: nn.Module, plan: Plan) -> str:
    """Returns what a user should know about an injection and cannot see in the table."""
    notes = []
    if plan.uncalled and getattr(plan.config, "target_modules", None) in SHORTHANDS:
        ends = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in plan.uncalled))
        notes.append(
            f"{ends} not adapted: {type(model).__name__} uses their weights without calling them."
        )
    if plan.saved:
        notes += [*_peft_notes(model, plan), *_tie_notes(model, plan)]
    return "\n".join(notes)


def _peft_notes(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Yields a note for each module that PEFT also matches with modules_to_save."""
    matched = peft_saves_too(model, plan.saved) if plan.method.in_peft else []
    filed = beside_saved(model, plan) if matched else {}
    for path in matched:
        entry = next(saved for saved in plan.saved if path.endswith(saved))
        if any(inside(name, path) for name in filed):
            result = "the saved file holds it as the base has it, so that PEFT can read the file."
        else:
            result = (
                f"it cannot read the saved file. Set modules_to_save={(path, entry)!r} if PEFT"
                " must read it."
            )
        yield f"PEFT takes modules_to_save={entry!r} to mean {path} too: {result}"


def _tie_notes(model: nn.Module, plan: Plan) -> Iterator[str]:
    """Yields a note for each saved module whose weight was tied to one outside it."""
    names: dict[int, list[str]] = {}
    for name, parameter in base_paths(model):
        names.setdefault(id(parameter), []).append(name)
    for tied in names.values():
        copied = [name for name in tied if any(inside(name, path) for path in plan.saved)]
        if copied and len(copied) < len(tied):
            left = [name for name in tied if name not in copied]
            yield f"{copied[0]} trains apart from {left[0]}, which it was tied to."
