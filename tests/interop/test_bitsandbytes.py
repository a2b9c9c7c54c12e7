"""Models that bitsandbytes saved in four bits, read without it: held as they are, or refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from architectures import tokenizer
from conftest import ROOT, distilbert, gpt2, llama
from test_cli import data, plain_scores
from test_cli import lora as cli
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora
from lora import nf4
from lora.errors import ModelError, TargetError
from lora.finetune.models import load_base, load_skeleton
from lora.finetune.quantized import BaseReading, _Take
from lora.identity import fingerprint
from lora.nf4 import NF4Linear, dequantize, from_bitsandbytes

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

Tensors = dict[str, Tensor]
STATE = "weight.quant_state.bitsandbytes__nf4"
IDS = torch.arange(1, 9)[None]


def serialised(w: Tensor, double: bool = True, kind: str = "nf4", **how: Any) -> Tensors:
    """The keys of one weight, as bitsandbytes writes them."""
    codes, state = functional.quantize_4bit(
        w, quant_type=kind, compress_statistics=double, **{"blocksize": 64, **how}
    )
    return {"weight": codes} | {
        f"weight.{key}": tensor.clone() for key, tensor in state.as_dict(packed=True).items()
    }


def save(model: Any, folder: Path, load: Any = None, dtype: Any = torch.float32, **how: Any) -> Any:
    """bitsandbytes' model of a dense one, saved in several files with a tokenizer."""
    model.save_pretrained(folder / "dense")
    how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **how}
    found = (load or transformers.AutoModelForSequenceClassification).from_pretrained(
        folder / "dense", dtype=dtype, quantization_config=transformers.BitsAndBytesConfig(**how)
    )
    found.save_pretrained(folder / "packed", max_shard_size="9KB")
    assert len(list((folder / "packed").glob("*.safetensors"))) > 1
    for place in ("dense", "packed"):
        words = load_skeleton("demo", 2, "classification").tokenizer
        fits = model.config.vocab_size >= len(words)
        (words if fits else tokenizer()).save_pretrained(folder / place)
    return found


def read(folder: Path, labels: int = 2, **how: Any) -> Any:
    return load_base(str(folder / "packed"), labels, "classification", 0, **how).model


@pytest.fixture(params=[False, True], ids=["as saved", "repacked"])
def repacks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor with AVX512-BF16 bitsandbytes packs a layer's codes anew at its first forward
    and rounds its statistics to bfloat16. What we read must not depend on it."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)


def dense_logits(theirs: Any) -> Tensor:
    """What bitsandbytes' model computes, from the values of its codes in plain layers: its own
    forward is another on some processors. It is no longer packed afterwards."""
    for name, layer in packed_layers(theirs, bitsandbytes.nn.Linear4bit).items():
        values = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = nn.Linear(values.shape[1], values.shape[0], layer.bias is not None)
        plain.weight = nn.Parameter(values.float())
        plain.bias = layer.bias
        theirs.set_submodule(name, plain)
    logits: Tensor = theirs(input_ids=IDS).logits
    return logits


def packed_layers(model: nn.Module, kind: type[nn.Module] = NF4Linear) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@pytest.mark.slow
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("make", [distilbert, gpt2, llama])
def test_a_model_is_held_bit_for_bit(
    make: Any, double: bool, repacks: None, tmp_path: Path
) -> None:
    theirs = save(make(), tmp_path, bnb_4bit_use_double_quant=double)
    base = load_base(str(tmp_path / "packed"), 2, "classification", 0)
    ours, trunk = base.model, theirs.base_model_prefix + "."
    assert base.new == ()
    layers = packed_layers(theirs, bitsandbytes.nn.Linear4bit)
    assert set(packed_layers(ours)) == {name for name in layers if name.startswith(trunk)}
    assert len(packed_layers(ours)) == {"distilbert": 12, "transformer": 8, "model": 14}[trunk[:-1]]
    for name, layer in layers.items():
        state, ours_is = layer.weight.quant_state, ours.get_submodule(name)
        values = functional.dequantize_4bit(layer.weight, state)
        if not name.startswith(trunk):  # a head that trains is dense
            assert type(ours_is) is nn.Linear
            assert torch.equal(ours_is.weight, values)
            continue
        assert torch.equal(ours_is.weight, layer.weight.flatten())
        assert torch.equal(ours_is.absmax, state.absmax)
        if double:
            assert torch.equal(ours_is.nested_absmax, state.state2.absmax)
            assert torch.equal(ours_is.offset, state.offset)
        else:
            assert ours_is.nested_absmax is ours_is.offset is None
        assert torch.equal(dequantize(ours_is.quantized()), values)
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[0] not in layers or name.endswith("bias"):
            assert torch.equal(parameter, wanted[name]), name
    torch.testing.assert_close(
        ours(input_ids=IDS).logits, dense_logits(theirs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", ["packed", "dense"])
@pytest.mark.parametrize("make", [distilbert, gpt2, llama])
def test_pieces_are_cuts_of_what_is_read(make: Any, place: str, tmp_path: Path) -> None:
    """Of what bitsandbytes saved, of what is packed here, and dense; the rest is as without."""
    save(make(), tmp_path, dtype=torch.bfloat16)
    for quantize in ("none", "nf4") if place == "dense" else ("none",):

        def read_part(part: tuple[int, int] | None, quantize: str = quantize) -> Any:
            folder = str(tmp_path / place)
            return load_base(folder, 3, "classification", 7, quantize, part=part)

        whole, parts = read_part(None), [read_part((rank, 3)) for rank in range(3)]
        for part in parts:
            assert part.new == whole.new
            assert set(part.pieces) == {
                name
                for name, parameter in whole.model.named_parameters()
                if parameter.dim()
                > (0 if parameter.dtype == torch.uint8 or "absmax" in name else 1)
                and name.rpartition(".")[0] not in whole.new
            }
        for name, wanted in whole.model.named_parameters():
            held = [part.model.get_parameter(name) for part in parts]
            assert all(one.shape == wanted.shape and one.dtype == wanted.dtype for one in held)
            assert {one.is_meta for one in held} == {name in parts[0].pieces}
            if name not in parts[0].pieces:
                assert all(torch.equal(one, wanted) for one in held)
                continue
            cuts = [part.pieces[name] for part in parts]
            step = -(-len(wanted) // 3)
            assert [len(cut) for cut in cuts] == [len(wanted[k * step :][:step]) for k in range(3)]
            assert torch.equal(torch.cat(cuts).to(wanted.dtype), wanted), name


def test_a_model_in_bfloat16_is_that_rounded_as_bitsandbytes_rounds(tmp_path: Path) -> None:
    theirs = save(llama(), tmp_path, dtype=torch.bfloat16)
    ours = packed_layers(read(tmp_path))
    for name, layer in packed_layers(theirs, bitsandbytes.nn.Linear4bit).items():
        values = functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
        assert values.dtype == torch.bfloat16
        assert ours[name].dtype == torch.float32
        assert torch.equal(dequantize(ours[name].quantized(), torch.bfloat16), values)


def test_it_is_the_base_that_quantize_makes_and_takes_its_adapters(tmp_path: Path) -> None:
    """One fingerprint, so that either loads what was trained on the other."""
    save(llama(), tmp_path, bnb_4bit_use_double_quant=True)
    ours = load_base(str(tmp_path / "dense"), 2, "classification", 0, "nf4").model
    theirs = [read(tmp_path), read(tmp_path, quantize="nf4")]
    heads = ("score",)  # which is fresh in each
    assert [fingerprint(model, heads) for model in theirs] == 2 * [fingerprint(ours, heads)]
    lora.inject(theirs[0], lora.LoRAConfig(r=2, modules_to_save=heads))
    lora.testing.perturb(theirs[0])
    lora.save(theirs[0], tmp_path / "adapter")
    wanted = theirs[0](input_ids=IDS).logits
    for other in (ours, theirs[1]):
        lora.load(other, tmp_path / "adapter")
        assert torch.equal(other(input_ids=IDS).logits, wanted)


def test_a_backbone_of_any_model_and_a_head_of_any_size(tmp_path: Path) -> None:
    save(distilbert(), tmp_path / "one", transformers.AutoModel)
    base = load_base(str(tmp_path / "one" / "packed"), 2, "classification", 0)
    assert set(base.new) == {"pre_classifier", "classifier"}
    assert len(packed_layers(base.model)) == 12
    save(distilbert(), tmp_path / "two", transformers.AutoModelForMaskedLM)  # vocab_transform
    assert len(packed_layers(read(tmp_path / "two"))) == 12
    save(distilbert(), tmp_path / "three")
    base = load_base(str(tmp_path / "three" / "packed"), 3, "classification", 0)
    assert base.new == ("classifier",)
    assert base.model.classifier.weight.shape == (3, 32)
    assert base.model.classifier.bias.shape == (3,)
    again = load_base(str(tmp_path / "three" / "packed"), 3, "classification", 0)
    assert torch.equal(base.model.classifier.weight, again.model.classifier.weight)


def test_a_head_of_conv1d_is_dense_as_that_stores_it() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "score": Conv1D(16, 8)})
    model.base_model_prefix = "body"
    tensors = serialised(w := torch.randn(16, 8))
    given = {f"{key}$": [tensor] for key, tensor in tensors.items()}
    found = _Take(BaseReading()).convert(given, "score.weight", model)["score.weight"]
    assert found.shape == model["score"].weight.shape
    assert torch.equal(found, dequantize(nf4.quantize(w, double_quant=True)).T)


def test_layers_that_bitsandbytes_left_alone_stay_dense(tmp_path: Path) -> None:
    save(distilbert(), tmp_path, llm_int8_skip_modules=["q_lin"])
    for quantize in ("none", "nf4"):
        model = read(tmp_path, quantize=quantize)
        assert len(packed_layers(model)) == 10
        dense = distilbert().get_parameter("distilbert.transformer.layer.1.attention.q_lin.weight")
        found = model.get_parameter("distilbert.transformer.layer.1.attention.q_lin.weight")
        assert torch.equal(found, dense)


@pytest.mark.slow
def test_it_needs_no_bitsandbytes(tmp_path: Path) -> None:
    save(distilbert(), tmp_path)
    wanted = read(tmp_path)(input_ids=IDS).logits
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import json, torch; from lora.finetune.models import load_base\n"
        f"model = load_base({str(tmp_path / 'packed')!r}, 2, 'classification', 0).model\n"
        "torch.set_num_threads(1)\n"
        "print(json.dumps(model(input_ids=torch.arange(1, 9)[None]).logits.tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert torch.equal(torch.tensor(json.loads(done.stdout)), wanted)


def test_a_run_on_it_comes_back_and_merges(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    save(transformers.DistilBertForSequenceClassification(config), tmp_path)
    base, run, out = tmp_path / "packed", tmp_path / "run", tmp_path / "out"
    given = ("--base", base, "--data", data(tmp_path / "data"), "--epochs", 1)
    given = (*given, "--dtype", "float32", "--learning-rate", 0.01)
    assert cli("train", *given, "--run-dir", run) == 0
    answers = (run / "predictions.jsonl").read_text()
    assert cli("train", *given, "--quantize", "nf4", "--run-dir", tmp_path / "again") == 0
    assert (tmp_path / "again" / "predictions.jsonl").read_text() == answers
    scores = json.loads((run / "summary.json").read_text())["metrics"]
    capsys.readouterr()
    assert cli("eval", run) == 0
    assert f"accuracy {scores['accuracy']:.4f}" in capsys.readouterr().out
    assert cli("predict", run, "--data", tmp_path / "data/test.tsv") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = [json.loads(line) for line in answers.splitlines()]
    assert [row["scores"] for row in found] == [row["scores"] for row in rows]
    assert cli("merge", run, "--output", out) == 2
    assert f"lora merge {run} --dequantize" in capsys.readouterr().err
    assert cli("merge", run, "--output", out, "--dequantize") == 0
    assert "into 12 dequantized" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    plain, _ = plain_scores(out, [row["text"] for row in rows])
    for row, score in zip(rows, plain.tolist(), strict=True):
        assert score == pytest.approx([*row["scores"].values()], abs=2e-4)
    for flags, said in {
        ("--quantize", "nf4", "--dense", "q_lin"): "--dense q_lin: --base",
        ("--quantize", "nf4", "--init-lora-weights", "pissa"): "q_lin is in NF4 already",
        ("--method", "full"): "load an unquantized base",
    }.items():
        assert cli("train", *given, *flags, "--run-dir", tmp_path / "no") == 2
        assert said in capsys.readouterr().err


def test_packing_what_is_packed_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(NF4Linear.of(nn.Linear(8, 8)))
    with pytest.raises(TargetError, match="pack: 0 is in NF4 already"):
        lora.inject(model, lora.LoRAConfig(r=2), pack=["0"])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", nf4.DTYPES)
@pytest.mark.parametrize("shape", [(64, 128), (700, 640), (37, 66), (3, 10)])
def test_a_layers_keys_are_read_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, double: bool
) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape).to(dtype)
    for block_size in (64, 4096):
        tensors = serialised(w, double, blocksize=block_size)
        q = from_bitsandbytes(tensors)
        kept = {key: tensor for key, tensor in tensors.items() if key != "weight"}
        state = functional.QuantState.from_dict(kept, torch.device("cpu"))
        assert (q.shape, q.dtype, q.block_size) == (shape, dtype, block_size)
        assert q.double_quant == double
        assert torch.equal(dequantize(q), functional.dequantize_4bit(tensors["weight"], state))
        assert q.codes.data_ptr() == tensors["weight"].data_ptr()
        assert q.absmax is tensors["weight.absmax"]


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_the_dtype_that_codes_are_stored_in_does_not_matter(
    storage: torch.dtype, repacks: None, tmp_path: Path
) -> None:
    w = torch.randn(32, 64)
    found = from_bitsandbytes(serialised(w, quant_storage=storage))
    assert torch.equal(found.codes, from_bitsandbytes(serialised(w)).codes)
    if storage == torch.bfloat16:
        theirs = save(llama(), tmp_path, bnb_4bit_quant_storage=storage)
        ours = read(tmp_path)(input_ids=IDS).logits
        torch.testing.assert_close(ours, dense_logits(theirs), rtol=1e-4, atol=1e-5)


def state(**changes: Any) -> Callable[[Tensors], None]:
    """A change to the JSON; None takes a field out."""

    def change(tensors: Tensors) -> None:
        fields = json.loads(bytes(tensors[STATE].tolist())) | changes
        fields = {key: value for key, value in fields.items() if value is not None}
        tensors[STATE] = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)

    return change


def put(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


def filled(index: int, value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_fill(0, torch.tensor([index]), value)


BROKEN: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no state": (lambda t: t.pop(STATE), f"no {STATE}, found weight, weight.absmax"),
    "no JSON": (put(STATE, lambda t: t[:-1]), "is not a JSON object"),
    "a list": (put(STATE, lambda t: torch.tensor(list(b"[1]"))), "is not a JSON object"),
    "not text": (put(STATE, lambda t: t + 0.5), "is not a JSON object"),
    "deep": (put(STATE, lambda t: torch.tensor(list(b"[" * 10**5))), "is not a JSON object"),
    "another type": (state(quant_type="fp4"), "quant_type must be nf4, found 'fp4'"),
    "no dtype": (state(dtype=None), "dtype is missing"),
    "a field": (state(extra=1), "extra is unexpected"),
    "a dtype": (state(dtype="float64"), "dtype must be float32, .* found 'float64'"),
    "an odd block": (state(blocksize=63), "blocksize must be an even number, found 63"),
    "no block": (state(blocksize=0), "blocksize must be an even number, found 0"),
    "half a block": (state(blocksize=64.0), "blocksize must be an even number, found 64.0"),
    "no shape": (state(shape="64"), "shape must be a list of integers of at least 1, found '64'"),
    "a negative shape": (state(shape=[-8, -640]), "shape must be a list of integers"),
    "another shape": (state(shape=[64, 65]), r"weight must be \(torch.uint8, 2080, 1\)"),
    "nested blocks": (state(nested_blocksize=128), "nested_blocksize must be 256, found 128"),
    "a nested dtype": (state(nested_dtype="float16"), "nested_dtype must be float32"),
    "no number": (state(nested_offset="0.5"), "nested_offset must be a number"),
    "an infinite offset": (state(nested_offset=float("inf")), "absmax holds NaN or infinity"),
    "no nested field": (state(nested_offset=None), "nested_offset is missing"),
    "other levels": (put("weight.quant_map", filled(3, -0.4)), "weight.quant_map holds other"),
    "NaN levels": (put("weight.quant_map", filled(3, torch.nan)), "weight.quant_map holds other"),
    "nested levels": (put("weight.nested_quant_map", filled(9, 0.1)), "nested_quant_map holds"),
    "a NaN": (put("weight.nested_absmax", filled(0, torch.nan)), "absmax holds NaN or infinity"),
    "no codes": (lambda t: t.pop("weight"), ": weight is missing"),
    "no map": (lambda t: t.pop("weight.quant_map"), "weight.quant_map is missing"),
    "no absmax": (lambda t: t.pop("weight.absmax"), "weight.absmax is missing"),
    "no nesting": (lambda t: t.pop("weight.nested_absmax"), "nested_quant_map is unexpected"),
    "no nested map": (lambda t: t.pop("weight.nested_quant_map"), "nested_quant_map is missing"),
    "a further key": (lambda t: t.update({"weight.SCB": t[STATE]}), "weight.SCB is unexpected"),
    "fewer codes": (put("weight", lambda t: t[1:]), r"found \(torch.uint8, 2047, 1\)"),
    "codes in rows": (put("weight", lambda t: t.view(-1, 2)), r"found \(torch.uint8, 1024, 2\)"),
    "fewer blocks": (put("weight.absmax", lambda t: t[1:]), "weight.absmax must be"),
    "float absmax": (put("weight.absmax", Tensor.float), r"found \(torch.float32, 64\)"),
    "a double map": (put("weight.quant_map", Tensor.double), "weight.quant_map must be"),
    "nested blocks more": (put("weight.nested_absmax", lambda t: t.repeat(2)), "must be"),
}


@pytest.mark.parametrize("change", list(BROKEN))
def test_what_is_not_as_bitsandbytes_writes_it_is_refused_by_name(change: str) -> None:
    tensors = serialised(torch.randn(64, 64))
    from_bitsandbytes(tensors)
    act, said = BROKEN[change]
    act(tensors)
    with pytest.raises(ModelError, match=said) as error:
        from_bitsandbytes(tensors, "h.3.weight")
    assert str(error.value).startswith("h.3.weight is not in NF4 as bitsandbytes saves it: ")
    assert "--quantize nf4" in str(error.value)


def test_statistics_that_are_not_nested_are_held_to_it_too() -> None:
    for change, said in (
        (put("weight.absmax", filled(0, torch.inf)), "absmax holds NaN or infinity"),
        (put("weight.absmax", lambda t: t.to(torch.uint8)), "weight.absmax must be"),
        (state(nested_offset=0.5), "nested_offset is unexpected"),
    ):
        tensors = serialised(torch.randn(64, 64), double=False)
        change(tensors)
        with pytest.raises(ModelError, match=f"the weight is not in NF4 .*{said}"):
            from_bitsandbytes(tensors)
    with pytest.raises(ModelError, match=f"no {STATE}, found .*quant_state.bitsandbytes__fp4"):
        from_bitsandbytes(serialised(torch.randn(64, 64), kind="fp4"))


LIN2 = "distilbert.transformer.layer.1.ffn.lin2."
WORDS = "distilbert.embeddings.word_embeddings."


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + key: tensor for key, tensor in tensors.items()}


FILES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "no state": (lambda t: t.pop(LIN2 + STATE), f"{LIN2}weight is not in NF4 .* no weight.quant_s"),
    "codes alone": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(LIN2 + "weight.")],
        f"{LIN2}weight is not in NF4 .* found weight. Pass",
    ),
    "no codes": (lambda t: t.pop(LIN2 + "weight"), f"{LIN2}weight .*: weight is missing"),
    "no layer": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(LIN2 + "weight")],
        "1 tensors of the backbone are not in its files",
    ),
    "a further key": (
        lambda t: t.update({LIN2 + "weight.zero_point": torch.zeros(1)}),
        f"its files hold {LIN2}weight.zero_point, which is not of its format",
    ),
    "8 bits": (
        lambda t: t.update({LIN2 + "weight": torch.ones(32, 64, dtype=torch.int8)}),
        f"{LIN2}weight .* weight must be",
    ),
    "another shape": (
        lambda t: t.update(under(LIN2, serialised(torch.randn(64, 32)))),
        rf"{LIN2}weight is \(64, 32\) in its files and \(32, 64\) in the model",
    ),
    "FP4": (
        lambda t: (
            [t.pop(key) for key in list(t) if key.startswith(LIN2 + "weight")],
            t.update(under(LIN2, serialised(torch.randn(32, 64), kind="fp4"))),
        ),
        f"{LIN2}weight is not in NF4 .*bitsandbytes__fp4",
    ),
    "an embedding": (
        lambda t: t.update(under(WORDS, serialised(torch.randn(99, 32)))),
        f"{WORDS[:-1]} is Embedding, in NF4 in its files; only linear layers",
    ),
    "dense": (
        lambda t: (t.clear(), t.update(distilbert().state_dict())),
        "was saved by bitsandbytes, says its config.json, but its files hold no layer in 4 bits",
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, Path]:
    """The tensors of a model, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    save(distilbert(), folder)
    tensors: Tensors = {}
    for file in (folder / "packed").glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(file)
        file.unlink()
    (folder / "packed" / "model.safetensors.index.json").unlink()
    return tensors, folder


@pytest.mark.parametrize("change", list(FILES))
def test_files_that_are_not_whole_are_refused_by_name(
    change: str, whole: tuple[Tensors, Path]
) -> None:
    tensors, folder = dict(whole[0]), whole[1]
    file = folder / "packed" / "model.safetensors"
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    read(folder)
    act, said = FILES[change]
    act(tensors)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=said):
        read(folder)


def test_a_config_that_does_not_say_so_is_refused(whole: tuple[Tensors, Path]) -> None:
    tensors, folder = whole
    safetensors.torch.save_file(tensors, folder / "packed" / "model.safetensors", {"format": "pt"})
    place = folder / "packed" / "config.json"
    written = place.read_text()
    config = json.loads(written)
    del config["quantization_config"]
    try:
        place.write_text(json.dumps(config))
        for quantize in ("none", "nf4"):
            with pytest.raises(ModelError):
                read(folder, quantize=quantize)
    finally:
        place.write_text(written)


def test_eight_bits_and_fp4_are_refused_by_name(tmp_path: Path) -> None:
    save(distilbert(), tmp_path / "8", load_in_4bit=False, load_in_8bit=True)
    with pytest.raises(ModelError, match="--base .*packed was saved by bitsandbytes in 8 bits"):
        read(tmp_path / "8")
    save(distilbert(), tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    with pytest.raises(ModelError, match="is not in NF4 .*bitsandbytes__fp4.*--quantize nf4"):
        read(tmp_path / "fp4")
