"""Files and functions are short, and a top-level name has one meaning."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator

from conftest import ROOT

PACKAGE = ROOT / "lora"
LINES_OF_A_FILE, LINES_OF_A_FUNCTION, PARAMETERS = 600, 60, 7

# What is longer, or has more parameters, and why. An entry that is no longer needed fails.
LONGER_FILES: dict[str, str] = {}
LONGER_FUNCTIONS: dict[str, str] = {}
MORE_PARAMETERS = {
    "finetune/models.py: load_base": "the settings of a run that decide how its base is read",
    "finetune/generate.py: written": "the settings of a run that decide how it writes",
    "finetune/trained.py: answer": "one for each flag of lora predict and lora generate",
    "kernels/dora.py: forward": "autograd sees only tensors that are arguments of their own",
    "kernels/vera.py: forward": "autograd sees only tensors that are arguments of their own",
}
ALIKE = {"T": "a type variable"}  # names that several modules define with one meaning

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the package as a tree, by its file's name."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def functions() -> Iterator[tuple[str, Function]]:
    """Every function, methods and inner ones too, by "file: name"."""
    for file, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{file}: {node.name}", node


def parameters(function: Function) -> int:
    """How many parameters a caller sees: self and cls do not count."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return len([one for one in named if one.arg not in ("self", "cls")]) + len(starred)


def test_files_are_short() -> None:
    lines = {file: (PACKAGE / file).read_text(encoding="utf-8").count("\n") for file in modules()}
    longer = {name: count for name, count in lines.items() if count > LINES_OF_A_FILE}
    assert longer.keys() == LONGER_FILES.keys(), longer


def test_functions_are_short() -> None:
    lines = [(name, (node.end_lineno or 0) - node.lineno + 1) for name, node in functions()]
    longer = {name: count for name, count in lines if count > LINES_OF_A_FUNCTION}
    assert longer.keys() == LONGER_FUNCTIONS.keys(), longer


def is_gpu_code(function: Function) -> bool:
    """True if Triton compiles the function: it takes each tensor and each size on its own."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_functions_have_few_parameters() -> None:
    counts = [(name, parameters(node)) for name, node in functions() if not is_gpu_code(node)]
    more = {name: count for name, count in counts if count > PARAMETERS}
    assert more.keys() == MORE_PARAMETERS.keys(), more


def defined(tree: ast.Module) -> set[str]:
    """The names that a module defines at its top level, imports left out."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                parts = target.elts if isinstance(target, ast.Tuple) else [target]
                names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def test_a_top_level_name_has_one_meaning() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for file, tree in modules().items():
        for name in defined(tree):
            places[name].append(file)
    several = {name: where for name, where in places.items() if len(where) > 1}
    assert several.keys() == ALIKE.keys(), several
