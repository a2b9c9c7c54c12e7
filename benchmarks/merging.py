"""How far a merge moves a model's output, against what rounding alone moves it by.

    python -m benchmarks.merging [--real FOLDER]

For models of 2 to 32 layers, and one of wide layers, with adapters that were perturbed and ones
that were trained, in float32 and bfloat16: the largest change of the output on a batch by our merge
and by PEFT's of the same file, both as multiples of the rounding that lora.merge measures, and the
same of three merges that are wrong. `--real` adds a model from a folder, trained on eight texts.
Errors, not times: any machine will do.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lora
from benchmarks.machine import RESULTS, write
from lora.inventory import trained_parameters, wrappers_of
from lora.merging import SLACK, _rounding, output_on
from lora.testing import perturb

IDS = torch.randint(3, 900, (8, 24), generator=torch.Generator().manual_seed(1))
TEXTS = (
    "The film was a delight from its first scene to the last.",
    "Water boils at 100 degrees Celsius at sea level, and lower on mountains.",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time there was a small fox who lived near the river bank.",
    "Paris is the capital of France, and Rome that of Italy.",
    "The sailors rode the breeze clear of the rocks.",
    "2 + 2 = 4 and 3 + 3 = 6.",
    "I would like a cup of tea, please.",
)


def llama(layers: int, width: int = 128) -> Any:
    shape = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
             "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=999, **shape))


def gpt2(layers: int) -> Any:
    config = transformers.GPT2Config(n_embd=128, n_layer=layers, n_head=4, vocab_size=999)
    return transformers.GPT2LMHeadModel(config)


def bert(layers: int) -> Any:
    shape = {"hidden_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4,
             "intermediate_size": 512}  # fmt: skip
    config = transformers.BertConfig(vocab_size=999, num_labels=2, **shape)
    return transformers.BertForSequenceClassification(config)


def t5(layers: int) -> Any:
    shape = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": layers, "num_heads": 4}
    config = transformers.T5Config(vocab_size=999, decoder_start_token_id=0, **shape)
    return transformers.T5ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    f"{build.__name__} of {layers} layers": lambda build=build, layers=layers: build(layers)
    for build in (llama, gpt2, bert, t5)
    for layers in (2, 8, 32)
} | {"llama of 2 layers, 1,024 wide": lambda: llama(2, 1024)}


def train(model: Any, batch: dict[str, Tensor], steps: int, rate: float) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def wrong_merges(model: Any, probe: Any) -> dict[str, Tensor]:
    """The output of the model, merged, after each of three mistakes."""
    layers = [layer for layer in wrappers_of(model)[0].values() if layer.kept is not None]
    middle = layers[len(layers) // 2]
    square = [layer for layer in layers if layer.in_features == layer.out_features]

    def after(mistake: Callable[[Tensor, Tensor], Tensor], some: list[Any]) -> Tensor:
        right = [layer.base_layer.weight for layer in some]
        for layer, weight in zip(some, right, strict=True):
            was = layer.kept[0].float()
            new = (was + mistake(was, weight.float() - was)).to(weight.dtype)
            layer.base_layer._parameters["weight"] = nn.Parameter(new, False)
        found = output_on(model, probe)
        for layer, weight in zip(some, right, strict=True):
            layer.base_layer._parameters["weight"] = weight
        return found

    return {
        "scaled twice": after(lambda was, update: 2 * update, layers),
        "one layer missing": after(lambda was, update: 0 * update, [middle]),
        "transposed": after(lambda was, update: update.T, square),
    }


def measure(base: Any, model: Any, probe: dict[str, Tensor]) -> dict[str, Any]:
    """What a merge of the model does to its output, and PEFT's merge of the same file on a base."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lora.save(model, folder)
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()
        apart = theirs(**probe).logits.float()
        plain = theirs.merge_and_unload()
        peft_moved = float((plain(**probe).logits.float() - apart).abs().max())
    before = output_on(model, probe)
    with lora.disabled(model):
        effect = float((output_on(model, probe) - before).abs().max())
    layers = list(wrappers_of(model)[0].values())
    lora.merge(model)
    after = output_on(model, probe)
    rounding = _rounding(model, layers, probe, after, layers[0].weight.dtype)
    wrong = {
        name: float((output - before).abs().max()) / rounding
        for name, output in wrong_merges(model, probe).items()
    }
    lora.restore(model)
    moved = float((after - before).abs().max())
    return {
        "largest_output": float(before.abs().max()),
        "adapter_moves_by": effect,
        "merge_moved": moved,
        "peft_merge_moved": peft_moved,
        "rounding": rounding,
        "times": {"merge": moved / rounding, "peft": peft_moved / rounding, **wrong},
    }


def cast(model: Any, dtype: torch.dtype) -> Any:
    """The base in `dtype`, the adapters in float32 as they are."""
    values = {name: p.detach().clone() for name, p in trained_parameters(model, "default").items()}
    model.to(dtype)
    for layer in wrappers_of(model)[0].values():
        layer.adapters.float()
    with torch.no_grad():
        for name, parameter in trained_parameters(model, "default").items():
            parameter.copy_(values[name])
    return model


def adapted(base: Any, trains: bool, batch: dict[str, Tensor], steps: int, rate: float) -> Any:
    model = copy.deepcopy(base)
    lora.inject(model, lora.LoRAConfig(r=8, target_modules="all-linear"))
    if trains:
        train(model, batch, steps, rate)
    else:
        perturb(model, size=0.02)
    return model.eval()


def real(folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A model, what it is probed with, and what it is trained on."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    probe = dict(tokenizer([*TEXTS], return_tensors="pt", padding=True))
    labels = probe["input_ids"].masked_fill(probe["attention_mask"] == 0, -100)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, probe, {**probe, "labels": labels}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--real", type=Path)
    flags.add_argument("--output", type=Path, default=RESULTS / "merging.json")
    given = flags.parse_args()
    transformers.logging.set_verbosity_error()
    rows = []

    def add(name: str, base: Any, model: Any, probe: dict[str, Tensor], how: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            found = measure(base.to(dtype).eval(), cast(model, dtype), probe)
            short = str(dtype).removeprefix("torch.")
            rows.append({"model": name, "dtype": short, "adapter": how, **found})
            times = ", ".join(f"{what} {value:.3g}" for what, value in found["times"].items())
            print(f"{name}, {short}, {how}: {times}", flush=True)
            base.float()

    for name, make in MODELS.items():
        torch.manual_seed(0)
        base = make().eval()
        classifies = type(base).__name__.endswith("SequenceClassification")
        batch = {"input_ids": IDS, "labels": torch.arange(8) % 2 if classifies else IDS}
        probe = {"input_ids": IDS}
        if base.config.is_encoder_decoder:
            probe["decoder_input_ids"] = IDS[:, :8]
        for trains in (False, True):
            rate = 1e-3 if classifies else 1e-2  # at which two classes are not yet saturated
            model = adapted(base, trains, batch, 10, rate)
            add(name, copy.deepcopy(base), model, probe, "trained" if trains else "perturbed")
    if given.real:
        base, probe, batch = real(given.real)
        model = adapted(base, True, batch, 24, 2e-3)
        add(f"{given.real.name}, {base.config.num_hidden_layers} layers", base, model, probe,
            "trained")  # fmt: skip
    most = {
        dtype: {
            what: max(row["times"][what] for row in rows if row["dtype"] == dtype)
            for what in ("merge", "peft")
        }
        for dtype in ("float32", "bfloat16")
    }
    least = {
        dtype: min(
            value
            for row in rows
            if row["dtype"] == dtype
            for what, value in row["times"].items()
            if what not in ("merge", "peft")
        )
        for dtype in most
    }
    slack = {"float32": SLACK[4], "bfloat16": SLACK[2]}
    write(
        given.output, {"slack": slack, "most": most, "least_of_wrong_merges": least, "rows": rows}
    )


if __name__ == "__main__":
    main()
