"""Steps of a LLaMA on a device, ours beside peft's and full fine-tuning, for benchmarks.gpu.

The base has Llama-3-8B's sizes and random weights in bfloat16, made on the device; --tiny has small
ones. r = 16 on all linears of the blocks, AdamW. No attention mask. "limit" is a step in which
every weight is frozen and the gradient flows to the embeddings' output: no adapter can be faster.
"""

from __future__ import annotations

import copy
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora
from benchmarks.step import embeddings_pass_gradient, with_lora, with_peft
from benchmarks.turns import median, ratio, take_turns
from lora import nf4
from lora.finetune.devices import deterministic
from lora.finetune.losses import batch_loss
from lora.finetune.memory import checkpoint_activations
from lora.kernels import adapters_constant

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R = 16
PEFT = {"r": R, "lora_alpha": 2 * R}


@dataclass(frozen=True)
class Bench:
    """A device, and the sizes of what is measured on it."""

    device: torch.device
    tiny: bool
    ends: float  # when the script's time is over, of time.perf_counter()

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], Any]) -> float:
        """Returns the seconds of one call, with all that it started on the device."""
        if self.on_cuda:
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            run()
            ended.record()
            torch.cuda.synchronize()
            return float(began.elapsed_time(ended)) / 1000
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def compare(
        self,
        contenders: Mapping[str, Callable[[], Any]],
        ratios: Sequence[tuple[str, str]] = (),
        rounds: int = 7,
    ) -> dict[str, Any]:
        """Returns the contenders' median seconds and the ratios, from interleaved rounds after a
        call each that is not counted."""
        for run in contenders.values():
            run()
        timed = {name: lambda run=run: self.seconds(run) for name, run in contenders.items()}
        found = take_turns(timed, 2 if self.tiny else rounds)
        return {
            "seconds": {name: median(found, name) for name in contenders},
            "ratios": {f"{a} / {b}": ratio(found, a, b) for a, b in ratios},
        }

    def device_seconds(self, run: Callable[[], Any], calls: int = 10) -> float:
        """Returns the seconds that the device computes in one call. One small operation takes less
        than its launch, which `seconds` would measure; on a CPU there is no difference."""
        run()
        if not self.on_cuda:
            return self.seconds(run)
        kernels = self.kernels(lambda: [run() for _ in range(calls)])
        return sum(seconds for _, seconds in kernels) / calls

    def kernels(self, run: Callable[[], Any]) -> list[tuple[str, float]]:
        """Returns the name and the seconds of each kernel that a call starts; none on a CPU."""
        if not self.on_cuda:
            return []
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            run()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        return [
            (event.name, event.device_time_total / 1e6)
            for event in seen.events()
            if event.device_type == cuda
        ]

    def memory(self) -> int:
        """Returns the bytes that are allocated on the device; 0 on the CPU."""
        return torch.cuda.memory_allocated() if self.on_cuda else 0

    @contextmanager
    def peak(self, result: dict[str, int], name: str) -> Iterator[None]:
        """Stores the most bytes that were allocated inside, above those before; 0 on the CPU."""
        before = self.memory()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        yield
        result[name] = torch.cuda.max_memory_allocated() - before if self.on_cuda else 0

    def free(self) -> None:
        """Give the memory of models that are gone back to the device."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    # -- the base

    def llama(self, layers: int, head: bool = True) -> Any:
        """Returns a LLaMA with random weights, in bfloat16 on the device, in train mode."""
        sizes = {
            "hidden_size": 64 if self.tiny else 4096,
            "intermediate_size": 128 if self.tiny else 14336,
            "num_attention_heads": 4 if self.tiny else 32,
            "num_key_value_heads": 2 if self.tiny else 8,
            "vocab_size": 256 if self.tiny else 128256,
        }
        config = transformers.LlamaConfig(
            **sizes, num_hidden_layers=self.layers(layers), rope_theta=5e5,
            max_position_embeddings=8192, attn_implementation="sdpa", pad_token_id=0,
        )  # fmt: skip
        kind = transformers.AutoModelForCausalLM if head else transformers.AutoModel
        torch.manual_seed(0)
        with torch.device(self.device):
            return kind.from_config(config, dtype=torch.bfloat16).train()

    def layers(self, layers: int) -> int:
        return min(layers, 2) if self.tiny else layers

    def ids(self, rows: int, length: int, model: Any) -> Tensor:
        """Returns random token ids (rows, length)."""
        size = (2, 16) if self.tiny and rows > 1 else (1, 32) if self.tiny else (rows, length)
        generator = torch.Generator(device="cpu").manual_seed(0)
        ids = torch.randint(1, model.config.vocab_size, size, generator=generator)
        return ids.to(self.device)


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Returns the mean loss of the next token; of a model without a head, a mean of its output."""
    if model.get_output_embeddings() is None:
        hidden: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.float().square().mean()
    positions = torch.arange(ids.numel(), device=ids.device).view(ids.shape)[:, :-1].reshape(-1)
    targets = torch.stack([positions, ids[:, 1:].reshape(-1)])
    return batch_loss(model, {"input_ids": ids}, targets, "text") / targets.shape[1]


def stepper(model: Any, ids: Tensor, mixed: AbstractContextManager[Any]) -> Callable[[], None]:
    """Returns what does one step: forward, backward, AdamW. peft's wrapper is taken off: its base
    model holds the adapters."""
    model = getattr(model, "get_base_model", lambda: model)()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def step() -> None:
        with mixed:
            loss = loss_of(model, ids)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def frozen(model: Any) -> Any:
    """The limit: the gradient flows to the embeddings' output, and nothing is trained."""
    embeddings_pass_gradient(model.requires_grad_(False))
    return model


def ours(model: Any, method: str = "lora", **more: Any) -> Any:
    adapted: Any = with_lora(model, LINEARS, method, r=R, lora_alpha=2 * R, **more)
    embeddings_pass_gradient(adapted)
    return adapted


def pefts(model: Any, dropout: float = 0.0, adapters_in_16_bits: bool = False) -> Any:
    adapted: Any = with_peft(model, LINEARS, **PEFT, lora_dropout=dropout)
    if adapters_in_16_bits:
        adapted.to(torch.bfloat16)
    embeddings_pass_gradient(adapted.get_base_model())
    return adapted


def have(package: str) -> bool:
    """True if the package can be imported."""
    try:
        __import__(package)
    except ImportError:
        return False
    return True


# -- sections

Build = Callable[[], Any]


def steps(
    bench: Bench,
    builders: Mapping[str, Build],
    rows: int,
    length: int,
    ratios: Sequence[tuple[str, str]],
    rounds: int = 7,
) -> dict[str, Any]:
    """Returns the seconds, tokens/s, peak bytes and kernels of each contender's step, and ratios.

    Rounds are interleaved: the CPU that launches the kernels may be shared with others, and then
    takes up to twice as long for the same step. A contender for which memory is short is left out.
    """
    taking: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    result: dict[str, Any] = {"peak bytes": peaks, "profiles": {}, "out of memory": {}}
    for name, build in builders.items():
        try:
            with bench.peak(peaks, name):
                model = build()
                ids = bench.ids(rows, length, model)
                # Users of peft in bfloat16 without autocast get float32 products with its adapters.
                step = stepper(model, ids, nullcontext() if "peft" in name else autocast(bench))
                if "deterministic" in name:
                    step = partial(deterministically, step)
                for _ in range(2):
                    step()
            result["profiles"][name] = profile_of(bench, step)
            taking[name], result["tokens"] = step, ids.numel()
        except torch.OutOfMemoryError as error:
            result["out of memory"][name] = str(error).split(".")[0]
        model = step = None
        bench.free()
    result |= bench.compare(taking, [pair for pair in ratios if taking.keys() >= set(pair)], rounds)
    result["tokens per second"] = {
        name: result["tokens"] / seconds for name, seconds in result["seconds"].items()
    }
    return result


def shell(base: Any) -> Any:
    """Returns a copy of the model that shares its weights, so that contenders with an adapter each
    have one 8B base in memory. Its bytes are in none of their peaks."""
    return copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})


def bytes_of(model: Any) -> int:
    return sum(weight.nbytes for weight in model.parameters())


def steps_of_8_layers(bench: Bench, peak_flops: float) -> dict[str, Any]:
    """Steps of 4 rows of 2048 tokens, and their share of the rate of the measured products."""
    base = bench.llama(8, head=False)
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    del base
    builders: dict[str, Build] = {
        "limit": lambda: frozen(bench.llama(8, head=False)),
        "ours": lambda: ours(bench.llama(8, head=False)),
        "ours, dropout": lambda: ours(bench.llama(8, head=False), lora_dropout=0.1),
        "ours, deterministic": lambda: ours(bench.llama(8, head=False)),
        "full": lambda: bench.llama(8, head=False),
    }
    if have("peft"):
        builders |= {
            "peft": lambda: pefts(bench.llama(8, head=False)),
            "peft, dropout": lambda: pefts(bench.llama(8, head=False), dropout=0.1),
            "peft, adapters in bfloat16": lambda: pefts(
                bench.llama(8, head=False), adapters_in_16_bits=True
            ),
        }
    ratios = [
        ("ours", "limit"), ("ours, dropout", "limit"), ("full", "limit"), ("peft", "limit"),
        ("ours", "peft"), ("ours, dropout", "peft, dropout"),
        ("ours", "peft, adapters in bfloat16"), ("ours", "full"),
        ("ours, deterministic", "ours"),
    ]  # fmt: skip
    result = steps(bench, builders, 4, 2048, ratios)
    result["share of the products' rate"] = {
        name: (6 if name == "full" else 4) * linear * rate / peak_flops
        for name, rate in result["tokens per second"].items()
    }
    return result


def deterministically(step: Callable[[], None]) -> None:
    """A step as --deterministic takes it."""
    with deterministic(True):
        step()


def profile_of(bench: Bench, step: Callable[[], Any]) -> dict[str, Any]:
    """Returns how many kernels a step starts on the device, the seconds that they take, and the
    names of those that take most; none on a CPU."""
    kernels = bench.kernels(step)
    times: Counter[str] = Counter()
    for name, seconds in kernels:
        times[name[:90]] += seconds
    return {"kernels": len(kernels), "seconds": times.total(), "most": dict(times.most_common(15))}


def all_layers(bench: Bench) -> dict[str, Any]:
    """Steps of all 32 layers and the head, with activation checkpointing and without."""
    base = bench.llama(32)
    result: dict[str, Any] = {"base bytes": bytes_of(base)}
    for kind in ("plain", "checkpointed"):
        builders: dict[str, Build] = {
            "limit": lambda: frozen(shell(base)),
            "ours": lambda: ours(shell(base)),
        }
        if have("peft"):
            builders["peft"] = lambda: pefts(shell(base))
        if kind == "checkpointed":
            checkpoint_activations(base)
            builders["ours, dropout"] = lambda: ours(shell(base), lora_dropout=0.1)
            if have("peft"):
                builders["peft, dropout"] = lambda: pefts(shell(base), dropout=0.1)
        ratios = [("ours", "limit"), ("ours", "peft"), ("ours, dropout", "limit"),
                  ("ours, dropout", "peft, dropout")]  # fmt: skip
        result[kind] = steps(bench, builders, 4, 2048, ratios, rounds=5)
    return result


def autocast(bench: Bench) -> AbstractContextManager[Any]:
    return torch.autocast(bench.device.type, torch.bfloat16)


def pack_blocks(model: Any) -> None:
    """Pack the linears of the blocks in NF4, doubly quantised."""
    names = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in LINEARS]
    nf4.quantize_layers(model, names, double_quant=True)


def bitsandbytes_blocks(model: Any) -> None:
    """Put bitsandbytes' NF4 layers in place of the linears of the blocks, doubly quantised."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEARS:
            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            packed.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(layer.weight.device)
            model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True  # peft reads it


def qlora(bench: Bench) -> dict[str, Any]:
    """Steps on a base in 4 bits and on one in 16, rows of 4096 tokens, plain and checkpointed;
    beside bitsandbytes and peft."""
    bases = {"bf16": bench.llama(32), "nf4": bench.llama(32)}
    pack_blocks(bases["nf4"])
    if have("bitsandbytes") and have("peft"):
        bases["bitsandbytes, peft"] = bench.llama(32)
        bitsandbytes_blocks(bases["bitsandbytes, peft"])
    bench.free()
    result: dict[str, Any] = {"base bytes": {name: bytes_of(each) for name, each in bases.items()}}
    for kind in ("plain", "checkpointed"):
        builders: dict[str, Build] = {}
        for name, base in bases.items():
            if kind == "checkpointed":
                checkpoint_activations(base)
            adapt = pefts if "peft" in name else ours
            builders[name] = lambda base=base, adapt=adapt: adapt(shell(base))
        ratios = [("nf4", "bf16"), ("nf4", "bitsandbytes, peft")]
        result[kind] = steps(bench, builders, 1, 4096, ratios)
    return result


def writing(bench: Bench) -> dict[str, Any]:
    """Tokens per second of greedy decoding, 32 new tokens, for one prompt and for 32, and each
    rate over the base's."""
    base = bench.llama(32).eval()
    config = lora.LoRAConfig(r=R, target_modules=LINEARS)
    models = {"base": base, "ours": shell(base), "ours, merged": copy.deepcopy(base)}
    for name in ("ours", "ours, merged"):
        lora.inject(models[name], config)
    lora.merge(models["ours, merged"])
    packers = {"NF4": pack_blocks}
    if have("peft"):
        models["peft"] = pefts(shell(base)).get_base_model()
    if have("bitsandbytes"):
        packers["bitsandbytes"] = bitsandbytes_blocks
    for name, pack in packers.items():
        models[name] = bench.llama(32)
        pack(models[name])
        bench.free()
    new, result = 4 if bench.tiny else 32, {}
    for batch in (1, 2 if bench.tiny else 32):
        ids = bench.ids(batch, 32, base)
        contenders = {
            name: partial(written, model.eval(), ids, new) for name, model in models.items()
        }
        others = [name for name in models if name != "base"]
        found = bench.compare(contenders, [("base", name) for name in others], rounds=3)
        result[f"batch of {batch}"] = {
            "tokens per second": {
                name: len(ids) * new / seconds for name, seconds in found["seconds"].items()
            },
            "rate / base's": {name: found["ratios"][f"base / {name}"] for name in others},
        }
    return result


def written(model: Any, ids: Tensor, new: int) -> None:
    """Decode `new` tokens greedily, as `lora generate` does."""
    with torch.inference_mode(), adapters_constant():
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
