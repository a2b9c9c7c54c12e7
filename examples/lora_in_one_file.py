"""LoRA in one file: the layer, inject, freeze, train, merge, save.  Needs torch and safetensors.

    python examples/lora_in_one_file.py [FOLDER]        a few seconds on a CPU

A linear layer computes y = W x + b. Fine-tuning changes every number in W, and W is large. LoRA
(Hu et al. 2021, arXiv:2106.09685) freezes W and learns only a change of rank r, written as the
product of two thin matrices:

                       x (in)
                 ┌───────┴────────┐
            W (out, in)       A (r, in)
              frozen              │             W' = W + s B A        s = alpha / r
                 │            B (out, r)
                 │                │ × s
                 └────── + ───────┘
                       y (out)

A 4096 × 4096 layer has 16.8 million weights. With r = 8, A and B have 65,536, 0.4 % as many. Only
A and B need gradients and optimizer state. After training, W' replaces W, and the model runs
exactly as fast as before.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen nn.Linear and a trainable update beside it: y = W x + b + s B A x."""

    def __init__(self, base_layer: nn.Linear, r: int, alpha: float) -> None:
        super().__init__()
        self.base_layer = base_layer  # holds W (out, in) and b (out,)
        self.r, self.alpha, self.scaling = r, alpha, alpha / r
        W = base_layer.weight
        # B starts at zero, so B A = 0 and training starts from exactly the pretrained model.
        # A must not be zero too: B's gradient contains A and A's gradient contains B, so if both
        # were zero, neither would ever change.
        self.lora_A = nn.Parameter(W.new_empty(r, base_layer.in_features))
        self.lora_B = nn.Parameter(W.new_zeros(base_layer.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> y (..., out)"""
        # Two small matmuls: the (out, in) matrix B A is never built during training.
        h = F.linear(x, self.lora_A)  # (..., r); F.linear(x, M) is x Mᵀ
        return self.base_layer(x) + self.scaling * F.linear(h, self.lora_B)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear in the model, by its path, such as "encoder.layers.0.q_proj"."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model: nn.Module, target_modules: list[str], r: int, alpha: float) -> None:
    """Freeze the model and wrap every nn.Linear whose name is in `target_modules`."""
    model.requires_grad_(False)  # before A and B exist, so that they alone are trainable
    # list() first: the loop changes the tree that named_modules() walks.
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in target_modules:
            model.set_submodule(path, LoRALinear(module, r, alpha))
    if not lora_layers(model):
        raise ValueError(f"no nn.Linear is named {' or '.join(target_modules)}")


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, learning_rate: float) -> float:
    """Minimise the squared error with AdamW. Returns the last loss."""
    model.train()
    # Frozen parameters stay out of the optimizer, so it keeps no state for them.
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return loss.item()


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add s B A to each W and put the plain nn.Linear back: no LoRA layer is left."""
    for path, layer in lora_layers(model).items():
        layer.base_layer.weight += layer.scaling * layer.lora_B @ layer.lora_A
        model.set_submodule(path, layer.base_layer)


def save(model: nn.Module, folder: Path) -> None:
    """Write A and B as PEFT does. W is not in the file: whoever loads it has the base."""
    layers = lora_layers(model)
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.lora_A.detach()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.lora_B.detach()
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA",
        "r": first.r,
        "lora_alpha": first.alpha,
        "target_modules": sorted(layers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    # "Pretraining": a small network learns sin(x). In practice you load a large model instead.
    first, middle, last = nn.Linear(1, 64), nn.Linear(64, 64), nn.Linear(64, 1)
    model = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last)
    x = torch.linspace(-3, 3, 256)[:, None]  # (256, 1)
    train(model, x, torch.sin(x), steps=500, learning_rate=1e-2)

    # The new task: the same wave, moved and stretched. Adapt the layers "0" and "2" at rank 2.
    y = 0.5 + 1.5 * torch.sin(x + 1)
    before = F.mse_loss(model(x), y).item()
    inject(model, ["0", "2"], r=2, alpha=4)
    after = train(model, x, y, steps=500, learning_rate=1e-2)
    print(f"loss on the new task: {before:.4f} before, {after:.4f} after")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"trainable: {trainable} of {sum(p.numel() for p in model.parameters())} parameters")

    save(model, folder)
    adapted = model(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=0, atol=1e-5)
    print(f"the merged model equals the adapted one; the adapter is in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/lora_in_one_file"))
