"""Bases in GGUF files: what is read of them, what trains on them, and what is refused."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from architectures import build
from gguf_bases import bytes_of_gpt2, stored_type, write_base

from lora.errors import LoraError, ModelError
from lora.finetune.cli import main
from lora.finetune.demo import fetch
from lora.finetune.models import load_base, load_skeleton, writing_parts
from lora.finetune.source import open_source
from lora.interop.gguf_base import gguf_config, llama3_factors
from lora.interop.gguf_file import gguf_in, read_header
from lora.nf4 import NF4Linear

IDS = torch.tensor([[260, 17, 5, 99, 280, 41, 12]])
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def chat_base(path: Path, **options: Any) -> Path:
    """A LLaMA of 300 tokens that reads any text, with a chat template."""
    model = build("llama")
    options = {"tokenizer": bytes_of_gpt2(300), "template": CHATML, "positions": 512, **options}
    return write_base(model, path, **options)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"])
def test_a_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.config.sliding_window = None
    base = load_base(str(write_base(model, tmp_path / "a.gguf")), 1, "text", 0)
    torch.testing.assert_close(logits(base.model), logits(model))
    assert (base.new, base.stored) == ((), torch.float32)
    assert base.note == f"base: F32 weights of {tmp_path / 'a.gguf'}, dequantized to float32"


@pytest.mark.parametrize(("kind", "stored"), [("Q8_0", "float32"), ("F16", "float16"),
                                              ("BF16", "bfloat16")])  # fmt: skip
def test_weights_are_the_dequantized_ones(kind: str, stored: str, tmp_path: Path) -> None:
    model = build("llama")
    base = load_base(str(write_base(model, tmp_path / "a.gguf", type=kind)), 1, "text", 0)
    assert base.stored == getattr(torch, stored)
    exact = dict(model.named_parameters())
    for name, parameter in base.model.named_parameters():
        expected = exact[name].detach().numpy()
        if parameter.dim() > 1:
            stored_as = stored_type(parameter, kind)
            expected = gguf.dequantize(gguf.quantize(expected, stored_as), stored_as)
        assert torch.equal(parameter, torch.tensor(expected)), name
    assert f"base: {kind} weights of " in base.note


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    path = write_base(build("llama"), tmp_path / "a.gguf")
    assert gguf_in(str(tmp_path)) == path
    assert load_base(str(tmp_path), 1, "text", 0).model.config._name_or_path == str(path)
    write_base(build("llama"), tmp_path / "b.gguf")
    with pytest.raises(ModelError, match=r"2 GGUF files: a.gguf, b.gguf. Pass one .*a.gguf"):
        load_base(str(tmp_path), 1, "text", 0)
    build("llama").save_pretrained(tmp_path)  # config.json: the folder is a transformers model
    assert gguf_in(str(tmp_path)) is None


def test_the_skeleton_reads_no_weights(tmp_path: Path) -> None:
    path = chat_base(tmp_path / "a.gguf")
    header = read_header(path)
    whole = load_base(str(path), 1, "text", 0)
    with path.open("r+b") as file:
        for tensor in header.tensors:
            file.seek(tensor.start)
            file.write(b"\xff" * tensor.length)  # NaN
    for labels, task in ((1, "text"), (3, "classification")):
        skeleton = load_skeleton(str(path), labels, task)
        assert all(parameter.is_meta for parameter in skeleton.model.parameters())
        assert skeleton.new == (("score",) if labels == 3 else ())
    assert skeleton.model.config.num_labels == 3
    assert [n for n, _ in load_skeleton(str(path), 1, "text").model.named_parameters()] == [
        name for name, _ in whole.model.named_parameters()
    ]
    packed = load_skeleton(str(path), 1, "text", "nf4").model
    assert sum(isinstance(module, NF4Linear) for module in packed.modules()) == 14
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        load_base(str(path), 1, "text", 0)


def test_a_classifier_has_a_new_head(tmp_path: Path) -> None:
    path = str(chat_base(tmp_path / "a.gguf"))
    base = load_base(path, 3, "classification", 0)
    assert base.new == ("score",)
    assert base.model.score.weight.shape == (3, 32)
    again = load_base(path, 3, "classification", 0)
    assert torch.equal(base.model.score.weight, again.model.score.weight)


def test_in_four_bits(tmp_path: Path) -> None:
    path = str(chat_base(tmp_path / "a.gguf"))
    dense, packed = (load_base(path, 1, "text", 0, how).model for how in ("none", "nf4"))
    layers = [name for name, module in packed.named_modules() if isinstance(module, NF4Linear)]
    assert len(layers) == 14
    assert not any("lm_head" in name for name in layers)
    off = (logits(packed) - logits(dense)).abs().max() / logits(dense).abs().max()
    assert 0 < float(off) < 0.5


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    tokenizer = {**bytes_of_gpt2(300), "eot_token_id": 258}
    path = str(chat_base(tmp_path / "a.gguf", tokenizer=tokenizer))
    read, generation = writing_parts(path)
    assert generation.eos_token_id == [2, 258]
    assert (read.eos_token_id, read.chat_template) == (2, CHATML)
    assert load_base(path, 1, "text", 0).model.generation_config.eos_token_id == [2, 258]


@pytest.mark.parametrize(("pre", "apart"), [("smollm", True), ("gpt-2", False)])
def test_numbers_are_split_as_the_file_says(pre: str, apart: bool, tmp_path: Path) -> None:
    tokenizer = {**bytes_of_gpt2(300), "pre": pre}
    path = str(chat_base(tmp_path / "a.gguf", tokenizer=tokenizer))
    ids = load_base(path, 1, "text", 0).tokenizer("a  5", add_special_tokens=False)["input_ids"]
    # With the digit apart, the two spaces before it are one piece, and one token.
    assert len(ids) == (3 if apart else 4)


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


def pairs(path: Path) -> Path:
    rows = [{"prompt": f"{i % 6} is", "completion": f" number {i % 6}"} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("quantize", ["none", pytest.param("nf4", marks=pytest.mark.slow)])
def test_from_training_to_a_merged_model(
    quantize: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, run = chat_base(tmp_path / "base.gguf", type="Q8_0"), tmp_path / "run"
    flags = ("--base", base, "--data", pairs(tmp_path / "data.jsonl"), "--r", 2, "--batch-size", 8,
             "--epochs", 1, "--max-new-tokens", 4, "--quantize", quantize)  # fmt: skip
    assert lora("data", "preview", *flags) == 0
    assert lora("plan", *flags) == 0
    note = f"base: Q8_0 weights of {base}, dequantized to float32"
    assert note in capfd.readouterr().out
    assert lora("train", *flags, "--run-dir", run) == 0
    assert note in capfd.readouterr().err
    assert f'base = "{base}"' in (run / "config.toml").read_text()
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert lora("eval", run) == 0
    assert lora("generate", run, "--prompt", "1 is", "2 is") == 0
    assert lora("generate", run / "adapter", "--prompt", "1 is") == 0
    assert open_source(run / "adapter").config.base == str(base)
    dequantize = ["--dequantize"] if quantize == "nf4" else []
    assert lora("merge", run, "--output", tmp_path / "merged", *dequantize) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.model_type == "llama"
    assert not hasattr(merged.config, "quantization_config")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("1 is")["input_ids"]
    base.unlink()
    capfd.readouterr()
    assert lora("eval", run) == 2
    assert "does not exist any more" in capfd.readouterr().err


def test_smollm2_is_recorded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    flags = ("--base", "smollm2", "--data", pairs(tmp_path / "data.jsonl"), "--r", 2,
             "--batch-size", 8, "--epochs", 1, "--max-new-tokens", 4)  # fmt: skip
    assert lora("plan", *flags) == 2
    assert "Run lora data fetch smollm2" in capfd.readouterr().err
    path = chat_base(tmp_path / "a.gguf")
    monkeypatch.setattr(fetch, "path", lambda name: {"smollm2": path}[name])
    run = tmp_path / "run"
    assert lora("train", *flags, "--run-dir", run) == 0
    assert 'base = "smollm2"' in (run / "config.toml").read_text()
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "lora-from-scratch:smollm2"
    assert 'load_base("smollm2", 1, "text", seed=0)' in (run / "adapter/README.md").read_text()
    assert lora("generate", run, "--prompt", "1 is") == 0
    assert lora("generate", run / "adapter", "--prompt", "1 is") == 0


def test_the_readme_of_an_adapter_tells_how_to_load_the_file(tmp_path: Path) -> None:
    from lora import LoRAConfig, inject, save

    model = load_base(str(chat_base(tmp_path / "a.gguf")), 1, "text", 0).model
    inject(model, LoRAConfig(r=2))
    save(model, tmp_path / "adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=NAME)" in text
    assert "AutoPeftModel" not in text


def test_llama_3_rotates_by_the_table_of_its_file(tmp_path: Path) -> None:
    settings = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = build("llama").config
    config.rope_parameters = settings
    model = transformers.LlamaForCausalLM(config).eval()
    table = llama3_factors(settings, 8)
    assert table.min() == 1
    assert table.max() > 1
    exact = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
    plain = 500000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / table, exact)
    tensors = {"rope_freqs.weight": table}
    metadata = {"llama.rope.freq_base": 500000.0}
    path = write_base(model, tmp_path / "a.gguf", tensors=tensors, metadata=metadata)
    assert gguf_config(path).rope_parameters == settings
    torch.testing.assert_close(logits(load_base(str(path), 1, "text", 0).model), logits(model))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tensors": {"rope_freqs.weight": torch.tensor([1.0, 2, 3, 4])}}, "rope_freqs.weight"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope.scaling.type 'yarn'"),
        ({"tensors": {"blk.0.attn_q.bias": torch.ones(32)}}, r"32 values \(blk.attn_q.bias\)"),
        ({"tokenizer": {"tokens": ["a"]}}, "holds no tokenizer"),
        ({"tokenizer": {"model": "llama"}}, "holds no tokenizer"),
        ({"tokenizer": {**bytes_of_gpt2(300), "model": "bert"}}, "tokenizer cannot be loaded"),
        ({"metadata": {"general.type": "adapter"}}, "is an adapter"),
        ({"metadata": {"general.type": "mmproj"}}, "general.type is 'mmproj'"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts.*llama-gguf-split"),
        ({"metadata": {"llama.block_count_": 1, "llama.vocab_size": 2**26}}, "vocab_size|states"),
        ({"tokenizer": {**bytes_of_gpt2(300), "eos_token_id": 10**6}}, "tokenizer cannot be"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(options: Any, match: str, tmp_path: Path) -> None:
    path = chat_base(tmp_path / "a.gguf", **options)
    for load in (load_skeleton, lambda *given: load_base(*given, seed=0)):
        with pytest.raises(ModelError, match=f"a.gguf.*(?:{match})"):
            load(str(path), 1, "text")


@pytest.mark.parametrize("name", ["gemma", "gpt_neox"])
def test_an_architecture_that_transformers_does_not_read(name: str, tmp_path: Path) -> None:
    path = write_base(build(name), tmp_path / "a.gguf")
    architecture = name.replace("_", "")
    match = f"general.architecture '{architecture}', only of .*llama, .*qwen2"
    for load in (load_skeleton, lambda *given: load_base(*given, seed=0)):
        with pytest.raises(ModelError, match=match):
            load(str(path), 1, "text")


def header(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


HUGE = 2**60
DAMAGED = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF" + bytes(8), "12 bytes"),
    "not GGUF": (b"PK\x03\x04" + bytes(64), "not a GGUF file: it begins with"),
    "version 1": (header(version=1), "states version 1"),
    "tensors": (header(bytes(99), tensors=HUGE), "states 1,152,.* tensors"),
    "entries": (header(bytes(99), entries=HUGE), "states 1,152,.* metadata entries"),
    "key": (header(struct.pack("<Q", HUGE), bytes(99), entries=1), "ends within its header"),
    "array": (header(text(b"a"), struct.pack("<IIQ", 9, 0, HUGE), bytes(99), entries=1),
              "values in an array"),
    "long array": (header(text(b"a"), struct.pack("<IIQ", 9, 0, 3 * 2**20), bytes(3 * 2**20),
                          entries=1), "array of 3,145,728 values"),
    "array of arrays": (header(text(b"a"), struct.pack("<IIQ", 9, 9, 1), bytes(99), entries=1),
                        "array of values of type 9"),
    "type": (header(text(b"a"), struct.pack("<I", 77), bytes(99), entries=1), "unknown type 77"),
    "not UTF-8": (header(text(b"\xff"), struct.pack("<I", 0), bytes(99), entries=1), "utf-8"),
    "dimensions": (header(text(b"a"), struct.pack("<I", 2**31), bytes(99), tensors=1),
                   "tensor a has 2,147,"),
    "tensor type": (header(text(b"a"), struct.pack("<IQIQ", 1, 32, 999, 0), bytes(99), tensors=1),
                    "tensor a has the unknown type 999"),
    "part of a block": (header(text(b"a"), struct.pack("<IQIQ", 1, 33, 8, 0), bytes(99), tensors=1),
                        "does not consist of Q8_0 blocks"),
    "elements": (header(text(b"a"), struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0), bytes(99),
                        tensors=1), "tensor a ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_header_is_named(damage: str, tmp_path: Path) -> None:
    payload, match = DAMAGED[damage]
    (tmp_path / "a.gguf").write_bytes(payload)
    with pytest.raises(ModelError, match=f"a.gguf.*{match}"):
        load_base(str(tmp_path / "a.gguf"), 1, "text", 0)


def test_a_file_that_ends_early_is_named_wherever_it_ends(tmp_path: Path) -> None:
    whole = chat_base(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "a.gguf"
    for length in (*range(0, len(whole), len(whole) // 40), len(whole) - 33):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"a.gguf.*(bytes|byte)"):
            read_header(path)


def test_a_changed_byte_of_the_header_raises_nothing_but_our_errors(tmp_path: Path) -> None:
    path = chat_base(tmp_path / "a.gguf")
    whole, end = path.read_bytes(), read_header(path).tensors[0].start
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[rng.randrange(end)] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            load_skeleton(str(path), 1, "text")
        except LoraError:
            refused += 1
    assert refused > 20


def test_the_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_base(build("llama"), tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'lora-from-scratch\[gguf\]'"):
        load_base(str(path), 1, "text", 0)
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"accelerate.*pip install 'lora-from-scratch\[gguf\]'"):
        load_base(str(path), 1, "text", 0)
