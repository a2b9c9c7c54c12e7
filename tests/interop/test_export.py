"""Adapters for other engines: llama.cpp's GGUF against its arithmetic, and what vLLM asks."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from architectures import CAUSAL, build
from conftest import distilbert
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import lora
from lora.finetune.cli import main
from lora.finetune.export import export
from lora.finetune.models import load_base
from lora.finetune.verbs import ExportConfig
from lora.interop.gguf_adapter import write_gguf_adapter
from lora.interop.saved_lora import read_saved_lora
from lora.interop.vllm import reasons_against_vllm, vllm_command
from lora.testing import perturb
from lora.vocabulary import resize

gguf = pytest.importorskip("gguf")

ENCODED = {"llama": "llama", "mistral": "llama", "mixtral": "llama", "phi": "phi2",
           "gpt_neox": "gptneox"}  # fmt: skip


def saved(model: nn.Module, folder: Path, **settings: Any) -> Path:
    """The folder of a LoRA adapter with values of its own."""
    lora.inject(model, lora.LoRAConfig(**{"r": 3, "lora_alpha": 6, **settings}))
    perturb(model)
    return lora.save(model, folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for one in reader.tensors:
        # The file names the innermost dimension first; 16 bits of bfloat16 come as bytes.
        data = gguf.dequantize(one.data, one.tensor_type)
        tensors[one.name] = torch.tensor(data).reshape(*reversed(one.shape.tolist()))
    return fields, tensors


def update(fields: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Tensor:
    """(alpha / r) B A, as llama.cpp computes it of the file."""
    A, B = (tensors[f"{name}.weight.lora_{side}"] for side in "ab")
    return fields["adapter.lora.alpha"] / B.shape[1] * B @ A


def delta(model: Any, path: str) -> Tensor:
    """What the adapter adds to a layer's weight (out, in), by our own merge."""
    layer = model.get_submodule(path)
    W, _ = layer.view.read()
    weight, _ = lora.merging.merged_parameters(layer)
    return ((weight.T if layer.view.transposed else weight) - W).detach()


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_every_layer_is_there_under_its_name(name: str, tmp_path: Path) -> None:
    model = build(name)
    folder = saved(model, tmp_path / "adapter")
    layers = model.lora_adapters["default"].targets
    assert write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "f32") == len(layers)
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == ENCODED.get(name, name)
    assert fields["adapter.lora.alpha"] == 6
    assert len(tensors) == 2 * len(layers)
    blocks = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[fields["general.architecture"]], 2
    )
    for path in layers:
        found, wanted = update(fields, tensors, blocks.get_name(path)), delta(model, path)
        moved = path.endswith(("q_proj", "k_proj")) and ENCODED.get(name) == "llama"
        if moved or path.endswith("query_key_value"):
            assert not torch.allclose(found, wanted, atol=1e-3)
            found, wanted = found.sort(dim=0).values, wanted.sort(dim=0).values
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def half_split(x: Tensor, angles: Tensor) -> Tensor:
    """transformers' rotation of x (heads, tokens, d): dimension i with i + d/2."""
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[None] for f in (torch.cos, torch.sin))
    return apply_rotary_pos_emb(x[None], x[None], cos, sin)[0][0]


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    """llama.cpp's of its llama architecture: dimension 2i with 2i + 1, as complex numbers."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize("name", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi"])
def test_attention_scores_under_the_engines_own_rotation(name: str, tmp_path: Path) -> None:
    """The scores of the updates alone: rows in an order that is wrong give others."""
    model = build(name)
    folder = saved(model, tmp_path / "adapter", target_modules="attention")
    write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))  # (tokens, hidden)
    angles = torch.outer(torch.arange(5.0), 0.3 ** torch.arange(4.0))  # (tokens, d/2)
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads

    def scores(q: Tensor, k: Tensor, rotate: Any) -> Tensor:
        q, k = (
            rotate((x @ W.T).unflatten(-1, (many, -1)).transpose(0, 1), angles)
            for W, many in ((q, heads), (k, groups))
        )
        return q @ k.repeat_interleave(heads // groups, dim=0).mT

    path = "model.layers.1.self_attn."
    wanted = scores(delta(model, path + "q_proj"), delta(model, path + "k_proj"), half_split)
    theirs = [update(fields, tensors, f"blk.1.attn_{one}") for one in "qk"]
    llamas = ENCODED.get(name) == "llama"
    found = scores(*theirs, interleaved if llamas else half_split)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    wrong = scores(*theirs, half_split if llamas else interleaved)
    assert not torch.allclose(wrong, wanted, atol=1e-2)
    torch.testing.assert_close(
        update(fields, tensors, "blk.1.attn_v"), delta(model, path + "v_proj"), atol=1e-5, rtol=1e-5
    )


def test_neox_has_all_queries_first(tmp_path: Path) -> None:
    model = build("gpt_neox")
    folder = saved(model, tmp_path / "adapter", target_modules="attention")
    write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    path = "gpt_neox.layers.0.attention.query_key_value"
    # as GPTNeoXAttention splits its output: of each head q, k and v
    split = (x @ delta(model, path).T).view(5, 4, 3 * 8).chunk(3, dim=-1)
    found = (x @ update(fields, tensors, "blk.0.attn_qkv").T).split(32, dim=-1)
    for ours, theirs in zip(split, found, strict=True):
        torch.testing.assert_close(theirs.view(5, 4, 8), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "alpha"),
    [
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, 12),
        ({"r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 2}}, 6),
        ({"r": 4, "lora_alpha": 6, "alpha_pattern": {"v_proj": 5}}, 6),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"v_proj": 2},
          "alpha_pattern": {"0.self_attn.q_proj": 1}}, 12),
        ({"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"}, 12),
    ],
)  # fmt: skip
def test_each_layer_keeps_its_scaling(settings: Any, alpha: float, tmp_path: Path) -> None:
    model = build("qwen2")
    folder = saved(model, tmp_path / "adapter", target_modules="attention", **settings)
    write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["adapter.lora.alpha"] == alpha
    for block in (0, 1):
        for one in "qkv":
            path = f"model.layers.{block}.self_attn.{one}_proj"
            found = update(fields, tensors, f"blk.{block}.attn_{one}")
            torch.testing.assert_close(found, delta(model, path), atol=1e-5, rtol=1e-5)


def test_embedding_and_head(tmp_path: Path) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "adapter", target_modules=("embed_tokens", "lm_head"))
    write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "f32")
    fields, tensors = read(tmp_path / "a.gguf")
    # llama.cpp takes rows of A by the tokens, and multiplies them by B
    A, B = (tensors[f"token_embd.weight.lora_{side}"] for side in "ab")
    assert (A.shape, B.shape) == ((300, 3), (32, 3))
    ids = torch.tensor([5, 17])
    found = fields["adapter.lora.alpha"] / B.shape[1] * A[ids] @ B.T
    torch.testing.assert_close(found, delta(model, "model.embed_tokens").T[ids])
    torch.testing.assert_close(
        update(fields, tensors, "output"), delta(model, "lm_head"), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("dtype", "eps"), [("f16", 2**-11), ("bf16", 2**-8)])
def test_in_sixteen_bits(dtype: Any, eps: float, tmp_path: Path) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "adapter")
    for one in ("f32", dtype):
        write_gguf_adapter(folder, model.config, tmp_path / f"{one}.gguf", one)
    _, exact = read(tmp_path / "f32.gguf")
    _, found = read(tmp_path / f"{dtype}.gguf")
    for name, tensor in exact.items():
        assert not tensor.equal(found[name])
        torch.testing.assert_close(found[name], tensor, rtol=eps, atol=1e-7)
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / f"{dtype}.gguf").tensors}
    assert kinds == {dtype.upper()}


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("llama", {"modules_to_save": ("lm_head",)}, r"lm_head\S* is not part of a low-rank"),
        ("qwen2", {"bias": "all"}, r"bias is not part of a low-rank"),
        ("qwen2", {"lora_bias": True, "target_modules": ("q_proj",)}, r"lora_B.bias is not part"),
        ("llama", {"trainable_token_indices": (3,)}, r"embed_tokens\S* is not part"),
        ("gemma", {"target_modules": ("lm_head",)}, "llama.cpp does not adapt lm_head"),
        ("gpt2", {"target_modules": ("lm_head",)}, "lm_head shares its weight"),
        ("gpt2", {"target_modules": ("wte",)}, "wte shares its weight"),
        ("gpt2", {"target_modules": ("wpe",)}, "llama.cpp does not adapt transformer.wpe in gpt2"),
    ],
)
def test_what_llama_cpp_has_no_form_of(name: str, settings: Any, match: str, tmp_path) -> None:
    model = build(name)
    folder = saved(model, tmp_path / "adapter", **settings)
    with pytest.raises(lora.CheckpointError, match=f"{match}.*lora merge"):
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_another_method_base_or_file_is_named(tmp_path: Path) -> None:
    model, output = build("llama"), tmp_path / "a.gguf"
    lora.inject(model, lora.METHODS["dora"].Config(r=2))
    dora = lora.save(model, tmp_path / "dora")
    with pytest.raises(lora.CheckpointError, match="was trained with dora.*lora merge"):
        write_gguf_adapter(dora, model.config, output)
    folder = saved(distilbert(), tmp_path / "other")
    with pytest.raises(lora.ConfigError, match="'distilbert', and adapters.*llama, mistral"):
        write_gguf_adapter(folder, distilbert().config, output)
    folder = saved(build("llama"), tmp_path / "adapter")
    config = build("llama").config
    config.num_attention_heads = 24
    with pytest.raises(lora.CheckpointError, match="q_proj.lora_B.weight is .* in the file"):
        write_gguf_adapter(folder, config, output)
    output.write_text("mine")
    with pytest.raises(lora.ConfigError, match="exists already"):
        write_gguf_adapter(folder, model.config, output)
    assert output.read_text() == "mine"
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 7}))
    with pytest.raises(lora.CheckpointError, match="was edited"):
        write_gguf_adapter(folder, model.config, tmp_path / "b.gguf")


def test_values_beyond_half_precision(tmp_path: Path) -> None:
    model = build("llama")
    lora.inject(model, lora.LoRAConfig(r=2))
    perturb(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.adapters["default"].lora_B[0, 0] = 1e6
    folder = lora.save(model, tmp_path / "adapter")
    with pytest.raises(lora.CheckpointError, match=r"ffn_up.weight.lora_b is not finite in f16"):
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    write_gguf_adapter(folder, model.config, tmp_path / "a.gguf", "bf16")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(lora.CheckpointError, match="cannot be written: .*--output"):
        write_gguf_adapter(folder, model.config, tmp_path / "file" / "a.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "file"}


def test_a_run_and_its_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("mistral").save_pretrained(base)
    model = type(build("mistral")).from_pretrained(base)
    run = tmp_path / "run"
    saved(model, run / "adapter")
    said = export(ExportConfig(adapter=run))
    assert said.startswith(f"written: {run / 'adapter.gguf'}, 14 layers.")
    assert read(run / "adapter.gguf")[0]["general.architecture"] == "llama"
    said = export(ExportConfig(adapter=run, format="vllm"))
    assert said == (
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules run={run / 'adapter'}"
    )
    with pytest.raises(lora.ConfigError, match="writes no GGUF file"):
        export(ExportConfig(adapter=run, format="vllm", output=tmp_path / "x"))
    with pytest.raises(lora.errors.ModelError, match="none: no such folder or file"):
        export(ExportConfig(adapter=run, base=str(tmp_path / "none"), output=tmp_path / "x"))
    bare = saved(build("mistral"), tmp_path / "bare")
    with pytest.raises(lora.ConfigError, match="does not name its base"):
        export(ExportConfig(adapter=bare))
    for name in ("demo-lm", "demo-lm-tiny"):  # a former name, and one of today
        with pytest.raises(lora.ConfigError, match=f"the base {name} exists only in this package"):
            export(ExportConfig(adapter=run, base=name))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": "attention"},
                                      {"target_modules": ("embed_tokens", "lm_head", "q_proj")},
                                      {"rank_pattern": {"v_proj": 2},
                                       "alpha_pattern": {"v_proj": 4}}])  # fmt: skip
def test_vllm_takes_it(settings: Any, tmp_path: Path) -> None:
    model = build("llama")
    assert (
        reasons_against_vllm(
            read_saved_lora(saved(model, tmp_path / "adapter", **settings), model.config)
        )
        == []
    )


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("llama", {"modules_to_save": ("lm_head",)}, "lm_head.*no modules_to_save"),
        ("qwen2", {"bias": "lora_only"}, "bias.*no biases"),
        ("llama", {"trainable_token_indices": (3,)}, "embed_tokens.*no trained tokens"),
        ("llama", {"rank_pattern": {"v_proj": 2}}, "v_proj and 1 others have another rank"),
        ("llama", {"alpha_pattern": {"v_proj": 2}}, "v_proj and 1 others have another rank"),
        ("llama", {"r": 600, "target_modules": ("v_proj",)}, "rank 600: vLLM takes at most 512"),
        (
            "gpt2",
            {"target_modules": ("wte",)},
            "wte: the only embedding that vLLM adapts is embed_tokens",
        ),
    ],
)
def test_what_stands_against_vllm(name: str, settings: Any, match: str, tmp_path: Path) -> None:
    model = build(name)
    folder = saved(model, tmp_path / "adapter", **settings)
    model.config.save_pretrained(tmp_path / "base")
    assert len(reasons_against_vllm(read_saved_lora(folder, model.config))) == 1
    with pytest.raises(lora.CheckpointError, match=f"(?s)cannot serve.*{match}.*lora merge"):
        vllm_command(folder, str(tmp_path / "base"))


def test_vllm_is_told_the_rank(tmp_path: Path) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "mine", r=17)
    model.config.save_pretrained(tmp_path / "base")
    said = vllm_command(folder, str(tmp_path / "base"))
    assert "/base --enable-lora --max-lora-rank 32 --lora-modules mine=" in said


def _without(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def _as(tensors: dict[str, Tensor], end: str, change: Any) -> dict[str, Tensor]:
    return {key: change(t) if key.endswith(end) else t for key, t in tensors.items()}


UP = "layers.0.mlp.up_proj.lora_B.weight"
DAMAGES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "half a pair": (lambda t: _without(t, UP), {}, "up_proj.lora_B.weight is not in the file"),
    "a layer less": (lambda t: {k: v for k, v in t.items() if "layers.1" not in k}, {},
                     "layers.1.* is not in the file"),
    "whole numbers": (lambda t: _as(t, UP, lambda v: v.to(torch.int8)), {}, "int8, no dtype"),
    "complex": (lambda t: _as(t, UP, lambda v: v.to(torch.complex64)), {}, "complex64, no dtype"),
    "eight bits": (lambda t: _as(t, UP, lambda v: v.to(torch.float8_e5m2)), {}, "float8.*no dtype"),
    "not a number": (lambda t: _as(t, UP, lambda v: v * float("nan")), {}, "144 values.*finite"),
    "another rank": (lambda t: t, {"r": 4}, "Set r to 3"),
    "another shape": (lambda t: _as(t, UP, lambda v: v[:-1]), {}, "up_proj.lora_B.weight is"),
    "no such layer": (lambda t: t, {"target_modules": ["q_porj"]}, "no layer matches"),
    "more": (lambda t: t | {"base_model.model.x.lora_A.weight": torch.ones(3, 4)}, {},
             "x.lora_A.weight has no place"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_load_refuses_export_refuses_in_the_same_words(damage: str, tmp_path: Path) -> None:
    change, settings, match = DAMAGES[damage]
    model = build("llama")
    folder = saved(model, tmp_path / "adapter")
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    model.config.save_pretrained(tmp_path / "base")
    with pytest.raises(lora.LoraError, match=match) as loaded:
        lora.load(build("llama"), folder)
    with pytest.raises(lora.LoraError) as exported:
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    with pytest.raises(lora.LoraError) as served:
        vllm_command(folder, str(tmp_path / "base"))
    assert str(loaded.value) == str(exported.value) == str(served.value)
    assert type(loaded.value) is type(exported.value)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "base"}


def test_every_command_that_is_printed_is_quoted(tmp_path: Path) -> None:
    """A folder may be called what a shell would run."""
    base, run = tmp_path / "x; touch pwned #", tmp_path / "$(touch pwned) my run"
    build("mistral").save_pretrained(base)
    saved(type(build("mistral")).from_pretrained(base), run / "adapter")
    said = export(ExportConfig(adapter=run, format="vllm"))
    assert shlex.split(said) == [
        "vllm", "serve", str(base), "--enable-lora", "--max-lora-rank", "8", "--lora-modules",
        f"{run.name}={run / 'adapter'}",
    ]  # fmt: skip
    said = export(ExportConfig(adapter=run))
    assert shlex.split(said.partition("Run ")[2])[-1] == str(run / "adapter.gguf")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_export_that_fails_leaves_no_temporary_file(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "adapter")

    def fail(self: Any) -> None:
        self.fout[0].write(b"half of it")
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    wanted = lora.CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write_gguf_adapter(folder, model.config, tmp_path / "a.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1e12),
        ("num_labels", 2**31),
        ("num_attention_heads", 10**9),
        ("max_position_embeddings", 2**40),
        ("text_config", {"num_hidden_layers": 10**9}),
    ],
)
def test_a_number_of_the_base_is_no_loop_without_end(key: str, value: Any, tmp_path: Path) -> None:
    model = build("llama")
    folder = saved(model, tmp_path / "adapter")
    stated = model.config.to_dict() | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(lora.errors.ModelError, match=r"damaged: (text_config\.)?(num_|max_pos)"):
        export(ExportConfig(adapter=folder, base=str(tmp_path), output=tmp_path / "a.gguf"))


def test_a_base_of_more_than_its_files_hold_is_not_made(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path)
    stated = model.config.to_dict() | {"vocab_size": 2**26}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(lora.errors.ModelError, match="states 4,29.* parameters, and its weights"):
        load_base(str(tmp_path), 1, "text", seed=0)


def test_an_adapter_of_a_resized_base_names_the_merge_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "base")
    found = load_base("demo-lm-tiny", 1, "text", 0)
    found.model.save_pretrained(place)
    found.tokenizer.save_pretrained(place)
    model = load_base(place, 1, "text", 0).model
    resize(model, 261)
    model.config._name_or_path = "somewhere/else"
    folder = saved(model, tmp_path / "an adapter", target_modules=("q_proj",))
    for form in ("gguf", "vllm"):
        assert main(["export", str(folder), "--base", place, "--format", form]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "was trained on a base with 261 tokens, found one with 259" in said
        assert "Merge it into the base instead: lora merge" in said
    _, *words = shlex.split(said[said.index("lora merge") :].removesuffix("."))
    merged = tmp_path / "FOLDER"
    assert main([*words[:-1], str(merged)]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.randint(1, 259, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        off = plain(ids).logits - model.eval()(ids).logits
    assert plain.config.vocab_size == 261
    assert float(off.abs().max()) < 1e-4
