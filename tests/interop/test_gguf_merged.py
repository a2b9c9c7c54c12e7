"""Merged models as GGUF files: in llama.cpp they answer as in transformers."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import platformdirs
import pytest
import torch
import transformers
from architectures import build
from gguf_bases import bytes_of_gpt2, write_base

from lora import LoRAConfig, inject, save
from lora.errors import CheckpointError, ConfigError, LoraError, ModelError, RunError
from lora.finetune.cli import main
from lora.finetune.export import export
from lora.finetune.models import load_base
from lora.finetune.verbs import ExportConfig
from lora.interop import llama_cpp
from lora.interop.gguf_file import read_header
from lora.interop.gguf_vocabulary import PATTERNS, pre_tokenizer
from lora.interop.pretrained import read_tokenizer
from lora.testing import perturb

TOKENS = 260  # of the tokenizer: no unused ones, whose text engines differ on
CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SMOLLM2 = platformdirs.user_cache_path("lora-from-scratch") / (
    "demo/SmolLM2-135M-Instruct.Q4_1.gguf"
)


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and dequantized tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    return fields, tensors


def small(name: str, **settings: Any) -> Any:
    """A small model of TOKENS tokens, with room for a conversation."""
    config = build(name).config
    sizes = {"max_position_embeddings": 512, "sliding_window": None, "vocab_size": TOKENS}
    config.update(sizes | settings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def gguf_base(folder: Path) -> Path:
    """A base in a GGUF file, with a chat template."""
    path = folder / "llama.gguf"
    return write_base(small("llama"), path, bytes_of_gpt2(TOKENS), CHATML, positions=512)


def folder_base(folder: Path, name: str, **settings: Any) -> Path:
    """A base in a folder, with the same tokenizer and chat template."""
    small(name, **settings).save_pretrained(folder / name)
    read_tokenizer(str(gguf_base(folder))).save_pretrained(folder / name)
    return folder / name


def trained(base: Path, run: Path, *flags: object) -> Path:
    """A short run on conversations."""
    rows = [{"question": f"{i}?", "answer": f"no {i % 3}"} for i in range(40)]
    data = run.parent / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    given = ("--base", base, "--data", data, "--r", 2, "--batch-size", 8, "--epochs", 1,
             "--max-new-tokens", 4, "--learning-rate", 0.01, "--dtype", "float32")  # fmt: skip
    assert lora("train", *given, *flags, "--run-dir", run) == 0
    return run


def adapter_on(base: Path, folder: Path) -> Path:
    """A LoRA adapter with random values, without a run."""
    model = load_base(str(base), 1, "text", 0).model
    inject(model, LoRAConfig(r=2))
    perturb(model)
    return save(model, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return trained(gguf_base(folder), folder / "run")


def equal_prompts(said: str) -> int:
    """How many prompts a certificate says are equal, of 20."""
    found = re.search(r"to (\d+) of 20 prompts", said)
    assert found, said
    return int(found[1])


@pytest.mark.parametrize(
    "dtype",
    ["f32", "q8_0", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("f16", "bf16"))],
)
def test_a_gguf_base_keeps_its_metadata(dtype: Any, run: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged.gguf"
    said = export(ExportConfig(adapter=run, merged=True, dtype=dtype, output=output))
    # llama.cpp rounds the inputs of a matrix to its type too. In 8 bits that changes many answers
    # of a model with random weights.
    assert equal_prompts(said) >= {"f32": 20, "f16": 15, "bf16": 15, "q8_0": 0}[dtype]
    fields, tensors = read(output)
    before, base = read(run.parent / "llama.gguf")
    for key, value in before.items():
        if not key.startswith("GGUF."):
            assert fields[key] == value, key
    assert fields.keys() - before.keys() <= {"general.file_type", "general.quantization_version"}
    assert tensors.keys() == base.keys()
    merged = load_base(str(output), 1, "text", 0)
    assert f"base: {dtype.upper()} weights" in merged.note
    assert lora("merge", run, "--output", tmp_path / "plain") == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    bits = {"f32": 1e-6, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-6}[dtype]
    for name, parameter in plain.named_parameters():
        found = dict(merged.model.named_parameters())[name]
        largest = float(parameter.detach().abs().max())
        torch.testing.assert_close(found, parameter, rtol=bits, atol=bits * largest)
        if parameter.dim() == 1:
            assert torch.equal(found, parameter)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 128}}),
        ("mistral", {}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
    ],
)  # fmt: skip
def test_a_transformers_base_answers_alike_in_llama_cpp(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    run = adapter_on(folder_base(tmp_path, name, **settings), tmp_path / "adapter")
    said = export(ExportConfig(adapter=run, merged=True, dtype="f32"))
    assert equal_prompts(said) == 20, said
    fields, tensors = read(run / "merged.gguf")
    assert ("output.weight" in tensors) != settings.get("tie_word_embeddings", False)
    assert fields["tokenizer.chat_template"] == CHATML
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.tokens"][:4] == ["<pad>", "<s>", "</s>", "\u0100"]
    assert fields["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    if "llama3" not in str(settings):  # a file does not state the original length
        tokenizers = [read_tokenizer(str(path)) for path in (run / "merged.gguf", tmp_path / name)]
        assert len({str(tokenizer("a  b 12").input_ids) for tokenizer in tokenizers}) == 1


def test_four_bits_are_dequantized_if_asked(tmp_path: Path, capfd: Any) -> None:
    run = trained(gguf_base(tmp_path), tmp_path / "run", "--quantize", "nf4")
    assert lora("export", run, "--merged") == 2
    assert "--dequantize" in capfd.readouterr().err
    assert lora("export", run, "--merged", "--dequantize") == 0
    assert "dequantized layers" in capfd.readouterr().out


def test_added_tokens_are_in_the_vocabulary(tmp_path: Path) -> None:
    base = gguf_base(tmp_path)
    run = trained(base, tmp_path / "run", "--add-tokens", "<new>")
    export(ExportConfig(adapter=run, merged=True, dtype="f32"))
    fields, tensors = read(run / "merged.gguf")
    assert len(fields["tokenizer.ggml.tokens"]) == len(tensors["token_embd.weight"])
    assert "<new>" in fields["tokenizer.ggml.tokens"]
    assert fields["tokenizer.ggml.tokens"][:TOKENS] == read(base)[0]["tokenizer.ggml.tokens"]


def test_a_modelfile_is_written_beside_it(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "my model.gguf"
    config = ExportConfig(adapter=run, merged=True, format="ollama", output=output)
    assert f"ollama create NAME -f '{tmp_path}/my model.Modelfile'" in export(config)
    assert (tmp_path / "my model.Modelfile").read_text() == (
        "FROM ./my model.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<s>system\n'
        '{{ .Content }}</s>\n{{ else if eq .Role "user" }}<s>user\n'
        "{{ .Content }}</s>\n<s>assistant\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}</s>\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\n'
        "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_predict 4\n"
    )
    adapter = tmp_path / "a.gguf"
    export(ExportConfig(adapter=run, format="ollama", output=adapter))
    lines = (tmp_path / "a.Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {run.parent / 'llama.gguf'}", "ADAPTER ./a.gguf"]


def test_without_the_engine_the_sentence_says_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = llama_cpp.certificate(tmp_path / "a.gguf", None, None, [], [])
    assert said.startswith("not compared with llama.cpp, since xllamacpp is not installed")


def test_the_first_difference_is_named(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    base = load_base(str(run.parent / "llama.gguf"), 1, "text", 0)
    model = small("llama", hidden_size=32, initializer_range=0.2)
    other = write_base(model, tmp_path / "other.gguf", bytes_of_gpt2(TOKENS))
    said = llama_cpp.certificate(other, base.model, base.tokenizer, [[1, 40], [1, 41]], [2])
    assert re.search(r"to 0 of 2 prompts; the first difference is token \d+ of answer 1: ", said)
    assert "where the two largest logits differ by" in said


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"merged": True, "format": "vllm"}, "vLLM serves the folder.*lora merge"),
        ({"format": "vllm", "output": None}, "is a GGUF file, and vLLM.*lora merge"),
        ({"dtype": "q8_0"}, "q8_0 needs --merged"),
        ({"dequantize": True}, "no effect without --merged"),
        ({"merged": True, "dequantize": True}, "--dequantize has no effect"),
    ],
)
def test_flags_that_do_not_go_together(flags: Any, match: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        export(ExportConfig(adapter=run, **{"output": tmp_path / "a.gguf", **flags}))
    assert [*tmp_path.iterdir()] == []


def test_what_cannot_be_written_is_named_before_it_is_merged(tmp_path: Path) -> None:
    run = adapter_on(folder_base(tmp_path, "gemma"), tmp_path / "adapter")
    with pytest.raises(ModelError, match="model_type 'gemma'.*llama, mistral.*convert_hf_to_gguf"):
        export(ExportConfig(adapter=run, merged=True))
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(LoraError, match="exists already"):
        export(ExportConfig(adapter=run, merged=True, output=tmp_path / "b.gguf"))
    assert (tmp_path / "b.gguf").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_nothing(
    error: BaseException, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def fail(self: Any, tensor: Any) -> None:
        written.append(tensor)
        if len(written) == 3:
            raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        export(ExportConfig(adapter=run, merged=True, output=tmp_path / "a.gguf"))
    assert [*tmp_path.iterdir()] == []


def test_a_value_beyond_half_precision_is_named(tmp_path: Path) -> None:
    model = small("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    base = write_base(model, tmp_path / "a.gguf", bytes_of_gpt2(TOKENS), CHATML, positions=512)
    run = adapter_on(base, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"up_proj.weight has values outside .* f16.*bf16"):
        export(ExportConfig(adapter=run, merged=True))
    assert not (run / "merged.gguf").exists()


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]}  # fmt: skip


def test_pre_tokenizers_are_recognized_or_refused() -> None:
    for pattern, name in PATTERNS.items():
        assert pre_tokenizer({"pre_tokenizer": split(pattern)}) == name
    for other in (split(r"\w+"), {"type": "Whitespace"}, None, split("x")["pretokenizers"][0]):
        with pytest.raises(ModelError, match="no tokenizer.ggml.pre.*convert_hf_to_gguf"):
            pre_tokenizer({"pre_tokenizer": other})


@pytest.mark.slow
def test_smollm2_answers_alike_in_llama_cpp(tmp_path: Path) -> None:
    """The real file, trained a little and merged."""
    pytest.importorskip("xllamacpp")
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2} is not here: run lora data fetch smollm2")
    run = trained(SMOLLM2, tmp_path / "run", "--max-length", 64, "--answered", 2)
    for dtype, least in (("f32", 20), ("q8_0", 12)):
        output = tmp_path / f"{dtype}.gguf"
        said = export(ExportConfig(adapter=run, merged=True, dtype=dtype, output=output))
        assert equal_prompts(said) >= least, said
    before, after = read_header(SMOLLM2), read_header(output)
    assert {tensor.name for tensor in after.tensors} == {tensor.name for tensor in before.tensors}
    for key, value in before.metadata.items():
        assert key == "general.file_type" or after.metadata[key] == value
    with pytest.raises(RunError):
        export(ExportConfig(adapter=tmp_path / "none", merged=True))
