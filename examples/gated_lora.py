"""A method of your own, in one file: LoRA with a trained gate on each layer.

    W' = W + sigmoid(g) · (lora_alpha / r) · B A

Nothing is installed or registered. Name the class in this file wherever a method is named:

    lora methods check examples/gated_lora.py:GatedLoRA
    lora train --method examples/gated_lora.py:GatedLoRA --help
    lora train --method examples/gated_lora.py:GatedLoRA --r 4 --run-dir runs/gated
    lora eval runs/gated
    lora compare --methods lora examples/gated_lora.py:GatedLoRA

To add your own method, copy this file and change what its comments explain: the config, __init__,
fill, merged and size.
"""

from dataclasses import dataclass

import torch

import lora
from lora.settings import strength, whole_number


@dataclass(frozen=True, kw_only=True)
class GatedLoRAConfig(lora.AdapterConfig):
    """The settings. Each field is a flag of `lora train`, a key of a TOML file and a key of
    adapter_config.json, so each needs a type, a default, and a docstring for --help.

    AdapterConfig already has target_modules, exclude_modules, modules_to_save and related fields.
    """

    r: int = 8
    """Rank of the update."""
    lora_alpha: float = 16.0
    """The update is scaled by lora_alpha / r."""

    def __post_init__(self):
        super().__post_init__()  # types are checked there
        whole_number("r", self.r)  # checks what the type cannot express
        strength("lora_alpha", self.lora_alpha)


class GatedLoRA(lora.Adapter):
    """W' = W + sigmoid(g) · (lora_alpha / r) · B A, with a trained number g on each layer."""

    # `name` is used in tables and folders. `peft_type` is written to adapter_config.json, so that
    # lora.load knows which method saved the adapter. `in_peft` is False: PEFT lacks this method.
    name, paper, Config = "gated_lora", "examples/gated_lora.py", GatedLoRAConfig
    peft_type, in_peft = "GATED_LORA", False

    def __init__(self, view, config, module):
        """The parameters on one layer. A view presents every kind of layer (Linear, Embedding,
        Conv1D, a 4-bit linear) as one matrix W (out_features, in_features)."""
        super().__init__(view, config, module)
        self.lora_A = self.new(view, config.r, view.in_features)  # on the layer's device
        self.lora_B = self.new(view, view.out_features, config.r)
        self.gate = self.new(view, 1)
        self.scaling = config.lora_alpha / config.r

    def fill(self, view, generator):
        """The initial values. B = 0, so that W' = W at first: training starts from the base model.

        generator(name) depends on the seed and on the layer's name alone: the same seed gives the
        same values, whatever else is in the model.
        """
        torch.nn.init.kaiming_uniform_(self.lora_A, a=5**0.5, generator=generator("lora_A"))
        self.lora_B.zero_()
        self.gate.zero_()  # sigmoid(0) = 1/2

    def merged(self, W, b):
        """The equation: W' (out, in) and the bias b' from W and b. The library derives everything
        else from it: the forward, its gradient, the merge."""
        return W + self.gate.sigmoid() * self.scaling * (self.lora_B @ self.lora_A), b

    @classmethod
    def size(cls, view, config, module):
        """The number of parameters on one layer."""
        return config.r * (view.in_features + view.out_features) + 1
