"""NF4 against its equation, the paper, and bitsandbytes, bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import scipy.stats
import torch
from architectures import tokenizer
from conftest import bert_lm, distilbert, gpt2, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lora
from lora import nf4
from lora.errors import CheckpointError, ConfigError, MergeError, ModelError, TargetError
from lora.finetune.models import load_base
from lora.finetune.quantized import BaseReading, _NF4Config, _NF4Quantizer, packable
from lora.kernels import off
from lora.kernels.scratch import scratch
from lora.nf4 import NF4Linear, dequantize, quantize, reference

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")


def inputs() -> dict[str, Tensor]:
    """What weights are, and what they never are; shapes with whole blocks and with tails."""
    torch.manual_seed(0)
    ties = torch.tensor(nf4.LEVELS)
    ties = torch.cat([ties, (ties[1:] + ties[:-1]) / 2, torch.tensor([1.0])])
    return {
        "normal": torch.randn(256, 512),
        "small normal": torch.randn(64, 64) * 0.02,
        "uniform": torch.rand(64, 128) - 0.5,
        "constant": torch.full((32, 64), 0.37),
        "zeros": torch.zeros(32, 64),
        "half zeros": torch.randn(32, 64) * (torch.arange(32)[:, None] % 2),
        "ties": ties.repeat(64).view(32, 64),
        "huge": torch.randn(64, 64) * 1e4,
        "outliers": torch.randn(64, 64) * torch.tensor([1.0, 300.0])[torch.arange(64) % 2],
        "a tail": torch.randn(37, 66),
        "one short block": torch.randn(3, 10),
        "many blocks": torch.randn(700, 640),
    }


INPUTS = inputs()


def test_a_mean_that_overflows_is_refused() -> None:
    w = torch.full((64, 64), 1e38)
    assert dequantize(quantize(w)).isfinite().all()
    with pytest.raises(ModelError, match="more than float32 holds"):
        quantize(w, double_quant=True)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("name", list(INPUTS))
def test_it_is_bitsandbytes_bit_for_bit(name: str, dtype: torch.dtype, double_quant: bool) -> None:
    w = INPUTS[name].to(dtype)
    found = quantize(w, double_quant=double_quant)
    codes, state = functional.quantize_4bit(
        w, quant_type="nf4", blocksize=64, compress_statistics=double_quant
    )
    assert torch.equal(found.codes, codes.flatten())
    assert torch.equal(found.absmax, state.absmax)
    if double_quant:
        assert torch.equal(found.nested_absmax, state.state2.absmax)
        assert torch.equal(found.offset, state.offset)
        assert torch.equal(nf4.dynamic_map(w.device), state.state2.code)
    for out in nf4.DTYPES:
        state.dtype = out
        theirs = functional.dequantize_4bit(codes, state, quant_type="nf4")
        assert torch.equal(dequantize(found, out), theirs.view(w.shape)), out


@pytest.mark.parametrize("block_size", [32, 128, 256, 4096])
def test_other_block_sizes_are_bitsandbytes_too(block_size: int) -> None:
    w = INPUTS["many blocks"]
    found = quantize(w, block_size)
    codes, state = functional.quantize_4bit(w, quant_type="nf4", blocksize=block_size)
    assert torch.equal(found.codes, codes.flatten())
    assert torch.equal(found.absmax, state.absmax)


@given(
    st.integers(0, 40), st.integers(1, 90), st.sampled_from([2, 6, 64]), st.booleans(),
    st.sampled_from(nf4.DTYPES), st.floats(1e-6, 1e4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_value_becomes_its_nearest_level(
    rows: int, columns: int, block_size: int, double_quant: bool, dtype: torch.dtype, scale: float
) -> None:
    w = (torch.randn(rows, columns) * scale).to(dtype)
    found = quantize(w, block_size, double_quant)
    back = dequantize(found)
    assert back.shape == w.shape
    assert back.dtype == dtype
    assert torch.equal(back, reference(found).to(dtype))
    into = torch.full_like(w, 7.0)
    assert dequantize(found, out=into) is into
    assert torch.equal(into, back)
    if not found.double_quant and rows:
        padded = nn.functional.pad(w.float().flatten(), (0, -w.numel() % block_size))
        blocks = padded.view(-1, block_size)
        largest = blocks.abs().amax(1, keepdim=True)
        levels = torch.tensor(nf4.LEVELS)
        nearest = ((blocks / largest.clamp(min=1e-38))[..., None] - levels).abs().amin(-1)
        off = (reference(found).flatten() - w.float().flatten()).abs()
        wanted = (nearest * largest).flatten()[: w.numel()]
        torch.testing.assert_close(off, wanted, rtol=1e-4, atol=1e-6 * float(largest.max()))


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Appendix E of the paper: eight steps below zero, nine above, scaled to the largest."""
    offset = ((1 - 1 / 30) + (1 - 1 / 32)) / 2
    above = scipy.stats.norm.ppf(numpy.linspace(offset, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(numpy.linspace(offset, 0.5, 8)[:-1])
    found = sorted([*above, 0.0, *below])
    scaled = torch.tensor(found) / max(found)
    assert len(scaled) == 16
    assert (scaled - torch.tensor(nf4.LEVELS)).abs().max() < 2e-7


def test_a_block_may_be_larger_than_a_chunk() -> None:
    w = torch.randn(2**21 + 6)
    found = quantize(w, 2**21)
    assert len(found.absmax) == 2
    assert torch.equal(dequantize(found), reference(found))


def test_torchs_defaults_do_not_matter() -> None:
    w = torch.randn(4, 64)
    wanted = dequantize(quantize(w, double_quant=True))
    for cached in (nf4.pairs, nf4.midpoints, nf4.dynamic_map):
        cached.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(dequantize(quantize(w, double_quant=True)), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 70, 129])  # a block's start, middle, and the tail
def test_what_is_not_finite_is_refused_by_name(bad: float, place: int) -> None:
    w = torch.randn(130)
    w[place] = bad
    with pytest.raises(ModelError, match=r"layer\.3 holds NaN or infinity"):
        quantize(w, name="layer.3")


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ModelError, match=r"w is torch\.float64; NF4 takes float32"):
        quantize(torch.zeros(2, dtype=torch.float64), name="w")
    for size in (0, 3, -2):
        with pytest.raises(ConfigError, match=f"block_size .* found {size}"):
            quantize(torch.zeros(2), size)


LLAMA_2_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


def test_llama_2_7b_takes_3_341_gb() -> None:
    """Its decoder's linears, from shapes, as the paper counts; 3.643 GB without double quant."""
    for double_quant, gigabytes, bits in ((True, 3.341, 4.127), (False, 3.643, 4.5)):
        held = 0
        for rows, columns in LLAMA_2_7B:
            layer = NF4Linear(columns, rows, False, double_quant=double_quant, device="meta")
            held += sum(p.numel() * p.element_size() for p in layer.parameters())
        count = 32 * sum(rows * columns for rows, columns in LLAMA_2_7B)
        assert count == 6_476_005_376
        assert 32 * held / 1e9 == pytest.approx(gigabytes, abs=5e-4)
        assert 8 * 32 * held / count == pytest.approx(bits, rel=5e-3)


def layer(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[NF4Linear, nn.Linear]:
    """One, and the dense layer that it stands for."""
    torch.manual_seed(1)
    packed = NF4Linear.of(nn.Linear(70, 30, bias).to(dtype))
    return packed, packed.dense()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_is_the_dense_one_on_dequantised_weights(bias: bool, dtype: torch.dtype) -> None:
    packed, dense = layer(bias, dtype)
    x = torch.randn(3, 5, 70, dtype=dtype, requires_grad=True)
    pull = torch.randn(3, 5, 30, dtype=dtype)
    y, wanted = packed(x), dense(x)
    assert torch.equal(y, wanted)
    assert torch.equal(*(torch.autograd.grad(out, x, pull)[0] for out in (y, wanted)))
    with off():
        assert torch.equal(packed(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), dense(x))


def test_no_dense_weight_is_kept_for_backward() -> None:
    packed, _ = layer()
    lora.inject(model := nn.Sequential(packed), lora.LoRAConfig(r=2, lora_dropout=0.1))
    kept: list[Tensor] = []
    x = torch.randn(4, 70, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model.train()(x)
    assert not [t for t in kept if t.numel() >= 70 * 30]


def test_a_cast_is_the_layers_dtype_and_leaves_the_statistics() -> None:
    for double_quant in (True, False):
        torch.manual_seed(0)
        packed = NF4Linear.of(nn.Linear(70, 30), double_quant=double_quant)
        before = copy.deepcopy(packed.state_dict())
        packed.to(torch.bfloat16)
        assert packed.dtype == packed.bias.dtype == torch.bfloat16
        for name, tensor in packed.state_dict().items():
            if name != "bias":
                assert torch.equal(tensor, before[name]), name
        assert packed(torch.randn(2, 70).bfloat16()).dtype == torch.bfloat16


def test_it_moves_copies_and_goes_through_a_file(tmp_path: Path) -> None:
    packed, dense = layer()
    x = torch.randn(2, 70)
    assert torch.equal(copy.deepcopy(packed)(x), dense(x))
    safetensors.torch.save_file(packed.state_dict(), tmp_path / "w.safetensors")
    other = NF4Linear(70, 30, device="meta").to_empty(device="cpu")
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert torch.equal(other(x), dense(x))
    size = (tmp_path / "w.safetensors").stat().st_size - 8 - 600 - 30 * 4
    assert 8 * size / (70 * 30) < 4.8  # 17 bytes of header and statistics are much at this size


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_call_without_gradients_starts_no_function(
    double_quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = NF4Linear.of(nn.Linear(64, 8), double_quant=double_quant)
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    monkeypatch.setattr("lora.kernels.linear._Linear.apply", None)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_layers_share_one_buffer() -> None:
    small, large = NF4Linear.of(nn.Linear(8, 8)), NF4Linear.of(nn.Linear(64, 64))
    x, wide = torch.randn(2, 8), torch.randn(2, 64)
    one, two = small.dense()(x), large.dense()(wide)
    for _ in range(2):
        assert torch.equal(small(x), one)
        assert torch.equal(large(wide), two)
    assert len({scratch("weight", (1,), torch.float32, "cpu").data_ptr() for _ in range(3)}) == 1


def folder_of(model: Any, folder: Path) -> str:
    """The model in several files, with a tokenizer."""
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", nf4.DTYPES)
def test_a_base_is_packed_as_it_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = distilbert().to(dtype)
    place = folder_of(model, tmp_path / "base")
    found = load_base(place, 2, "classification", 0, "nf4").model
    packed = {name: m for name, m in found.named_modules() if isinstance(m, NF4Linear)}
    assert len(packed) == 12  # six linears in each of two layers; no head, no embedding
    wanted = dict(model.named_modules())
    for name, layer in packed.items():
        q = quantize(wanted[name].weight.detach(), double_quant=True)
        assert torch.equal(layer.weight, q.codes), name
        assert torch.equal(dequantize(layer.quantized()), dequantize(q, torch.float32)), name
        assert torch.equal(layer.bias, wanted[name].bias.float())
    for name, parameter in found.named_parameters():
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(parameter, model.get_parameter(name).float()), name
    nf4.quantize_layers(model, list(packed))
    model.float()
    ids = torch.arange(1, 9)[None]
    torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_square_conv1d_is_turned_as_any_other_is(tmp_path: Path) -> None:
    model = gpt2()
    found = load_base(folder_of(model, tmp_path / "base"), 2, "classification", 0, "nf4").model
    packed = {name: m for name, m in found.named_modules() if isinstance(m, NF4Linear)}
    assert len(packed) == 8
    for name, layer in packed.items():
        W = model.get_submodule(name).weight.detach().T
        assert torch.equal(layer.weight, quantize(W, double_quant=True).codes), name


def test_what_is_not_in_the_files_is_new_and_dense(tmp_path: Path) -> None:
    place = folder_of(bert_lm(), tmp_path / "base")
    dense, base = (load_base(place, 2, "classification", 0, how) for how in ("none", "nf4"))
    assert base.new == dense.new == ("bert.pooler.dense", "classifier")
    for name in base.new:
        assert torch.equal(
            base.model.get_submodule(name).weight, dense.model.get_submodule(name).weight
        )
    assert len([m for m in base.model.modules() if isinstance(m, NF4Linear)]) == 12


def test_a_head_of_another_size_is_new(tmp_path: Path) -> None:
    place = folder_of(distilbert(), tmp_path / "base")
    dense, base = (load_base(place, 3, "classification", 0, how) for how in ("none", "nf4"))
    assert base.new == dense.new == ("classifier",)
    assert base.model.classifier.weight.shape == (3, 32)
    assert base.model.classifier.bias.shape == (3,)
    assert torch.equal(base.model.classifier.weight, dense.model.classifier.weight)


@pytest.mark.parametrize("field", ["hidden_dim", "vocab_size", "max_position_embeddings"])
def test_a_config_of_another_shape_is_refused(field: str, tmp_path: Path) -> None:
    place = Path(folder_of(distilbert(), tmp_path / "base")) / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps(config | {field: config[field] + 8}))
    for how in ("none", "nf4"):
        with pytest.raises(ModelError, match=r" is \(.+\) in its files and \(.+\) in the m"):
            load_base(str(place.parent), 2, "classification", 0, how)


def test_whatever_was_read_in_another_shape_is_refused_by_name() -> None:
    model = distilbert()
    quantizer = _NF4Quantizer(_NF4Config(BaseReading()), pre_quantized=False)
    quantizer._process_model_before_weight_loading(model)
    model.distilbert.embeddings.LayerNorm.bias = nn.Parameter(torch.zeros(3))
    said = r"embeddings\.LayerNorm\.bias is \(3,\) in its files and \(32,\) in the model"
    with pytest.raises(ModelError, match=said):
        quantizer._process_model_after_weight_loading(model)


def test_layers_are_left_dense_by_name(tmp_path: Path) -> None:
    place = folder_of(distilbert(), tmp_path / "base")
    told: list[tuple[int, int]] = []
    dense = ("q_lin", "layer.1.ffn.lin1")
    found = load_base(
        place, 2, "classification", 0, "nf4", dense, lambda *counts: told.append(counts)
    ).model
    count = sum(isinstance(module, NF4Linear) for module in found.modules())
    assert told == [(i + 1, count) for i in range(count)]
    left = {n for n, m in found.named_modules() if type(m) is nn.Linear and "transformer" in n}
    path = "distilbert.transformer.layer."
    assert left == {f"{path}{n}" for n in ("0.attention.q_lin", "1.attention.q_lin", "1.ffn.lin1")}
    with pytest.raises(TargetError, match="no layer matches exclude_modules entry 'q_linn'"):
        load_base(place, 2, "classification", 0, "nf4", ("q_linn",))


def test_a_weight_that_is_not_finite_is_named_as_it_is_read(tmp_path: Path) -> None:
    model = distilbert()
    with torch.no_grad():
        model.distilbert.transformer.layer[1].ffn.lin2.weight[3, 4] = torch.nan
    place = folder_of(model, tmp_path / "base")
    with pytest.raises(ModelError, match=r"layer\.1\.ffn\.lin2\.weight holds NaN or infinity"):
        load_base(place, 2, "classification", 0, "nf4")


def test_conv1d_is_packed_in_its_face() -> None:
    layer = gpt2().transformer.h[0].attn.c_attn
    packed = NF4Linear.of(layer)
    x = torch.randn(3, 32)
    dense = nn.functional.linear(x, dequantize(quantize(layer.weight.T)), layer.bias)
    assert torch.allclose(packed(x), dense, atol=2e-2)  # absmax in 8 bits
    assert (packed.in_features, packed.out_features) == (32, 96)


def test_a_layer_reached_twice_is_packed_once() -> None:
    model = nn.ModuleDict({"one": nn.Linear(8, 8)})
    model["two"] = model["one"]
    nf4.quantize_layers(model, ["one", "two"])
    assert isinstance(model["one"], NF4Linear)
    assert model["one"] is model["two"]
    assert nf4.dequantize_layers(model) == 1
    assert type(model["one"]) is nn.Linear
    assert model["one"] is model["two"]


def test_parameters_are_counted_as_the_values_they_stand_for() -> None:
    counts = []
    for packed in (False, True):
        model = llama()
        if packed:
            nf4.quantize_layers(model, packable(model))
        counts.append(lora.inject(model, lora.LoRAConfig(r=2)).total)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("make", [distilbert, gpt2, llama])
def test_an_adapter_trains_saves_loads_and_merges_on_a_packed_base(
    make: Any, tmp_path: Path
) -> None:
    model, ids = make(), torch.arange(1, 13).view(2, 6)
    nf4.quantize_layers(model, packable(model))
    lora.inject(model, lora.LoRAConfig(r=2, lora_dropout=0.1))
    lora.testing.perturb(model)
    wanted = model.eval()(input_ids=ids).logits
    lora.save(model, tmp_path / "adapter")
    other = make()
    nf4.quantize_layers(other, packable(other))
    lora.load(other, tmp_path / "adapter")
    assert torch.equal(other(input_ids=ids).logits, wanted)
    whole = make()  # the base that it was packed from
    assert (
        "in NF4, whose weights are not rounded here" in lora.load(whole, tmp_path / "adapter").note
    )
    assert 0 < (whole(input_ids=ids).logits - wanted).abs().max() < 0.3 * wanted.abs().max()
    another = make()
    with torch.no_grad():
        another.get_submodule(packable(another)[-1]).weight.mul_(1.01)
    before = {name: tensor.clone() for name, tensor in another.state_dict().items()}
    with pytest.raises(CheckpointError, match="another base"):
        lora.load(another, tmp_path / "adapter")
    assert all(torch.equal(before[name], t) for name, t in another.state_dict().items())
    with pytest.raises(MergeError, match=r"in NF4.*lora\.nf4\.dequantize_layers\(model\)"):
        lora.merge(other)
    assert nf4.dequantize_layers(other) > 0
    certificate = lora.merge(other, probe={"input_ids": ids})
    assert certificate.largest_difference is not None
    lora.eject(other)
    torch.testing.assert_close(other(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-4)
    assert not [m for m in other.modules() if isinstance(m, NF4Linear)]


def test_functional_transforms_work_on_packed_weights() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    nf4.quantize_layers(model, ["0"])
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=("0",)))
    lora.testing.perturb(model)
    x = torch.randn(3, 16)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(trained: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, trained, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_packed_layer_that_is_shared_is_known_again_unpacked(tmp_path: Path) -> None:
    def shared() -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        model.append(model[0])
        return model

    model = shared()
    nf4.quantize_layers(model, ["0"])
    lora.inject(model, lora.LoRAConfig(r=2))
    lora.save(model, tmp_path / "adapter")
    assert "in NF4" in lora.load(shared(), tmp_path / "adapter").note


@pytest.mark.parametrize("packed", ["[]", "3", "null", '"a"', "[" * 200_000, '{"a": 1}', "{"])
def test_a_mark_that_says_nonsense_of_the_packing_is_another_base(
    packed: str, tmp_path: Path
) -> None:
    model = llama()
    nf4.quantize_layers(model, packable(model))
    lora.inject(model, lora.LoRAConfig(r=2))
    path = lora.save(model, tmp_path / "adapter") / "adapter_model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    mark = json.loads(metadata["lora_from_scratch"]) | {"packed": packed}
    metadata["lora_from_scratch"] = json.dumps(mark)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match="another base"):
        lora.load(llama(), tmp_path / "adapter")


def test_an_adapter_that_took_up_the_rounding_is_of_the_packed_base_alone(tmp_path: Path) -> None:
    model = llama()
    config = lora.LoRAConfig(r=2, init_lora_weights="pissa")
    lora.inject(model, config, pack=packable(model))
    lora.save(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="another base"):
        lora.load(llama(), tmp_path / "adapter")


@pytest.mark.slow
def test_what_the_starts_take_up_of_minilms_rounding() -> None:
    """At r = 64, in nuclear norm, over plain QLoRA's."""
    from benchmarks.nf4 import errors

    found = errors((64,))
    assert found["pissa, r = 64"] >= 1.4
    assert found["olora, r = 64"] >= 1.25
    assert found["loftq, r = 64"] >= 1.35
    assert found["loftq_5, r = 64"] > found["loftq, r = 64"]
