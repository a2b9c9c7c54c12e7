"""Where low-rank updates start: from the weight, from the layers' inputs, from the gradient."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import distilbert, gpt2, tokens
from torch import Tensor, nn

import lora
from lora import nf4
from lora.finetune.quantized import packable
from lora.inventory import trained_parameters, wrapper_at
from lora.testing import perturb, snapshot, unchanged

TARGETS = ("q_lin", "lin2")


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 99, (4, 11), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1] * 2)})
    return found


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    plan = lora.inventory.injected(model)["default"]
    return {path: wrapper_at(model, path).adapter("default") for path in plan.targets}


def weight_of(model: nn.Module, path: str) -> Tensor:
    return wrapper_at(model, path).view.read()[0]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq_2"])
def test_the_base_is_quantized_to_the_same_bits_by_any_number_of_threads(init: str) -> None:
    """A run is opened again on other processors: its base must be the one that was trained on."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(768, 300))
            config = lora.LoRAConfig(r=8, target_modules="all-linear", init_lora_weights=init)
            lora.inject(model, config, pack=["0"])
            found.append(model[0].base_layer.weight)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("build", [distilbert, gpt2])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora"])
def test_the_start_is_the_best_of_its_rank(build, init: str) -> None:
    model = build()
    targets = TARGETS if build is distilbert else ("c_attn", "c_proj")
    config = lora.LoRAConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=init)
    lora.inject(model, config)
    for path, adapter in adapters(model).items():
        W = weight_of(model, path)
        product = adapter.scaling * (adapter.lora_B @ adapter.lora_A)
        if init == "olora":  # Q R, the first four: W's columns as far as they depend on those
            Q, R = torch.linalg.qr(W)
            torch.testing.assert_close(product / adapter.scaling, Q[:, :4] @ R[:4])
            continue
        U, S, Vh = torch.linalg.svd(W)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(product, best, atol=2e-3 if "niter" in init else 1e-5, rtol=0)
        # balanced: both factors carry the root of the singular values
        lengths = [adapter.lora_A.norm(dim=1), adapter.lora_B.norm(dim=0)]
        torch.testing.assert_close(lengths[0], lengths[1], atol=1e-4, rtol=1e-3)


def test_the_fast_svd_is_near_the_exact_one_on_a_weight_with_a_flat_spectrum() -> None:
    from lora.methods._starts import svd_lowrank

    generator = torch.Generator().manual_seed(0)
    M = torch.randn(200, 120, generator=generator) * torch.linspace(3, 0.1, 120)
    best = torch.linalg.svdvals(M)[:8].square().sum().sqrt()
    for rounds, share in ((1, 0.9), (4, 0.99), (16, 0.9999)):
        U, S, Vh = svd_lowrank(M, 8, rounds, torch.Generator().manual_seed(1))
        assert float((U.T @ M @ Vh.T).diagonal().square().sum().sqrt() / best) > share
        torch.testing.assert_close(U.T @ U, torch.eye(8), atol=1e-5, rtol=0)
        assert bool((S[:-1] >= S[1:]).all())


def test_eva_takes_the_main_directions_of_the_inputs() -> None:
    shown = batches()
    model = distilbert()
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_modules()
        if name.endswith(TARGETS)
    ]
    with torch.no_grad():
        for batch in shown:
            model(**batch)
    for hook in hooks:
        hook.remove()
    config = lora.LoRAConfig(r=4, target_modules=TARGETS, init_lora_weights="eva")
    lora.inject(model, config, batches=shown)
    assert model(tokens()).logits.equal(distilbert()(tokens()).logits)
    for path, adapter in adapters(model).items():
        real = [x[b["attention_mask"].bool()] for x, b in zip(seen[path], shown, strict=True)]
        X = torch.cat(real)
        best = torch.linalg.svdvals(X)[:4].square().sum()
        A = adapter.lora_A.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)
        assert float((X @ A.T).square().sum() / best) > 0.99
        plain = torch.linalg.qr(torch.randn(A.shape[1], 4)).Q  # what a random A catches
        assert float((X @ plain).square().sum() / best) < 0.9
        assert not adapter.lora_B.any()


def test_eva_takes_inputs_of_every_shape_and_by_keyword() -> None:
    """Pooled ones, whose width may be the batch's length; layers called with a keyword."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(99, 16), nn.Linear(16, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(input=self.table(input_ids).mean(dim=1))

    torch.manual_seed(0)
    mask = torch.ones(16, 16)
    mask[3, 5:] = 0
    shown = [{"input_ids": torch.randint(0, 99, (16, 16)), "attention_mask": mask}]
    model = Pooled()
    lora.inject(
        model, lora.LoRAConfig(r=4, target_modules=("head",), init_lora_weights="eva"),
        batches=shown,
    )  # fmt: skip
    A = adapters(model)["head"].lora_A.detach()
    torch.testing.assert_close(A @ A.T, torch.eye(4), atol=1e-5, rtol=0)


def test_lora_ga_moves_the_weight_along_its_gradient() -> None:
    """The first step of A and B changes W as a step down its own gradient would, nearly."""
    shown = batches()
    model = distilbert()
    model(**shown[0]).loss.backward()
    gradients = {}
    for batch in shown[1:]:
        model(**batch).loss.backward()
    for name, module in model.named_modules():
        if name.endswith(TARGETS):
            gradients[name] = module.weight.grad.clone()
    before = distilbert()
    before.classifier.weight.grad = torch.ones_like(before.classifier.weight)
    adapted = before.distilbert.transformer.layer[0].ffn.lin2.weight
    adapted.grad = torch.full_like(adapted, 9.0)  # the user's own, no part of the calibration
    config = lora.LoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="lora_ga")
    lora.inject(before, config, batches=shown)
    assert bool((before.classifier.weight.grad == 1).all()), "a gradient of the user's is gone"
    assert bool((adapted.grad == 9).all())
    adapted.grad = None
    assert before(tokens()).logits.equal(distilbert()(tokens()).logits)
    lora.inject(plain := distilbert(), lora.LoRAConfig(r=4, lora_alpha=8, target_modules=TARGETS))

    def along(model: nn.Module) -> dict[str, float]:
        """The cosine of the first step of the product with the step down the gradient."""
        for batch in shown:
            model(**batch).loss.backward()
        found = {}
        for path, adapter in adapters(model).items():
            A, B = adapter.lora_A, adapter.lora_B
            step = -(B.grad @ A + B @ A.grad).detach()
            found[path] = float(
                torch.cosine_similarity(step.flatten(), -gradients[path].flatten(), dim=0)
            )
        return found

    ours, random = along(before), along(plain)
    assert all(ours[path] > random[path] for path in ours)
    assert min(ours.values()) > 0.8
    for path, adapter in adapters(before).items():
        U, _, Vh = torch.linalg.svd(gradients[path])
        rows, columns = adapter.start_A @ Vh[:4].T, U[:, 4:8].T @ adapter.start_B
        for inside, whole in ((rows, adapter.start_A), (columns, adapter.start_B)):
            assert float(inside.norm() / whole.norm()) > 0.9  # the first r, and the r after them
        size = (weight_of(before, path).shape[0] ** 0.25) / math.sqrt(16)
        rows = torch.full((4,), size)
        torch.testing.assert_close(adapter.start_A.norm(dim=1), rows)
        torch.testing.assert_close(adapter.start_B.norm(dim=0), rows)


@pytest.mark.parametrize(
    ("init", "shown", "match"),
    [
        ("eva", None, "pass batches="),
        ("lora_ga", None, "pass batches="),
        ("default", [tokens()], "takes no batches"),
        ("pissa", [tokens()], "takes no batches"),
        ("eva", [], "saw 0 directions for r=8. Pass more batches"),
        ("eva", [tokens(1, 2)], "saw 2 directions"),
        ("lora_ga", [tokens()], "no loss. Pass labels"),
        ("lora_ga", [], "got no gradient"),
        ("loftq", None, "needs a base that is quantized with the adapter.*--quantize nf4"),
        ("bogus", None, "must be default, gaussian"),
    ],
)
def test_what_a_start_needs_is_said_and_the_model_left_alone(init, shown, match: str) -> None:
    model = distilbert()
    before = snapshot(model)

    def inject() -> None:
        config = lora.LoRAConfig(target_modules=TARGETS, init_lora_weights=init)
        lora.inject(model, config, batches=shown)

    with pytest.raises(lora.ConfigError, match=match):
        inject()
    assert unchanged(before, model)


def test_a_batch_that_fails_leaves_the_model_alone() -> None:
    for init in ("eva", "lora_ga"):
        model = distilbert().train()
        before = snapshot(model)
        config = lora.LoRAConfig(target_modules=TARGETS, init_lora_weights=init)
        with pytest.raises(IndexError):
            lora.inject(model, config, batches=[{"input_ids": torch.tensor([[1000]])}])
        assert unchanged(before, model)


@pytest.mark.parametrize("init", ["pissa", "olora", "eva"])
def test_a_rank_that_the_weight_has_not_is_refused(init: str) -> None:
    config = lora.LoRAConfig(r=40, target_modules=("q_lin",), init_lora_weights=init)
    with pytest.raises(lora.ConfigError, match="r must be at most 32"):
        lora.inject(distilbert(), config, batches=batches() if init == "eva" else None)


def test_lora_ga_needs_two_vectors_of_the_gradient_a_rank() -> None:
    config = lora.LoRAConfig(r=17, target_modules=("q_lin",), init_lora_weights="lora_ga")
    with pytest.raises(lora.ConfigError, match="r must be at most 16"):
        lora.inject(distilbert(), config, batches=batches())


def test_an_embedding_starts_by_default_whatever_the_others_do() -> None:
    model = gpt2()
    config = lora.LoRAConfig(r=3, target_modules=("wte", "c_attn"), init_lora_weights="pissa")
    lora.inject(model, config)
    table = adapters(model)["transformer.wte"]
    assert not table.lora_A.any()
    assert abs(float(table.lora_B.detach().std()) - 1) < 0.2
    assert model(tokens()).logits.equal(gpt2()(tokens()).logits)


def test_what_was_filed_goes_on_as_plain_lora(tmp_path) -> None:
    model = distilbert()
    config = lora.LoRAConfig(r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights="pissa")
    lora.inject(model, config)
    perturb(model.eval(), size=0.1)
    lora.save(model, tmp_path)
    other = distilbert()
    report = lora.load(other, tmp_path, trainable=True)
    assert report.plan.config.r == 6
    torch.testing.assert_close(other.eval()(tokens()).logits, model(tokens()).logits)
    assert len(trained_parameters(other, "default")) == len(trained_parameters(model, "default"))


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("init", ["eva", "lora_ga", "pissa_niter_4"])
def test_a_start_that_no_file_could_repeat_is_in_the_file(init: str, method: str, tmp_path) -> None:
    """Beside tokens of their own; read by us and by peft to the same output."""
    import warnings

    import peft

    settings = {"trainable_token_indices": (4, 9)} if method == "lora" else {}
    config = lora.METHODS[method].Config(
        r=3, lora_alpha=7, target_modules=TARGETS, init_lora_weights=init, **settings
    )
    model = distilbert(initializer_range=0.2)
    lora.inject(model, config, batches=None if "pissa" in init else batches())
    base = distilbert(initializer_range=0.2)
    torch.testing.assert_close(model.eval()(tokens()).logits, base(tokens()).logits)
    perturb(model, size=0.1)
    wanted = model(tokens()).logits
    lora.save(model, tmp_path)
    lora.load(other := distilbert(initializer_range=0.2), tmp_path)
    torch.testing.assert_close(other.eval()(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(theirs(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)
    lora.merge(model, probe=tokens())
    lora.eject(model)
    torch.testing.assert_close(model(tokens()).logits, wanted, atol=1e-5, rtol=1e-5)


def test_lora_plus_and_fa_train_what_they_say() -> None:
    model = distilbert()
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=TARGETS, loraplus_lr_ratio=16))
    from lora.finetune.train import optimizer_groups

    found = {group["lr"]: group["params"] for group in optimizer_groups(model, 1e-3, 0.01)}
    assert set(found) == {1e-3, 16e-3}
    assert {p.shape[0] for p in found[1e-3]} == {2}
    assert {p.shape[1] for p in found[16e-3]} == {2}
    model = distilbert()
    report = lora.inject(model, lora.LoRAConfig(r=2, target_modules=TARGETS, use_lorafa=True))
    assert report.trainable == sum(p.numel() for p in trained_parameters(model, "default").values())
    assert report.trainable == report.adapter_parameters == sum(row[3] for row in report.rows)
    assert {k.rpartition("lora_")[2] for k in trained_parameters(model, "default")} == {"B.weight"}


def start_of(init: str, weights: dict[str, Tensor], r: int) -> dict[str, float]:
    """How far each W lies from the packed layer and its adapter's start, in nuclear norm."""
    model = nn.ModuleDict({name: nn.Linear(W.shape[1], W.shape[0]) for name, W in weights.items()})
    with torch.no_grad():
        for name, W in weights.items():
            model[name].weight.copy_(W)
    config = lora.LoRAConfig(r=r, lora_alpha=2 * r, init_lora_weights=init)
    lora.inject(model, config, pack=list(weights))
    found = {}
    for name, layer in model.items():
        assert isinstance(layer.base_layer, nf4.NF4Linear)
        merged, _ = layer.adapter("default").merged(*layer.view.read())
        found[name] = torch.linalg.svdvals(weights[name] - merged.detach()).sum().item()
    return found


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "loftq_4"])
def test_a_start_takes_up_what_packing_leaves(init: str) -> None:
    torch.manual_seed(0)
    weights = {"wide": torch.randn(96, 160) / 10, "tall": torch.randn(128, 64) / 10}
    plain, better = start_of("default", weights, 24), start_of(init, weights, 24)
    for name, W in weights.items():
        left = (W - nf4.dequantize(nf4.quantize(W, double_quant=True))).double()
        assert plain[name] == pytest.approx(torch.linalg.svdvals(left).sum().item(), rel=1e-4)
        assert better[name] < plain[name]
    if init == "loftq_4":
        once = start_of("loftq", weights, 24)
        assert sum(better.values()) < sum(once.values())


def test_loftq_is_the_best_of_its_rank_for_what_rounding_left() -> None:
    """Li et al. 2023, algorithm 1, written out."""
    torch.manual_seed(0)
    W, r = torch.randn(48, 32), 5
    update = torch.zeros_like(W)
    for _ in range(3):
        Q = nf4.dequantize(nf4.quantize(W - update, double_quant=True))
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        update = U[:, :r] * S[:r] @ Vh[:r]
    model = nn.Sequential(nn.Linear(32, 48))
    with torch.no_grad():
        model[0].weight.copy_(W)
    lora.inject(model, lora.LoRAConfig(r=r, lora_alpha=3, init_lora_weights="loftq_3"), pack=["0"])
    adapter = model[0].adapter("default")
    assert torch.equal(nf4.dequantize(model[0].base_layer.quantized()), Q)
    torch.testing.assert_close(adapter.update(), update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["default", "pissa", "loftq", "lora_ga"])
def test_a_base_packed_with_the_injection_is_trained_filed_and_had_again(
    init: str, tmp_path
) -> None:
    config = lora.LoRAConfig(r=3, target_modules=("q_lin", "lin2"), init_lora_weights=init)
    shown = batches() if init == "lora_ga" else None

    def packed() -> nn.Module:
        model = distilbert()
        lora.inject(model, config, batches=shown, pack=packable(model))
        return model

    model = packed()
    names = {n for n, m in model.named_modules() if isinstance(m, nf4.NF4Linear)}
    assert len(names) == 12  # the layers without an adapter too
    perturb(model)
    wanted = model(tokens()).logits
    wanted.sum().backward()
    lora.save(model, tmp_path / "adapter")
    filed = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert filed["r"] == (6 if init == "lora_ga" else 3)  # what took up the rest starts from it
    other = packed()
    lora.eject(other)
    assert not any(p.requires_grad for n, p in other.named_parameters() if p.dtype == torch.uint8)
    lora.load(other, tmp_path / "adapter")
    found = other(tokens()).logits
    if init == "lora_ga":  # filed as the plain update of twice the rank
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, wanted)


def test_what_takes_up_nothing_begins_as_the_packed_base() -> None:
    model, plain = distilbert(), distilbert()
    nf4.quantize_layers(plain, packable(plain))
    lora.inject(model, lora.LoRAConfig(r=3), pack=packable(model))
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_a_packed_start_is_not_made_again() -> None:
    model = distilbert()
    config = lora.LoRAConfig(r=3, init_lora_weights="pissa")
    lora.inject(model, config, pack=packable(model))
    with pytest.raises(lora.ConfigError, match="quantized together with this adapter's"):
        lora.init(model, 1)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["nowhere"], "the model has no layer 'nowhere'"),
        (["distilbert.embeddings.word_embeddings"], "is Embedding. Name linear layers"),
        (["distilbert.transformer"], "no view for Transformer"),
    ],
)
def test_what_cannot_be_packed_is_named_and_the_model_left_alone(names, match: str) -> None:
    model = distilbert()
    before = snapshot(model)
    with pytest.raises(lora.LoraError, match=match):
        lora.inject(model, lora.LoRAConfig(target_modules=TARGETS), pack=names)
    assert unchanged(before, model)
    with torch.no_grad():
        lin2 = model.distilbert.transformer.layer[1].ffn.lin2
        lin2.weight[0, 0] = torch.nan
    with pytest.raises(lora.LoraError, match="lin2 holds NaN"):
        lora.inject(model, lora.LoRAConfig(target_modules=TARGETS), pack=packable(model))
    assert not any(isinstance(m, nf4.NF4Linear) for m in model.modules())
    assert not lora.inventory.injected(model)


def test_random_values_are_the_cpus_whatever_the_default_device() -> None:
    from lora.methods._starts import svd_lowrank

    M = torch.randn(12, 9)
    expected = svd_lowrank(M, 2, 2, torch.Generator().manual_seed(0))
    with torch.device("meta"):
        got = svd_lowrank(M, 2, 2, torch.Generator().manual_seed(0))
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
