"""Clauses on undoing: disabled, merge, restore, eject, and operations that are refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from lora.errors import ConfigError, MergeError, TargetError
from lora.injection import disabled, eject, inject
from lora.merging import merge, restore
from lora.method import Method
from lora.settings import AdapterConfig, MethodConfig
from lora.testing._requirements import (
    require,
    require_near,
    require_raise,
    require_same,
    snapshot,
    unchanged,
)
from lora.testing._toys import Case, Toy, injected_toy, input_of, make_mergeable, perturb
from lora.wrappers import AdaptedLayer


def disabled_is_base(method: type[Method], config: MethodConfig, case: Case) -> None:
    """While disabled, the output is the base's, bit for bit. Afterwards the adapter acts again."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    with disabled(model):
        require_same(model(x), Toy(case).eval()(x), "disabled output")
    require(not torch.equal(model(x), Toy(case).eval()(x)), "enabled again: nothing acts")


def a_base_that_is_gone_says_so(method: type[Method], config: MethodConfig, case: Case) -> None:
    """If a method, such as full, does not keep the base weights, then disabled, merge and restore
    raise MergeError and leave the model unchanged."""
    if method.keeps_base:
        return
    model = injected_toy(config, case, moved=True)
    before = snapshot(model)
    with require_raise(MergeError, "disabled"), disabled(model):
        pass
    for verb in (merge, restore):
        with require_raise(MergeError, verb.__name__):
            verb(model)
    require(unchanged(before, model), "the refused call changed the model")


def copies_and_moves(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A deepcopy computes the same and is independent. All parameters move to another device."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    expected = model(x)
    twin = copy.deepcopy(model)
    require_same(twin(x), expected, "output of a deepcopy")
    perturb(twin)
    require_same(model(x), expected, "output of the original after its deepcopy changed")
    on_meta = copy.deepcopy(model).to("meta")
    require(all(p.is_meta for p in on_meta.parameters()), "a parameter was not moved")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        output = copy.deepcopy(model).to(device)(x.to(device)).to(expected.device)
        require_near(output, expected, f"on {device}", k=256)


def restore_is_bit_exact(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Five merges and restores leave the model as it was. Merging a merged model is refused."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    make_mergeable(model)
    expected, before = model(x), snapshot(model)
    for _ in range(5):
        merge(model)
        restore(model)
    require(unchanged(before, model), "merge and restore changed the model")
    require_same(model(x), expected, "output after restore")
    merge(model)
    with require_raise(MergeError, "merge of a merged model"):
        merge(model)


def ejected_is_plain(method: type[Method], config: MethodConfig, case: Case) -> None:
    """No wrapper is left, the output is the merged model's, and everything is trainable again."""
    model, x = injected_toy(config, case, moved=True), input_of(case)
    if method.keeps_base:
        make_mergeable(model)
        merge(model)
    expected = model(x)
    eject(model)
    require([n for n, _ in model.named_modules()] == [n for n, _ in Toy(case).named_modules()],
             "a wrapper is left")  # fmt: skip
    require_same(model(x), expected, "ejected output")
    trained = {name: p.requires_grad for name, p in Toy(case).named_parameters()}
    require(all(p.requires_grad == trained[name] for name, p in model.named_parameters()),
             "a parameter is left frozen")  # fmt: skip


def a_shared_module_is_wrapped_once(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A module at two paths gets one wrapper, used at both."""
    assert isinstance(config, AdapterConfig)
    for targets in (config.target_modules, ("first", "second"), ("again", "second")):
        model = Toy(case)
        model.again = model.first
        inject(model, replace(config, target_modules=targets))
        require(model.again is model.first and isinstance(model.again, AdaptedLayer),
                 "a module reached by two paths was wrapped on one")  # fmt: skip
    perturb(model.eval())
    expected = model(input_of(case))
    make_mergeable(model)
    merge(model)
    require_near(model(input_of(case)), expected, "merged output")
    eject(model)
    require(model.again is model.first and not isinstance(model.again, AdaptedLayer),
             "ejected on one path only")  # fmt: skip


def a_tied_weight_is_not_merged(method: type[Method], config: MethodConfig, case: Case) -> None:
    """Merging into a weight that is tied to another layer's is refused. With untie=True it merges,
    and the other layer's weight does not change. restore ties the two again."""
    model = Toy(case)
    model.tied = nn.Module()
    if case.kind == "NF4Linear":
        return  # a packed weight cannot be merged, and no weight is tied to one
    model.tied.weight = model.first.weight
    inject(model, config)
    before = snapshot(model)
    with require_raise(MergeError, "merging into a tied weight"):
        merge(model)
    require(unchanged(before, model), "the refused merge changed the model")
    perturb(model.eval())
    expected, before = model(input_of(case)), snapshot(model)
    tied = model.tied.weight.detach().clone()  # type: ignore[operator]
    merge(model, untie=True)
    require_near(model(input_of(case)), expected, "merged output, untied")
    require_same(model.tied.weight, tied, "the other side of the tie")  # type: ignore[arg-type]
    restore(model)
    require(unchanged(before, model), "restore left the tie broken")


def what_does_not_fit_is_named(method: type[Method], config: MethodConfig, case: Case) -> None:
    """A target that matches no layer, or one that cannot be adapted, raises TargetError. The model
    is unchanged."""
    assert isinstance(config, AdapterConfig)
    for targets in (("norm",), ("frist",), r"second.+", ("first", "frist")):
        model = Toy(case)
        before = snapshot(model)
        with require_raise(TargetError, f"target_modules={targets!r}"):
            inject(model, replace(config, target_modules=targets))
        require(unchanged(before, model), "the refused injection changed the model")
    model = injected_toy(config, case)
    with require_raise(ConfigError, "a name given twice"):
        inject(model, config)
