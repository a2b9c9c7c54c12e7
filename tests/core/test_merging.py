"""Merging with a certificate, and what trains parameters of the base itself."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import safetensors.torch
import torch
import transformers
from conftest import distilbert, gpt2, llama, tokens
from torch import nn

import lora
from lora.inventory import trained_parameters
from lora.testing import perturb, snapshot, unchanged
from lora.wrappers import AdaptedLayer

METHODS = ["lora", "dora", "ia3", "hira", "vera", "adalora"]


def adapted(method: str, build=distilbert, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build().to(dtype)
    lora.inject(model, lora.METHODS[method].Config())
    perturb(model.eval(), size=0.05)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [distilbert, gpt2, llama])
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_is_certified(method: str, build, dtype: torch.dtype) -> None:
    model = adapted(method, build, dtype)
    wanted = model(tokens()).logits.float()
    certificate = lora.merge(model, probe=tokens())
    moved = float((model(tokens()).logits.float() - wanted).abs().max().detach())
    assert certificate.largest_difference == moved
    assert certificate.largest_output == float(wanted.abs().max().detach())
    assert certificate.dtype == dtype
    assert (
        moved <= certificate.tolerance <= 256 * torch.finfo(dtype).eps * certificate.largest_output
    )
    assert str(certificate.layers) in str(certificate)
    assert "outputs changed by" in str(certificate)


def test_without_a_probe_nothing_is_certified() -> None:
    certificate = lora.merge(adapted("lora"))
    assert certificate.largest_difference is None
    assert "not certified: no probe was passed" in str(certificate)


@pytest.mark.parametrize("as_what", [dict, tuple, torch.Tensor])
def test_a_probe_is_what_the_model_takes(as_what) -> None:
    probe = {dict: {"input_ids": tokens()}, tuple: (tokens(),), torch.Tensor: tokens()}[as_what]
    assert lora.merge(adapted("lora"), probe=probe).largest_difference is not None


def test_a_merge_that_moves_the_output_too_far_is_refused_and_undone() -> None:
    """A layer whose forward is more than its weight: no W' computes what it does."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    torch.manual_seed(0)
    model = Noisy()
    lora.inject(model, lora.LoRAConfig(r=2))
    perturb(model.train(), size=0.3)
    model.first.register_forward_hook(lambda module, _, y: y if module.kept is None else 1.01 * y)
    before = snapshot(model)
    with pytest.raises(
        lora.MergeError, match=r"changed by .* 32 times what rounding in float32 .*--tolerance"
    ):
        lora.merge(model, probe=torch.randn(3, 6))
    assert unchanged(before, model)
    with pytest.raises(lora.MergeError, match="tolerance is 0, as set"):
        lora.merge(model, probe=torch.randn(3, 6), tolerance=0)
    with pytest.raises(lora.ConfigError, match="tolerance must be a number of at least 0"):
        lora.merge(model, probe=torch.randn(3, 6), tolerance=-1)
    assert unchanged(before, model)
    assert lora.merge(model, probe=torch.randn(3, 6), tolerance=10).tolerance == 10
    lora.restore(model)
    with pytest.raises(RuntimeError):  # and so is one whose probe does not fit, before or after
        lora.merge(model, probe=torch.randn(3, 7))
    assert unchanged(before, model)


def steep(layers: int) -> nn.Module:
    """A LLaMA whose layers amplify what they are given, rounding too, as trained models do."""
    model = llama(initializer_range=0.35, num_layers=layers)
    lora.inject(model, lora.LoRAConfig(r=4, target_modules="all-linear"))
    perturb(model.eval(), size=0.05)
    return model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", [2, 8, 32])
def test_a_merge_that_is_as_near_as_pefts_is_certified(
    layers: int, dtype: torch.dtype, tmp_path
) -> None:
    """Rounding grows with the depth: a bound of 64 eps of float32 refused what PEFT merges."""
    peft = pytest.importorskip("peft")
    model = steep(layers).to(dtype)
    lora.save(model, tmp_path)
    theirs = llama(initializer_range=0.35, num_layers=layers).to(dtype)
    theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()
    with torch.no_grad():
        apart = theirs(tokens()).logits
        moved = float((theirs.merge_and_unload()(tokens()).logits - apart).float().abs().max())
    certificate = lora.merge(model, probe=tokens())
    assert max(moved, certificate.largest_difference) <= certificate.tolerance
    assert certificate.tolerance <= 100 * max(moved, certificate.largest_difference)


WRONG = {
    "scaled": lambda W, update: W + 2 * update,
    "missing": lambda W, update: W,
    "transposed": lambda W, update: W + update.T,
}


@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("mistake", WRONG)
def test_a_merge_of_one_wrong_layer_is_refused(
    mistake: str, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = steep(layers)
    place = model.model.layers[layers // 2].self_attn.q_proj
    merged = lora.merging.merged_parameters

    def wrong(layer: AdaptedLayer) -> tuple[nn.Parameter, nn.Parameter | None]:
        weight, bias = merged(layer)
        if layer is not place:
            return weight, bias
        W = layer.base_layer.weight.detach()
        return nn.Parameter(WRONG[mistake](W, weight.detach() - W), False), bias

    monkeypatch.setattr(lora.merging, "merged_parameters", wrong)
    before = snapshot(model)
    with pytest.raises(lora.MergeError, match="changed by"):
        lora.merge(model, probe=tokens())
    assert unchanged(before, model)


def test_a_bias_of_the_update_has_to_have_a_place() -> None:
    model = llama()
    lora.inject(model, lora.LoRAConfig(r=2, lora_bias=True, target_modules=("q_proj",)))
    perturb(model.eval())
    assert not model(tokens()).logits.equal(llama()(tokens()).logits)
    before = snapshot(model)
    with pytest.raises(lora.MergeError, match="has a bias, the layer has none"):
        lora.merge(model)
    assert unchanged(before, model)


SELECTING = {
    "bitfit": (lora.METHODS["bitfit"].Config(), lambda n: n.endswith(".bias")),
    "bitfit small": (
        lora.METHODS["bitfit"].Config(small=True),
        lambda n: n.endswith(("q_lin.bias", "lin1.bias")),
    ),
    "head": (lora.METHODS["head"].Config(), lambda n: "classifier" in n),
    "ln_tuning": (lora.METHODS["ln_tuning"].Config(), lambda n: "norm" in n.lower()),
    "topk": (lora.METHODS["topk"].Config(k=1), lambda n: "layer.1." in n or "classifier" in n),
    "lora bias=all": (
        lora.LoRAConfig(r=2, target_modules=("q_lin",), bias="all"),
        lambda n: n.endswith(".bias"),
    ),
    "lora bias=lora_only": (
        lora.LoRAConfig(r=2, target_modules=("q_lin",), bias="lora_only"),
        lambda n: n.endswith("q_lin.bias"),
    ),
}


@pytest.mark.parametrize("name", SELECTING)
def test_what_trains_of_the_base_and_how_it_comes_back(name: str, tmp_path) -> None:
    config, chosen = SELECTING[name]
    base = distilbert()
    names = {n for n, _ in base.named_parameters() if chosen(n)}
    model = distilbert()
    report = lora.inject(model, config)
    assert set(report.plan.selected) == names
    trained = trained_parameters(model, "default")
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model.train()
        model(tokens(), labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    wanted = model(tokens()).logits
    assert not wanted.equal(base(tokens()).logits)
    with lora.disabled(model):
        assert model(tokens()).logits.equal(base(tokens()).logits)
        with lora.disabled(model):
            assert model(tokens()).logits.equal(base(tokens()).logits)
        assert model(tokens()).logits.equal(base(tokens()).logits)
        with pytest.raises(lora.MergeError, match="disabled"):
            lora.merge(model)
    assert model(tokens()).logits.equal(wanted)
    with lora.disabled(model):
        lora.activate(model, "default")
        assert model(tokens()).logits.equal(base(tokens()).logits)
    lora.activate(model)
    assert model(tokens()).logits.equal(base(tokens()).logits)
    lora.activate(model, "default")
    assert model(tokens()).logits.equal(wanted)
    assert all(p.requires_grad for p in trained.values())

    lora.save(model, tmp_path)
    stored = safetensors.torch.load((tmp_path / "adapter_model.safetensors").read_bytes())
    plain = {key.removeprefix("base_model.model.").replace("base_layer.", "") for key in stored}
    plain = {key.replace("ln_tuning_layers.", "") for key in plain}
    assert {key for key in plain if "lora_" not in key} == names
    other = distilbert()
    lora.load(other, tmp_path)
    assert other.eval()(tokens()).logits.equal(wanted)
    with lora.disabled(other):
        assert other(tokens()).logits.equal(base(tokens()).logits)
    strange = distilbert(seed=1)
    before = snapshot(strange)
    with pytest.raises(lora.CheckpointError, match="another base"):
        lora.load(strange, tmp_path)
    assert unchanged(before, strange)

    twin = copy.deepcopy(model)
    lora.merge(model, probe=tokens())
    with pytest.raises(lora.MergeError, match="merged"), lora.disabled(model):
        pass
    lora.restore(model)
    assert model(tokens()).logits.equal(wanted)
    lora.merge(model)
    lora.eject(model)
    torch.testing.assert_close(model(tokens()).logits, wanted)
    lora.eject(twin)
    assert twin(tokens()).logits.equal(base(tokens()).logits)
    for plain in (model, twin):
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in base.named_parameters()]
        assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_and_merged_biases_of_one_layer_stay_both(bias: str) -> None:
    model = distilbert(initializer_range=0.2)
    config = lora.LoRAConfig(r=2, target_modules=("q_lin",), bias=bias, lora_bias=True)
    lora.inject(model, config)
    perturb(model.eval())
    wanted = model(tokens()).logits
    lora.merge(model, probe=tokens())
    lora.eject(model)
    torch.testing.assert_close(model(tokens()).logits, wanted)


def test_what_is_merged_in_part_is_not_ejected_and_nothing_is_no_merge() -> None:
    model = adapted("lora")
    lora.merge(model.distilbert.transformer.layer[0])
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(lora.MergeError, match="merged in part"):
        lora.eject(model)
    assert all(before[name].equal(p) for name, p in model.named_parameters())
    with pytest.raises(lora.MergeError, match="has no adapter"):
        lora.merge(distilbert())


@pytest.mark.parametrize("method", ["vera", "lora"])
def test_what_adapters_share_is_one_again_after_to_empty(method: str) -> None:
    """VeRA's matrices, and the rows of tokens that a tied head shares with its embedding."""

    class Tied(nn.Module):
        config: ClassVar = {"tie_word_embeddings": True}
        _tied_weights_keys: ClassVar = {"head.weight": "table.weight"}

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
            self.head.weight = self.table.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.two(self.one(self.table(ids))))

    config = lora.VeRAConfig(r=4, target_modules=("one", "two"))
    if method == "lora":
        tokens = {"table": [2, 3]}
        config = lora.LoRAConfig(r=2, target_modules=("one",), trainable_token_indices=tokens)
    torch.manual_seed(0)
    plain = Tied()
    lora.inject(wanted := copy.deepcopy(plain), config)
    with torch.device("meta"):
        model = Tied()
    lora.inject(model, config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    end = "vera_A" if method == "vera" else "trainable_tokens_delta"

    def shared_once() -> bool:
        every = [p for n, p in model.named_parameters(remove_duplicate=False) if n.endswith(end)]
        return len(every) == 2 and every[0] is every[1]

    lora.init(model, seed=0)
    assert shared_once()  # though to_empty has broken the tie of table and head itself
    for module in (model.head, model.table):
        plain_one = getattr(module, "base_layer", module)
        plain_one.weight = getattr(model.table, "base_layer", model.table).weight
    for name, parameter in lora.targets.base_parameters(model):
        parameter.data.copy_(plain.get_parameter(name))
    lora.init(model, seed=0)
    ids = torch.arange(9)
    assert model(ids).equal(wanted(ids))
    assert shared_once()
    lora.testing.perturb(model)
    lora.testing.perturb(wanted)
    assert model(ids).equal(wanted(ids))


def test_a_start_from_data_is_not_begun_anew_without_it() -> None:
    model = distilbert()
    config = lora.LoRAConfig(r=2, target_modules=("q_lin",), init_lora_weights="eva")
    lora.inject(model, config, batches=[tokens()])
    before = snapshot(model)
    with pytest.raises(lora.ConfigError, match="needs data"):
        lora.init(model, seed=0)
    assert unchanged(before, model)


def test_a_head_that_is_the_embedding_is_no_head() -> None:
    with pytest.raises(lora.TargetError, match="selects no parameter of GPT2LMHeadModel"):
        lora.inject(gpt2(), lora.METHODS["head"].Config())


def test_a_graph_made_while_disabled_goes_back_through_the_base() -> None:
    """Its gradient is the base's, though the trained values stand in the model by then."""
    model, base = distilbert(), distilbert()
    lora.inject(model, lora.METHODS["topk"].Config(k=1))
    perturb(model.eval())
    found = []
    for one in (model, base):
        x = one.distilbert.embeddings(tokens()).detach().requires_grad_()
        if one is model:
            with lora.disabled(model):
                loss = one(inputs_embeds=x).logits.square().sum()
        else:
            loss = one(inputs_embeds=x).logits.square().sum()
        loss.backward()
        found.append(x.grad)
    torch.testing.assert_close(found[0], found[1])
    assert all(p.grad is None for p in trained_parameters(model, "default").values())


def test_bitfits_biases_are_the_papers() -> None:
    """facts: 102,912 of BERT-base's 109,483,778 (0.094 %); DistilBERT's backbone has 51,456."""
    with torch.device("meta"):
        bert = transformers.BertModel(transformers.BertConfig())
        head = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(num_labels=2)
        )
    biases = sum(p.numel() for n, p in bert.named_parameters() if n.endswith("bias"))
    pooler = bert.pooler.dense.bias.numel()
    config = lora.METHODS["bitfit"].Config()
    assert lora.inject(bert, config).trainable == biases == 102_144 + pooler == 102_912
    assert lora.inject(head, config).trainable == 52_226
    with torch.device("meta"):
        again = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(num_labels=2)
        )
    report = lora.inject(
        again, lora.METHODS["bitfit"].Config(modules_to_save=("pre_classifier", "classifier"))
    )
    assert report.adapter_parameters == 51_456


def test_what_trains_of_a_base_on_the_meta_device_begins_when_it_has_values() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

    with torch.device("meta"):
        model = build()
    lora.inject(model, lora.METHODS["bitfit"].Config())
    model.to_empty(device="cpu")
    model.load_state_dict(build().state_dict())
    lora.init(model, seed=0)
    perturb(model)
    x = torch.randn(3, 6)
    assert not model(x).equal(build()(x))
    with lora.disabled(model):
        assert model(x).equal(build()(x))
    lora.init(model, seed=0)
    assert model(x).equal(build()(x))


@pytest.mark.parametrize("name", ["q_proj", "c_attn"])
def test_dora_is_exact_where_rows_cancel(name: str) -> None:
    """V = W + sBA with rows of nearly nothing: the closed form alone would be off, or negative."""
    build = {"q_proj": llama, "c_attn": gpt2}[name]
    model = build()
    lora.inject(model, lora.DoRAConfig(r=8, target_modules=(name,)))
    model.eval()
    layer = next(m for m in model.modules() if isinstance(m, lora.wrappers.AdaptedLayer))
    adapter, (W, _) = layer.adapter("default"), layer.view.read()
    with torch.no_grad():
        # B A = −W on the first eight rows, but for one part in a million
        adapter.lora_A.copy_(W[:8])
        adapter.lora_B.zero_()
        adapter.lora_B[:8].copy_(-(1 - 1e-6) * torch.eye(8) / adapter.scaling)
        exact = torch.linalg.vector_norm(W.double() + adapter.double().update(), dim=1)
        adapter.float()
        found = adapter.kernel(layer.view).lengths(W).double()
    own = W.norm(dim=1).double()
    assert float((exact[:8] / own[:8]).max()) < 1e-5
    assert float(((found - exact).abs() / own).max()) < 3e-7
