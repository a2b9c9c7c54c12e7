"""Resolves a config against a model: the layers to wrap, the modules and parameters to train.

These functions see the model as it was before any injection, and change nothing. plan_of() is the
entry: it returns a Plan, and every error about targets comes from it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import lora.methods  # noqa: F401  (fills METHODS)
from lora.adapter import Adapter
from lora.errors import ConfigError, TargetError
from lora.layers import View, backbone, fits, inside, kind
from lora.method import ChecksTargets, Follows, Method, Selection, TrainsBase, method_of
from lora.methods._tokens import input_embedding
from lora.patterns import BLOCKS, compiled
from lora.settings import SHORTHANDS, AdapterConfig, MethodConfig, PartialConfig
from lora.wrappers import AdaptedLayer, SavedModule

# An ending has as many parts as it takes to miss other layers: BERT's feed-forward has an
# output.dense too, GPT-2's MLP a c_proj.
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj")
_BERT = ("query", "key", "value", "attention.output.dense", "crossattention.output.dense")
ATTENTION: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
    "phi": ("q_proj", "k_proj", "v_proj", "self_attn.dense"),
    "phi3": ("qkv_proj", "o_proj"),
    "gpt2": ("c_attn", "q_attn", "attn.c_proj", "crossattention.c_proj"),
    "gpt_neox": ("query_key_value", "attention.dense"),
    "t5": ("q", "k", "v", "o"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin"),
    "bert": _BERT,
    "roberta": _BERT,
    "deberta": ("in_proj", "pos_proj", "pos_q_proj", "attention.output.dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "attention.output.dense"),
}
"""The layers that target_modules="attention" matches, as dotted endings by the model's model_type:
the input and output projections of attention, fused ones too. A model need not have all of them."""

UNCALLED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("mixer.dt_proj", "mixer.out_proj")),
    **dict.fromkeys(("mamba2", "nemotron_h"), ("mixer.out_proj",)),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "zamba2"), ("mamba.out_proj",)),
    "jamba": ("mamba.dt_proj",),
    "wavlm": tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
}
"""Layers that the model does not call, as dotted endings by model_type. It reads their weights
itself or passes them to a kernel, some only in training on a GPU. An adapter there does nothing."""


def uncalled(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the model's layers that UNCALLED lists."""
    # Every module, since a model may contain one of another model_type.
    types = {_architecture(part) for part in model.modules()}
    ends = tuple(end for t in types if isinstance(t, str) for end in UNCALLED.get(t, ()))
    return tuple(name for name, module in walk(model) if ends and kind(module) and fits(name, ends))


@dataclass(frozen=True)
class Plan:
    """What an injection will do. Names are paths in the model as it was before any injection."""

    method: type[Method]
    config: MethodConfig
    targets: tuple[str, ...]  # layers to wrap
    saved: tuple[str, ...]  # modules to train as a whole
    selected: tuple[str, ...]  # parameters of the base to train
    carried: tuple[str, ...] = ()  # frozen parameters of the base that the adapter's file replaces
    trainable: bool = True  # False if the adapter was loaded for inference
    uncalled: tuple[str, ...] = ()  # layers that the model never calls, for methods that wrap
    further: Mapping[str, Callable[[View, Any, str], Adapter]] = field(default_factory=dict)
    """Targets whose adapter is not made by `method`, mapped to the function that makes it."""


def unwrapped(module: nn.Module) -> nn.Module:
    """Returns the module that a wrapper wraps, or the module itself if it is no wrapper."""
    if isinstance(module, AdaptedLayer):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, module) for every path in the model, as if nothing were injected.

    Unlike named_modules() it yields a module that two paths reach twice, and yields what a wrapper
    wraps in the wrapper's place.
    """
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def targets_of(
    model: nn.Module, config: AdapterConfig, saved: tuple[str, ...], never_called: tuple[str, ...]
) -> tuple[str, ...]:
    """Returns the names of the layers that config.target_modules matches.

    saved: the saved modules. never_called: uncalled(model). Excluded layers and layers inside a
    saved module are never targets. If two paths reach a layer, matching or excluding one of them
    counts for both. Raises TargetError if an entry matches nothing, or matches a module that no
    View exists for.
    """
    modules = {name: module for name, module in walk(model) if name}
    free, wanted = modules, config.target_modules
    if saved or config.exclude_modules is not None:
        free = _free(model, modules, config, saved)
    # If a layer is named "attention", the word means that layer.
    if wanted == "attention" and any(kind(m) and fits(n, (wanted,)) for n, m in free.items()):
        wanted = (wanted,)
    if wanted == "input-embedding":
        wanted = _input_embedding(model, free)
    if wanted in SHORTHANDS:
        called = {name: module for name, module in free.items() if name not in never_called}
        names = _by_word(model, modules, called, config)
    else:
        names = _by_name(model, modules, free, config, wanted)
    if config.layers_to_transform:
        _check_blocks(names, config)
    return names


def _free(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    saved: tuple[str, ...],
) -> dict[str, nn.Module]:
    """Returns the modules that are neither excluded nor inside a saved module."""
    # Compare ids, so that a layer with two paths is left out under both.
    removed = {id(m) for name, m in modules.items() if any(inside(name, path) for path in saved)}
    for entry in _entries(config.exclude_modules):
        excluded = {id(m) for name, m in modules.items() if fits(name, entry) and kind(m)}
        if not excluded:
            named = entry if isinstance(entry, str) else entry[0]
            raise TargetError(
                f"no layer matches exclude_modules entry {named!r}.\n{_suggestion(model)}"
            )
        removed |= excluded
    return {name: module for name, module in modules.items() if id(module) not in removed}


def _input_embedding(model: nn.Module, free: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Returns the name of the input embedding, in a tuple. Raises TargetError if there is none."""
    table = input_embedding(model)
    # One path is enough: _by_name() adds the other paths of the module.
    names = tuple(name for name, module in free.items() if module is table)[:1]
    if not names:
        raise TargetError(
            f"target_modules='input-embedding': {type(model).__name__} names none, or it is"
            f" excluded.\n{_suggestion(model)}"
        )
    return names


def _by_word(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    called: Mapping[str, nn.Module],
    config: AdapterConfig,
) -> tuple[str, ...]:
    """Returns the layers that "all-linear" or "attention" matches among those that may be adapted.

    Those are linear layers of the backbone. The output head and the routers of experts are left
    out.
    """
    ends = _attention(model) if config.target_modules == "attention" else None
    trunk = backbone(model)
    # As in PEFT, all-linear leaves out the output head.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = None if head is None else unwrapped(head)
    names = tuple(
        name
        for name, module in called.items()
        if kind(module) not in (None, "Embedding")
        and (ends is None or fits(name, ends))
        and module is not head
        and inside(name, trunk)
        and not _is_router(name, modules)
        and _in_blocks(name, config)
    )
    if not names:
        blocks = config.layers_to_transform
        of_blocks = f" in layers_to_transform={blocks}" if blocks else ""
        raise TargetError(
            f"no layer matches target_modules={config.target_modules!r}{of_blocks}."
            f"\n{_suggestion(model)}"
        )
    return names


def _by_name(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
    config: AdapterConfig,
    wanted: str | tuple[str, ...],
) -> tuple[str, ...]:
    """Returns the layers that names, dotted endings or a regular expression match."""
    matched: set[int] = set()
    for entry in _entries(wanted):  # one by one, so that a misspelt entry among good ones is found
        hits = [name for name in free if fits(name, entry)]
        if not hits:
            which = "" if entry is wanted else f" (entry {entry[0]!r})"
            removed = any(fits(name, entry) for name in modules)
            but = " that is not excluded or in modules_to_save" if removed else ""
            raise TargetError(
                f"no layer{but} matches target_modules={wanted!r}{which}.\n{_suggestion(model)}"
            )
        # Skipping it instead would train fewer layers than asked, without notice.
        for name in hits:
            if not kind(modules[name]):
                raise TargetError(
                    f"target_modules={wanted!r} matches {name}, a"
                    f" {type(modules[name]).__name__}: no view for it.\n{_suggestion(model)}"
                )
        # As in PEFT, layers_to_transform does not apply to a layer that is named in full.
        hits = [name for name in hits if name in entry or _in_blocks(name, config)]
        if not hits:
            raise TargetError(
                f"no layer matches target_modules={wanted!r} in layers_to_transform="
                f"{config.layers_to_transform}. Set --layers-to-transform."
            )
        matched |= {id(free[name]) for name in hits}
    return tuple(name for name, module in free.items() if id(module) in matched)


def _block(name: str, config: AdapterConfig) -> int | None:
    """Returns the number of a layer's block, or None if its name has no number.

    Without layers_pattern it is the first number in the name.
    """
    for pattern in config.layers_pattern or (r"[^.]*",):
        match = compiled(pattern, BLOCKS).match(name)
        if match:
            return int(match.groups()[-1])
    return None


def _in_blocks(name: str, config: AdapterConfig) -> bool:
    """True if the layer is in one of the blocks of layers_to_transform, or all blocks count."""
    return not config.layers_to_transform or _block(name, config) in config.layers_to_transform


def _check_blocks(targets: tuple[str, ...], config: AdapterConfig) -> None:
    """Raise TargetError if no target is in a block that layers_to_transform lists."""
    missing = set(config.layers_to_transform) - {_block(name, config) for name in targets}
    if missing:
        raise TargetError(
            f"layers_to_transform {min(missing)}: no such block among the layers that"
            " target_modules matches. Set --layers-to-transform, from 0."
        )


def _attention(model: nn.Module) -> tuple[str, ...]:
    """Returns the dotted endings of the model's attention projections. Raises TargetError."""
    model_type = _architecture(model)
    if model_type not in ATTENTION:
        raise TargetError(
            f"target_modules='attention' works for model_type {', '.join(ATTENTION)}; this model"
            f" has {'no model_type' if model_type is None else repr(model_type)}."
            f"\n{_suggestion(model)}"
        )
    return ATTENTION[model_type]


def _architecture(model: nn.Module) -> str | None:
    """Returns the model_type of a transformers model, None for another model."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _is_router(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """True if a layer chooses among experts, as Mixtral's `gate` beside `experts` does."""
    parts = name.split(".")
    return any(
        re.fullmatch(r"(.*_)?(gate|router)", part)
        and ".".join([*parts[:depth], "experts"]) in modules
        for depth, part in enumerate(parts)
    )


def _entries(entries: str | tuple[str, ...] | None) -> list[str | tuple[str, ...]]:
    """Returns the entries of a field, each in the form that fits() takes."""
    if entries is None or isinstance(entries, str):
        return [] if entries is None else [entries]
    return [(entry,) for entry in entries]


def _suggestion(model: nn.Module) -> str:
    """Returns the end of an error message: the layers that the model has, and what to try."""
    trunk = backbone(model)
    layers = [(n, m) for n, m in walk(model) if kind(m)]
    if kind(model):
        return f"  The model is a {type(model).__name__} itself. Pass nn.Sequential(model)."
    within = Counter(n.rpartition(".")[2] for n, _ in layers if inside(n, trunk))
    heads = Counter(n for n, _ in layers if not inside(n, trunk))
    listed = [f"{name} ×{count}" for name, count in (within + heads).most_common(12)]
    if not listed:
        return f"  {type(model).__name__} has no nn.Linear, no nn.Embedding and no Conv1D."
    # A head is suggested only if there is nothing else: it is new and trains without an adapter.
    best = [name for name, _ in (within or heads).most_common(2)]
    words = "all-linear or attention" if _architecture(model) in ATTENTION else "or all-linear"
    return (
        f"  {type(model).__name__} has {', '.join(listed)}."
        f" Try --target-modules {' '.join(best)}, {words}."
    )


def saved_of(model: nn.Module, config: PartialConfig) -> tuple[str, ...]:
    """Returns the paths of the modules that modules_to_save matches by name or dotted ending.

    If two paths reach a module, both are returned. A module inside another one is left out.
    Raises TargetError if an entry matches nothing, or a container that is never called.
    """
    modules = {name: module for name, module in walk(model) if name}
    matched: set[int] = set()
    for entry in config.modules_to_save:
        hits = [name for name in modules if fits(name, (entry,))]
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise TargetError(
                f"no module matches modules_to_save entry {entry!r}."
                f" {type(model).__name__} has {children}. Set --modules-to-save."
            )
        for name in hits:
            # Its copy would train nothing: the model calls the children of the original.
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
                raise TargetError(
                    f"modules_to_save={entry!r} is {name}, a {type(modules[name]).__name__}, which"
                    " is never called. Name the modules in it."
                )
            matched.add(id(modules[name]))
    paths = [name for name, module in modules.items() if id(module) in matched]
    return tuple(p for p in paths if not any(p != outer and inside(p, outer) for outer in paths))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (name, parameter) of the model as it was before any injection, each parameter once."""
    seen: set[int] = set()
    for name, parameter in base_paths(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def peft_saves_too(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """Returns the modules that PEFT would also match with the names in `saved`.

    PEFT compares plain endings, so `classifier` also matches DistilBERT's pre_classifier.
    """
    return [
        name
        for name, module in walk(model)
        if any(name.endswith(path) for path in saved)
        and not any(inside(name, path) for path in saved)
        and module.state_dict()
    ]


def beside_saved(model: nn.Module, planned: Plan) -> dict[str, nn.Parameter]:
    """Returns the base parameters of those modules by name, which PEFT needs in the file.

    Two kinds of modules are left out, and PEFT cannot read the file then: those that the plan
    adapts, and those whose state_dict holds more than floating-point parameters.
    """
    filed: dict[str, nn.Parameter] = {}
    modules, base = dict(walk(model)), dict(base_paths(model))
    for path in peft_saves_too(model, planned.saved):
        parameters = {name: p for name, p in base.items() if inside(name, path)}
        # A buffer, or the codes of a quantized weight: PEFT would look for them in the file too.
        plain = len(parameters) == len(modules[path].state_dict()) and all(
            p.is_floating_point() for p in parameters.values()
        )
        if plain and not any(inside(target, path) for target in planned.targets):
            filed |= parameters
    return filed


def base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yields (path, parameter) like base_parameters(), but each path of a tied parameter."""
    for prefix, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, buffer) of the base, each buffer once, if its state_dict contains it."""
    seen: set[int] = set()
    for prefix, module in walk(model):
        for name, buffer in module._buffers.items():
            persistent = name not in module._non_persistent_buffers_set
            if buffer is not None and persistent and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def plan_of(model: nn.Module, config: MethodConfig, strict: bool = True) -> Plan:
    """Returns what injecting config would do, without changing the model.

    If not `strict`, settings such as rank_pattern may name layers that are not adapted, as PEFT
    allows in its files. Raises TargetError or ConfigError.
    """
    method = method_of(config)
    # torch.compile keeps the model in `_orig_mod`, DistributedDataParallel in `module`.
    for inner in ("_orig_mod", "module"):
        if inner in model._modules and type(model).__name__ in _OUTER:
            raise ConfigError(
                f"the model is wrapped in {type(model).__name__}, which changes the names of its"
                f" layers. Inject into model.{inner}, before wrapping it."
            )
    saved: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    never_called: tuple[str, ...] = ()
    further: Mapping[str, Callable[[View, Any, str], Adapter]] = {}
    if isinstance(config, PartialConfig) and config.modules_to_save:
        saved = _check_saved(model, saved_of(model, config))  # first: targets leave these out
    if isinstance(config, AdapterConfig):
        never_called = uncalled(model)
        targets = targets_of(model, config, saved, never_called)
        if strict:
            _check_called(model, targets, never_called)
            if issubclass(method, ChecksTargets):
                method.check_targets(config, targets)
        if issubclass(method, Follows):
            further = method.further(model, dict(walk(model)), config, targets)
        if further:
            _check_not_twice(further, targets, saved)
            targets = (*targets, *further)
    elif issubclass(method, Selection) and strict:
        # It trains parameters of any kind of layer, norms too, so a setting may name any of them.
        layers = tuple(name for name, module in walk(model) if name and module._parameters)
        method.check_model(model, layers, config)
    selected: tuple[str, ...] = ()
    if issubclass(method, Selection | TrainsBase):
        selected = _selected(model, method, config, targets, saved)
    return Plan(method, config, targets, saved, selected, uncalled=never_called, further=further)


def _check_called(
    model: nn.Module, targets: tuple[str, ...], never_called: tuple[str, ...]
) -> None:
    """Raises TargetError if the model never calls a target."""
    for name in never_called:
        if name in targets:
            raise TargetError(
                f"target_modules matches {name}, whose weight {type(model).__name__} reads itself:"
                " an adapter there does nothing, on some machines or on all. Leave it out of"
                " --target-modules."
            )


def _check_not_twice(
    further: Mapping[str, Any], targets: tuple[str, ...], saved: tuple[str, ...]
) -> None:
    """Raise ConfigError if one of the further layers is a target or in a saved module already."""
    for name in further:
        if name in targets or any(inside(name, whole) for whole in saved):
            raise ConfigError(
                f"{name} is adapted twice: in target_modules or modules_to_save, and as an"
                " embedding of trained tokens. Leave it out of one."
            )


def _selected(
    model: nn.Module,
    method: type[Selection] | type[TrainsBase],
    config: MethodConfig,
    targets: tuple[str, ...],
    saved: tuple[str, ...],
) -> tuple[str, ...]:
    """Returns the names of the base's parameters to train, a tied one by its first matching name.

    Raises TargetError if they cannot be trained.
    """
    # A Selection sees a tied parameter under its first name only: if the head is tied to the
    # embedding, training the head would train the embedding.
    every = base_parameters(model) if issubclass(method, Selection) else base_paths(model)
    base = {n: p for n, p in every if not any(inside(n, whole) for whole in saved)}
    selected: dict[int, str] = {}
    for name, parameter in base.items():
        if issubclass(method, Selection):
            trained = method.selects(name, model, config)
        else:
            trained = method.selects(name, name.rpartition(".")[0] in targets, config)
        if trained:
            selected.setdefault(id(parameter), name)
    if issubclass(method, Selection) and not selected and not saved:
        raise TargetError(
            f"{method.name} selects no parameter of {type(model).__name__}: it has none of that"
            " kind, or they are all tied to others. Name modules in modules_to_save."
        )
    _check_trainable({name: base[name] for name in selected.values()})
    for name in selected.values():
        _check_writable(name, base[name])
    return tuple(selected.values())


def _check_writable(name: str, parameter: nn.Parameter) -> None:
    """Raise TargetError if the parameter cannot be written in place.

    Otherwise the error would come in the middle of a load, with the model half changed.
    """
    # A stride of 0 means that elements share memory, as expand() makes them.
    shares = any(s == 0 and n > 1 for s, n in zip(parameter.stride(), parameter.shape))
    if parameter.is_inference() or shares:
        raise TargetError(
            f"{name} cannot be trained in place: it was made in inference mode, or its elements"
            " share memory. Clone it first."
        )


def _check_saved(model: nn.Module, saved: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `saved`. Raises TargetError if one of the modules cannot be trained or saved."""
    modules = dict(walk(model))
    for path in saved:
        _check_trainable({f"{path}.{name}": p for name, p in modules[path].named_parameters()})
        extra = [k for k, t in modules[path].state_dict().items() if not isinstance(t, Tensor)]
        if extra:
            raise TargetError(
                f"modules_to_save: {path}.{extra[0]} is not a tensor and cannot be saved. Leave"
                f" {path} out."
            )
    return saved


_OUTER = ("OptimizedModule", "DistributedDataParallel", "DataParallel")
"""Classes that wrap a whole model: torch.compile's and the parallel ones."""


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    """Raise TargetError if a parameter is not of a floating-point dtype."""
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise TargetError(
                f"{name} is {parameter.dtype}, which cannot train. Put an adapter on the layer, or"
                " load an unquantized base, without --quantize."
            )
