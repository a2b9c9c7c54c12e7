"""Trains an injected model with transformers.Trainer: add lora.AdapterCallback().

    lora.inject(model, lora.LoRAConfig(r=8, modules_to_save=("classifier",)))
    trainer = transformers.Trainer(model, args, ..., callbacks=[lora.AdapterCallback()])
    trainer.train()                                   # or resume_from_checkpoint=True
    lora.load(other, f"{args.output_dir}/adapter")    # or .../checkpoint-30/adapter

Without the callback, Trainer would save the whole model under the wrappers' names, which
from_pretrained cannot read; and it could not save shared parameters at all (VeRA, an adapter on a
tied head). During training, the callback removes the frozen base weights and every second name of a
shared parameter from the state dict. So a checkpoint has the size of the adapter, can be resumed
with a model injected in the same way, and works with load_best_model_at_end. The folder adapter/
beside it, in PEFT's format, is the result to keep and to share.
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
    """Saves adapter `name` in adapter/ of every checkpoint and, after training, of output_dir.

    It also runs the hooks of the method, such as AdaLoRA's penalty (before gradient clipping) and
    its allocation of ranks. The penalty is not part of the loss that Trainer logs. With
    load_best_model_at_end, the adapter saved at the end is the best one.
    Raises ConfigError before the first step if the method needs more steps, or needs learning rates
    that the optimizer does not have (LoRA+); TargetError before the first update if an adapter has
    no gradient.
    """

    def __init__(self, name: str = "default") -> None:
        self.name = name
        self.hooks: list[Any] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Installs the hooks now: Trainer loads a checkpoint to resume before on_train_begin."""
        self._install_hooks(model)

    def _install_hooks(self, model: nn.Module) -> None:
        """Makes the model's state dict omit frozen weights, and allows save_pretrained().

        Otherwise save_pretrained() of an injected model is an error, since it would write the
        wrappers' names. Trainer calls it with the reduced state dict, which only Trainer reads.
        """
        refuse_whole_saves(model, False)
        for hook in self.hooks:
            hook.remove()
        self.hooks = [
            model.register_state_dict_post_hook(_omit_from_state_dict),  # type: ignore[no-untyped-call]
            model.register_load_state_dict_post_hook(_allow_missing),  # type: ignore[no-untyped-call]
        ]

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any
    ) -> None:
        """Checks the number of steps, and that the optimizer has the method's learning rates."""
        self._install_hooks(model)
        check_steps(model, state.max_steps)
        rates = {
            id(p): group.get("initial_lr", group["lr"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        used = {rates.get(id(p)) for parameters, _ in param_groups(model) for p in parameters}
        if len(param_groups(model)) > 1 and len(used) == 1:
            raise ConfigError(
                "the adapter trains at several learning rates, Trainer's optimizer has one. Pass"
                " optimizers=(torch.optim.AdamW(groups(model, rate, decay)), None), with"
                " lora.finetune.train.optimizer_groups."
            )
        self.checked = False

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Sets the gradients to those of the penalty. backward() then adds those of the loss."""
        extra = penalty(model)
        if extra is not None:
            trainable = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(extra, trainable, allow_unused=True)
            for parameter, gradient in zip(trainable, gradients, strict=True):
                parameter.grad = gradient

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any, **_: Any
    ) -> None:
        """Raises TargetError before the first update if an adapter has no gradient."""
        if not self.checked:
            check_alive(model)
            self.checked = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Runs the method's work after an update. global_step is not yet increased here."""
        after_step(model, state.global_step + 1, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Saves the adapter beside the checkpoint."""
        if args.should_save:
            save(model, Path(args.output_dir) / f"checkpoint-{state.global_step}" / ADAPTER,
                 self.name)  # fmt: skip

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Saves the adapter in output_dir and removes the hooks."""
        if args.should_save:
            save(model, Path(args.output_dir) / ADAPTER, self.name)
        for hook in self.hooks:
            hook.remove()
        refuse_whole_saves(model, bool(injected(model)))


def _names_to_omit(model: nn.Module) -> set[str]:
    """Returns the parameter names to omit from a checkpoint: frozen ones, and second names of one
    parameter."""
    seen = {id(p) for _, p in base_parameters(model) if not p.requires_grad}
    omitted = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            omitted.add(name)
        seen.add(id(parameter))
    return omitted


def _omit_from_state_dict(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict hook: removes what a checkpoint omits. An ejected model keeps all its names."""
    if injected(model):
        for name in _names_to_omit(model):
            state.pop(prefix + name, None)


def _allow_missing(model: nn.Module, incompatible: Any) -> None:
    """Load hook: the names that a checkpoint omits do not count as missing."""
    if injected(model):
        omitted = _names_to_omit(model)
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in omitted]
