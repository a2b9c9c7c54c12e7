"""What a config means in a model: the layers to wrap, the modules and parameters to train.

Reads the model, as it was before any injection, and touches nothing.
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
"""What target_modules="attention" means, by the model_type of the model's config: the projections
of attention, into it and out, fused ones too. Not each of them is in every model."""


UNCALLED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("mixer.dt_proj", "mixer.out_proj")),
    **dict.fromkeys(("mamba2", "nemotron_h"), ("mixer.out_proj",)),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "zamba2"), ("mamba.out_proj",)),
    "jamba": ("mamba.dt_proj",),
    "wavlm": tuple(f"attention.{name}_proj" for name in ("q", "k", "v", "out")),
}
"""Layers whose weights the model reads itself, or hands to a kernel that does, by model_type:
their forward is not called, or not in training on a GPU, and an adapter there does nothing."""


def uncalled(model: nn.Module) -> tuple[str, ...]:
    """Names of the model's layers that UNCALLED lists."""
    kinds = {_architecture(part) for part in model.modules()}
    ends = tuple(end for one in kinds if isinstance(one, str) for end in UNCALLED.get(one, ()))
    return tuple(name for name, module in walk(model) if ends and kind(module) and fits(name, ends))


@dataclass(frozen=True)
class Plan:
    """What an injection would do: names by the paths of the model as it was before any."""

    method: type[Method]
    config: MethodConfig
    targets: tuple[str, ...]  # layers to wrap
    saved: tuple[str, ...]  # modules to train as a whole
    selected: tuple[str, ...]  # parameters of the base to train
    carried: tuple[str, ...] = ()  # parameters of the base that its file replaces, not to train
    trainable: bool = True  # False where it was loaded to act only
    further: Mapping[str, Callable[[View, Any, str], Adapter]] = field(default_factory=dict)
    """Those of the targets with an adapter of another kind, and what makes it."""


def unwrapped(module: nn.Module) -> nn.Module:
    """What stood in the module's place before any injection."""
    if isinstance(module, AdaptedLayer):
        return module.base_layer
    return module.original_module if isinstance(module, SavedModule) else module


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) by every path, as if nothing were injected.

    Unlike named_modules it goes to a module reachable by two paths twice, and through a wrapper
    to what it wraps.
    """
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}.{name}" if prefix else name)


def targets_of(model: nn.Module, config: AdapterConfig, saved: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the layers that config.target_modules means.

    Layers inside a saved module, and excluded ones, are left alone. A layer reached by two paths
    is meant, and left alone, by both. Raises TargetError if an entry matches nothing, or matches
    what no view exists for.
    """
    modules = {name: module for name, module in walk(model) if name}
    free, wanted = modules, config.target_modules
    if saved or config.exclude_modules is not None:
        free = _free(model, modules, config, saved)
    # A layer that bears the word for its name is meant by it.
    if wanted == "attention" and any(kind(m) and fits(n, (wanted,)) for n, m in free.items()):
        wanted = (wanted,)
    if wanted == "input-embedding":
        wanted = _input_embedding(model, free)
    if wanted in SHORTHANDS:
        names = _by_word(model, modules, free, config)
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
    """The modules that are neither excluded nor inside a saved module."""
    out = {id(m) for name, m in modules.items() if any(inside(name, whole) for whole in saved)}
    for entry in _entries(config.exclude_modules):
        excluded = {id(m) for name, m in modules.items() if fits(name, entry) and kind(m)}
        if not excluded:
            named = entry if isinstance(entry, str) else entry[0]
            raise TargetError(f"no layer matches exclude_modules entry {named!r}.\n{_offer(model)}")
        out |= excluded
    return {name: module for name, module in modules.items() if id(module) not in out}


def _input_embedding(model: nn.Module, free: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """The name of the input embedding, in a tuple."""
    table = input_embedding(model)
    names = tuple(name for name, module in free.items() if module is table)[:1]
    if not names:
        raise TargetError(
            f"target_modules='input-embedding': {type(model).__name__} names none, or it is"
            f" excluded.\n{_offer(model)}"
        )
    return names


def _by_word(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
    config: AdapterConfig,
) -> tuple[str, ...]:
    """The layers that all-linear or attention means: linear ones of the backbone, without the
    output head, without what routes to experts, without those that the model never calls."""
    ends = _attention(model) if config.target_modules == "attention" else None
    trunk = backbone(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head = None if head is None else unwrapped(head)
    read = uncalled(model)
    names = tuple(
        name
        for name, module in free.items()
        if kind(module) not in (None, "Embedding")
        and (ends is None or fits(name, ends))
        and module is not head
        and inside(name, trunk)
        and not _routes(name, modules)
        and name not in read
        and _in_blocks(name, config)
    )
    if not names:
        blocks = config.layers_to_transform
        of_blocks = f" in layers_to_transform={blocks}" if blocks else ""
        raise TargetError(
            f"no layer matches target_modules={config.target_modules!r}{of_blocks}."
            f"\n{_offer(model)}"
        )
    return names


def _by_name(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    free: Mapping[str, nn.Module],
    config: AdapterConfig,
    wanted: str | tuple[str, ...],
) -> tuple[str, ...]:
    """The layers that names, dotted endings or a regular expression mean."""
    meant: set[int] = set()
    for entry in _entries(wanted):
        hits = [name for name in free if fits(name, entry)]
        if not hits:
            which = "" if entry is wanted else f" (entry {entry[0]!r})"
            gone = any(fits(name, entry) for name in modules)
            but = " that is not excluded or in modules_to_save" if gone else ""
            raise TargetError(
                f"no layer{but} matches target_modules={wanted!r}{which}.\n{_offer(model)}"
            )
        for name in hits:
            if not kind(modules[name]):
                raise TargetError(
                    f"target_modules={wanted!r} matches {name}, a"
                    f" {type(modules[name]).__name__}: no view for it.\n{_offer(model)}"
                )
        # A layer named in full is meant whatever its block, as in PEFT.
        hits = [name for name in hits if name in entry or _in_blocks(name, config)]
        if not hits:
            raise TargetError(
                f"no layer matches target_modules={wanted!r} in layers_to_transform="
                f"{config.layers_to_transform}. Set --layers-to-transform."
            )
        meant |= {id(free[name]) for name in hits}
    return tuple(name for name, module in free.items() if id(module) in meant)


def _block(name: str, config: AdapterConfig) -> int | None:
    """The number of the block that a layer is in: the first one in its name."""
    for pattern in config.layers_pattern or (r"[^.]*",):
        match = compiled(pattern, BLOCKS).match(name)
        if match:
            return int(match.groups()[-1])
    return None


def _in_blocks(name: str, config: AdapterConfig) -> bool:
    return not config.layers_to_transform or _block(name, config) in config.layers_to_transform


def _check_blocks(found: tuple[str, ...], config: AdapterConfig) -> None:
    """Raise TargetError where a number of layers_to_transform is no block's."""
    missing = set(config.layers_to_transform) - {_block(name, config) for name in found}
    if missing:
        raise TargetError(
            f"layers_to_transform {min(missing)}: no such block among the layers meant. Set"
            " --layers-to-transform, from 0."
        )


def _attention(model: nn.Module) -> tuple[str, ...]:
    """The endings of the attention's projections in the model's architecture."""
    found = _architecture(model)
    if found not in ATTENTION:
        raise TargetError(
            f"target_modules='attention' is known of {', '.join(ATTENTION)}; the model is of"
            f" {'no model_type' if found is None else repr(found)}.\n{_offer(model)}"
        )
    return ATTENTION[found]


def _architecture(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _routes(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer chooses among experts, which stand beside it: Mixtral's gate."""
    parts = name.split(".")
    return any(
        re.fullmatch(r"(.*_)?(gate|router)", part)
        and ".".join([*parts[:depth], "experts"]) in modules
        for depth, part in enumerate(parts)
    )


def _entries(entries: str | tuple[str, ...] | None) -> list[str | tuple[str, ...]]:
    """The patterns of a field one by one, each in the form that fits() takes."""
    if entries is None or isinstance(entries, str):
        return [] if entries is None else [entries]
    return [(entry,) for entry in entries]


def _offer(model: nn.Module) -> str:
    """What the model has to adapt, and what to try."""
    trunk = backbone(model)
    layers = [(n, m) for n, m in walk(model) if kind(m)]
    if kind(model):
        return f"  The model is a {type(model).__name__} itself. Pass nn.Sequential(model)."
    within = Counter(n.rpartition(".")[2] for n, _ in layers if inside(n, trunk))
    heads = Counter(n for n, _ in layers if not inside(n, trunk))
    listed = [f"{name} ×{many}" for name, many in (within + heads).most_common(12)]
    if not listed:
        return f"  {type(model).__name__} has no nn.Linear, no nn.Embedding and no Conv1D."
    best = [name for name, _ in (within or heads).most_common(2)]
    short = "all-linear or attention" if _architecture(model) in ATTENTION else "or all-linear"
    return (
        f"  {type(model).__name__} has {', '.join(listed)}."
        f" Try --target-modules {' '.join(best)}, {short}."
    )


def saved_of(model: nn.Module, config: PartialConfig) -> tuple[str, ...]:
    """Paths of the modules that config.modules_to_save means: exact, or dotted endings.

    A module reached by two paths is meant by both.
    """
    modules = {name: module for name, module in walk(model) if name}
    found: dict[int, None] = {}
    for entry in config.modules_to_save:
        hits = [name for name in modules if fits(name, (entry,))]
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise TargetError(
                f"no module matches modules_to_save entry {entry!r}."
                f" {type(model).__name__} has {children}. Set --modules-to-save."
            )
        for name in hits:
            if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
                raise TargetError(
                    f"modules_to_save={entry!r} is {name}, a {type(modules[name]).__name__}, which"
                    " is never called. Name what it holds."
                )
            found[id(modules[name])] = None
    paths = [name for name, module in modules.items() if id(module) in found]
    return tuple(n for n in paths if not any(n != o and inside(n, o) for o in paths))


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of the model as it was before any injection, each parameter once."""
    seen: set[int] = set()
    for name, parameter in base_paths(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, parameter


def peft_saves_too(model: nn.Module, saved: Sequence[str]) -> list[str]:
    """The modules that PEFT takes for some of those in `saved`, and that are none of them: it
    compares endings of names, so that `classifier` means DistilBERT's pre_classifier as well."""
    return [
        name
        for name, module in walk(model)
        if any(name.endswith(path) for path in saved)
        and not any(inside(name, path) for path in saved)
        and module.state_dict()
    ]


def beside_saved(model: nn.Module, planned: Plan) -> dict[str, nn.Parameter]:
    """The base's parameters of those modules, by name, as PEFT needs them in the file. A module
    that the plan adapts is left out, and one that holds more than parameters: of those PEFT cannot
    read the file."""
    found: dict[str, nn.Parameter] = {}
    modules, base = dict(walk(model)), dict(base_paths(model))
    for path in peft_saves_too(model, planned.saved):
        own = {name: p for name, p in base.items() if inside(name, path)}
        plain = len(own) == len(modules[path].state_dict()) and all(
            p.is_floating_point() for p in own.values()
        )
        if plain and not any(inside(target, path) for target in planned.targets):
            found |= own
    return found


def base_paths(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The same by every path: a tied weight has several."""
    for prefix, module in walk(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield (f"{prefix}.{name}" if prefix else name), parameter


def base_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of the model as it was before any injection: those its files hold."""
    seen: set[int] = set()
    for prefix, module in walk(model):
        for name, buffer in module._buffers.items():
            stays = name not in module._non_persistent_buffers_set
            if buffer is not None and stays and id(buffer) not in seen:
                seen.add(id(buffer))
                yield (f"{prefix}.{name}" if prefix else name), buffer


def plan_of(model: nn.Module, config: MethodConfig, strict: bool = True) -> Plan:
    """What injecting config would do. Touches nothing; raises TargetError or ConfigError.

    If not `strict`, a setting may name layers that are not adapted, as in PEFT's files.
    """
    method = method_of(config)
    for inner in ("_orig_mod", "module"):
        if inner in model._modules and type(model).__name__ in _OUTER:
            raise ConfigError(
                f"the model is wrapped in {type(model).__name__}: names would not be the model's"
                f" own. Inject into model.{inner}, before it is wrapped."
            )
    saved: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    further: Mapping[str, Callable[[View, Any, str], Adapter]] = {}
    if isinstance(config, PartialConfig) and config.modules_to_save:
        saved = _check_saved(model, saved_of(model, config))
    if isinstance(config, AdapterConfig):
        targets = targets_of(model, config, saved)
        if strict:
            _check_targets(model, method, config, targets)
        if issubclass(method, Follows):
            further = method.further(model, dict(walk(model)), config, targets)
        if further:
            targets = (*targets, *_apart(further, targets, saved))
    elif issubclass(method, Selection) and strict:
        layers = tuple(name for name, module in walk(model) if name and module._parameters)
        method.check_model(model, layers, config)
    selected: tuple[str, ...] = ()
    if issubclass(method, Selection | TrainsBase):
        selected = _selected(model, method, config, targets, saved)
    return Plan(method, config, targets, saved, selected, further=further)


def _check_targets(
    model: nn.Module, method: type[Method], config: AdapterConfig, targets: tuple[str, ...]
) -> None:
    """Raise TargetError if a target's weight is read by the model itself, or a setting names
    layers that are none of the targets."""
    read = [name for name in uncalled(model) if name in targets]
    if read:
        raise TargetError(
            f"target_modules means {read[0]}, whose weight {type(model).__name__} reads itself:"
            " an adapter there would do nothing, or not on every machine. Leave it out of"
            " --target-modules."
        )
    if issubclass(method, ChecksTargets):
        method.check_targets(config, targets)


def _apart(
    further: Mapping[str, Any], targets: tuple[str, ...], saved: tuple[str, ...]
) -> Mapping[str, Any]:
    """`further`. Raises ConfigError if one of its layers is adapted or trained already."""
    for name in further:
        if name in targets or any(inside(name, whole) for whole in saved):
            raise ConfigError(
                f"{name} is adapted twice: in target_modules or modules_to_save, and as an"
                " embedding of trained tokens. Leave it out of one."
            )
    return further


def _selected(
    model: nn.Module,
    method: type[Selection] | type[TrainsBase],
    config: MethodConfig,
    targets: tuple[str, ...],
    saved: tuple[str, ...],
) -> tuple[str, ...]:
    """Names of the base's parameters to train; a tied one by the first of its names that is meant.

    Raises TargetError if they cannot be trained.
    """
    # A Selection sees a tied parameter under its first name: a head that is the embedding is none.
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
            " kind, or only such as are tied to others. Name modules in modules_to_save."
        )
    _check_trainable({name: base[name] for name in selected.values()})
    for name in selected.values():
        _check_writable(name, base[name])
    return tuple(selected.values())


def _check_writable(name: str, parameter: nn.Parameter) -> None:
    """Raise TargetError if the parameter cannot be written in place: a load could stop halfway."""
    shares = any(s == 0 and n > 1 for s, n in zip(parameter.stride(), parameter.shape))
    if parameter.is_inference() or shares:
        raise TargetError(
            f"{name} cannot be trained in place: it was made in inference mode, or its elements"
            " share memory. Clone it first."
        )


def _check_saved(model: nn.Module, saved: tuple[str, ...]) -> tuple[str, ...]:
    """The saved modules' paths. Raises TargetError where one cannot train, or be saved."""
    modules = dict(walk(model))
    for path in saved:
        _check_trainable({f"{path}.{name}": p for name, p in modules[path].named_parameters()})
        extra = [k for k, t in modules[path].state_dict().items() if not isinstance(t, Tensor)]
        if extra:
            raise TargetError(f"modules_to_save: {path}.{extra[0]} is no tensor: cannot be saved.")
    return saved


_OUTER = ("OptimizedModule", "DistributedDataParallel", "DataParallel")


def _check_trainable(parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise TargetError(
                f"{name} is {parameter.dtype}, which cannot train. Put an adapter on the layer, or"
                " load a base that is not in four bits, without --quantize."
            )
