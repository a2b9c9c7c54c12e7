"""An injected model in transformers.Trainer: a callback for what a plain model does not have.

    lora.inject(model, lora.LoRAConfig(r=8, modules_to_save=("classifier",)))
    trainer = transformers.Trainer(model, args, ..., callbacks=[lora.AdapterCallback()])
    trainer.train()                                   # or resume_from_checkpoint=True
    lora.load(other, f"{args.output_dir}/adapter")    # or .../checkpoint-30/adapter

Trainer takes an injected model for any other, but would save it whole, under the wrappers' names,
which from_pretrained does not read; and not at all where parameters are shared (VeRA, an adapter on
a tied head). While it trains, the callback leaves out of the model's state dict what is frozen of
the base, and every second name of a parameter. So a checkpoint is the adapter's size, resumes a
training of the model injected in the same way, and serves load_best_model_at_end. The adapter
beside it, in PEFT's format, is what to keep and to hand on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lora.checkpoint import save
from lora.errors import ConfigError
from lora.injection import refuse_whole_saves
from lora.inventory import injected
from lora.targets import base_parameters
from lora.training import after_step, check_alive, check_steps, param_groups, penalty

ADAPTER = "adapter"


class AdapterCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Saves adapter `name` in adapter/ of every checkpoint and, at the end, of output_dir; and has
    the method do its part: AdaLoRA's penalty, before clipping, and its allocation of ranks.

    With load_best_model_at_end what is saved at the end is the best one. The penalty is no part of
    the loss that Trainer logs. Raises ConfigError before the first step where the method cannot be
    trained in so many, or asks for rates that the optimiser does not have (LoRA+), and TargetError
    before the first update at an adapter that backward did not reach.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.hooks: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        self._slim(model)  # a checkpoint to resume from is loaded before on_train_begin

    def _slim(self, model: nn.Module) -> None:
        refuse_whole_saves(
            model, False
        )  # what save_pretrained is given to write is not the whole model
        for hook in self.hooks:
            hook.remove()
        self.hooks = [
            model.register_state_dict_post_hook(_leave_out),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(_do_without),  # type: ignore[no-untyped-call]
        ]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **given: Any
    ) -> None:
        self._slim(model)
        check_steps(model, state.max_steps)
        rates = {
            id(p): group.get("initial_lr", group["lr"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        found = {rates.get(id(p)) for parameters, _ in param_groups(model) for p in parameters}
        if len(param_groups(model)) > 1 and len(found) == 1:
            raise ConfigError(
                "the adapter trains at more than one rate, Trainer's optimizer has one. Pass"
                " optimizers=(torch.optim.AdamW(groups(model, rate, decay)), None), with"
                " lora.finetune.train.optimizer_groups."
            )
        self.checked = False

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        extra = penalty(model)
        if extra is not None:  # the gradients are those of no loss yet
            trained = [p for p in model.parameters() if p.requires_grad]
            found = torch.autograd.grad(extra, trained, allow_unused=True)
            for parameter, gradient in zip(trained, found, strict=True):
                parameter.grad = gradient

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **given: Any
    ) -> None:
        if not self.checked:
            check_alive(model)
            self.checked = True

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **given: Any
    ) -> None:
        after_step(model, state.global_step + 1, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        if args.should_save:
            save(model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / ADAPTER,
                 self.name)  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **given: Any) -> None:
        if args.should_save:
            save(model, Path(args.output_dir) / ADAPTER, self.name)
        for hook in self.hooks:
            hook.remove()
        refuse_whole_saves(model, bool(injected(model)))


def _spared(model: nn.Module) -> set[str]:
    """Names of the injected model's parameters that a checkpoint of it does without."""
    seen = {id(p) for _, p in base_parameters(model) if not p.requires_grad}
    spared = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            spared.add(name)
        seen.add(id(parameter))
    return spared


def _leave_out(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    if injected(model):  # else it was ejected since, and is a plain model
        for name in _spared(model):
            state.pop(prefix + name, None)


def _do_without(model: nn.Module, incompatible: Any) -> None:
    if injected(model):
        spared = _spared(model)
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in spared]
