"""What test_distributed.py runs as several processes: python tests/ranks.py JOB FOLDER."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from architectures import tokenizer
from torch import Tensor, nn

import lora
from lora.errors import DataError, LoraError, TrainingError
from lora.finetune import distributed
from lora.finetune.distributed import rank, shard, size, together, total
from lora.finetune.memory import set_dtype
from lora.finetune.models import Base, load_base
from lora.identity import fingerprint
from lora.kernels import products


def make_base(folder: Path) -> None:
    """LLaMA for two classes, 2 layers of 32, some of whose sizes are odd; without its head."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=47, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, max_position_embeddings=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def read(folder: Path, kind: str) -> Base:
    """The base: `nf4` packs it, `read` keeps this rank's pieces alone."""
    part = (rank(), size()) if "read" in kind else None
    return load_base(
        str(folder), 2, "classification", 3, "nf4" if "nf4" in kind else "none", part=part
    )


def build(folder: Path, kind: str, **settings: Any) -> nn.Module:
    """An adapted base; `sharded` and `read` are in pieces, with each block checkpointed."""
    base = read(folder, kind)
    model: nn.Module = base.model
    settings = {"r": 4, "modules_to_save": ("score",)} | settings
    lora.inject(model, lora.LoRAConfig(**settings), seed=5)
    if "sharded" in kind or "read" in kind:
        enable: Any = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        shard(model, base.pieces, seed=5)
        assert not base.pieces
    return model.train()


def rows(step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step, 7 rows, and in every tenth step one: ids and labels."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 99, (1 if step % 10 == 9 else 7, 11), generator=generator)
    return ids, ids[:, -1] % 2


def own_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """This rank's share of the mean over the batch; a rank without a row takes one for 0."""
    mine = slice(rank(), None, size())
    count = len(ids[mine])
    mine = mine if count else slice(0, 1)
    logits = model(input_ids=ids[mine]).logits
    loss = F.cross_entropy(logits, labels[mine], reduction="sum") / len(ids)
    return loss if count else 0 * loss


def fit(model: nn.Module, steps: int = 20) -> list[float]:
    """The loss of each batch, over all ranks."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    found = []
    for step in range(steps):
        loss = own_loss(model, *rows(step))
        loss.backward()
        value = loss.detach().clone()
        total([value, *(p.grad for p in trained if p.grad is not None)])
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


def held(model: nn.Module) -> int:
    """Bytes of the parameters that this rank holds."""
    local = (getattr(p, "_local_tensor", p) for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def losses(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("dense", "nf4", "dense sharded", "nf4 sharded", "dense read", "nf4 read"):
        model = build(folder, kind)
        found[kind] = {"held": held(model), "fingerprint": fingerprint(model)}
        found[kind]["losses"] = fit(model, 10 if "read" in kind else 20)
        writes = rank() == 0
        to = folder / "adapters" / (kind if writes else "nowhere")
        assert lora.save(model, to, writes=writes) == to
        model.eval()
        with torch.no_grad():
            found[kind]["logits"] = model(input_ids=rows(0)[0]).logits.tolist()
    return found


def starts(folder: Path) -> dict[str, bool]:
    """Whether an adapter begins on a base in pieces as on the whole, bit for bit."""
    found = {}
    configs = {
        "pissa": lora.LoRAConfig(r=4, init_lora_weights="pissa"),
        "dora": lora.DoRAConfig(r=4),
        "tokens": lora.LoRAConfig(r=4, trainable_token_indices=(3, 5)),
        "embedding saved": lora.LoRAConfig(r=4, modules_to_save=("embed_tokens",)),
        "bitfit": lora.BitFitConfig(modules_to_save=("score",)),
        "full": lora.FullConfig(),
    }
    for name, config in configs.items():
        whole, cut = read(folder, "dense"), read(folder, "dense read")
        for base in (whole, cut):
            lora.inject(base.model, config)
        shard(cut.model, cut.pieces)
        pairs = zip(whole.model.named_parameters(), cut.model.named_parameters(), strict=True)
        found[name] = all(
            n == m and p.requires_grad == q.requires_grad and torch.equal(p, _all(q))
            for (n, p), (m, q) in pairs
        )
        outputs = [base.model(input_ids=rows(0)[0]).logits for base in (whole, cut)]
        found[name] &= torch.equal(*outputs)
    return found


def _all(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def kinds(folder: Path) -> dict[str, float]:
    """How far gradients on a model in pieces are from those on the whole, by kind of model."""
    from conftest import bert_lm, gpt2, tokens

    def albert() -> nn.Module:  # one block, called three times
        torch.manual_seed(0)
        config = transformers.AlbertConfig(
            hidden_size=32, embedding_size=16, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2, vocab_size=99, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return transformers.AlbertForSequenceClassification(config)

    found = {}
    every = {"r": 2, "target_modules": "all-linear"}
    for name, make, config in (
        ("bert", bert_lm, lora.LoRAConfig(**every)),
        ("gpt2", gpt2, lora.DoRAConfig(**every)),
        ("gpt2, tied head saved", gpt2, lora.LoRAConfig(**every, modules_to_save=("lm_head",))),
        ("gpt2, full", gpt2, lora.FullConfig()),
        ("albert", albert, lora.LoRAConfig(**every)),
    ):
        grads = []
        for whole in (True, False):
            model = make().eval()
            lora.inject(model, config)
            if not whole:
                shard(model)
            for _ in range(2):
                model.zero_grad()
                model(input_ids=tokens()).logits.square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        found[name] = apart(*grads)
    return found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference, over the largest value."""
    assert one.keys() == other.keys()
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    return max(float((one[key] - other[key]).abs().max()) for key in one) / largest


def reference(folder: Path) -> float:
    """How far the summed gradients are from those of torch's own DistributedDataParallel."""
    ids, labels = rows(0)
    models = [build(folder, "dense"), build(folder, "dense")]
    own_loss(models[0], ids, labels).backward()
    total([p.grad for p in models[0].parameters() if p.grad is not None])
    wrapped = nn.parallel.DistributedDataParallel(models[1])  # takes the mean over the ranks
    (size() * own_loss(wrapped, ids, labels)).backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
    return apart(*grads)


def alone(folder: Path) -> dict[str, float]:
    """How far a layer of a base in pieces is, called by itself, from one of the whole base."""
    found = {}
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    for kind in ("dense", "nf4"):
        layers = [
            build(folder, f"{kind}{more}").get_submodule("model.layers.0.self_attn.q_proj")
            for more in ("", " sharded")
        ]
        found[kind] = apart(*({"y": layer(x).detach()} for layer in layers))
    return found


def casts(folder: Path) -> int:
    """How many casts of weights are left after a step in bfloat16 on a base held in it."""
    base = read(folder, "read")
    lora.inject(base.model, lora.LoRAConfig(r=4, target_modules="all-linear"))
    set_dtype(base.model, "bfloat16")
    shard(base.model, base.pieces)
    before = len(products._casts)
    with torch.autocast("cpu", torch.bfloat16):
        own_loss(base.model, *rows(0)).backward()
    return len(products._casts) - before


def messages(folder: Path) -> dict[str, Any]:
    mine = float(rank() + 1)
    tensors = [torch.full((2, 2), mine), torch.tensor(mine), torch.tensor([rank() + 1])]
    strided = torch.zeros(3, 2).T.fill_(mine)
    total([*tensors, strided])
    for tensor in (*tensors, strided):
        assert bool((tensor == 3).all())
    distributed.same([fresh := torch.full((3,), mine)])
    return {"same": fresh.tolist(), "gather": distributed.gather({"rank": rank()})}


def errors(folder: Path) -> dict[str, str]:
    """What comes out of alike() on this rank, by the ranks on which an error is met in it."""
    found = {}
    for where in ((), (0, 1), (1,), (0,)):
        try:
            with distributed.alike():
                if rank() in where:
                    raise DataError(f"no such file, says {rank()}.")
            found[str(where)] = "came out"
        except LoraError as error:
            found[str(where)] = f"{type(error).__name__}: {error}"
        except SystemExit as stop:
            found[str(where)] = f"left with {stop.code}"
        if rank() == 0 and where:
            distributed.gather(None)  # in place of leaving, which the others wait for
    return found


def check(folder: Path) -> None:
    jobs = (losses, starts, kinds, reference, alone, casts, messages, errors)
    found = {job.__name__: job(folder) for job in jobs}
    (folder / f"rank-{rank()}.json").write_text(json.dumps(found))


def die(folder: Path) -> None:
    """Rank 1 is killed in the fourth step, the base in pieces."""
    model = build(folder, "dense sharded")
    trained = [p for p in model.parameters() if p.requires_grad]
    for step in range(1000):
        if step == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with together():
            own_loss(model, *rows(step)).backward()
        total([p.grad for p in trained if p.grad is not None])


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        with distributed.group():
            globals()[sys.argv[1]](Path(sys.argv[2]))
    except TrainingError as error:
        print(f"TrainingError: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
