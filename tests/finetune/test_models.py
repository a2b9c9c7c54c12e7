"""A base is looked at once, as it is loaded: what is wrong is named then, and by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from architectures import build

from lora.errors import DataError, ModelError
from lora.finetune.cli import main
from lora.finetune.inputs import check_ids
from lora.finetune.losses import check_language
from lora.finetune.models import load_base, load_skeleton


def saved(folder: Path, name: str, size: str = "30KB") -> str:
    """A small model in several files, with a byte-level tokenizer of 260 tokens."""
    build(name).save_pretrained(folder, max_shard_size=size)
    load_base("demo-lm-tiny", 1, "text", 0).tokenizer.save_pretrained(folder)
    return str(folder)


def spoil(folder: str, ending: str, value: float) -> tuple[str, Path]:
    """One value of the tensor with this ending set; its key and its file."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        for key in tensors:
            if key.endswith(ending):
                tensors[key].view(-1)[-1] = value
                safetensors.torch.save_file(tensors, path, {"format": "pt"})
                return key, path
    raise AssertionError(ending)


SPOILED = ("word_embeddings.weight", "layer.1.ffn.lin2.weight", "output_layer_norm.weight", "bias")


@pytest.mark.parametrize("ending", SPOILED)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named_with_its_file(
    ending: str, value: float, tmp_path: Path
) -> None:
    base = saved(tmp_path, "distilbert")
    key, path = spoil(base, ending, value)
    with pytest.raises(ModelError) as said:
        load_base(base, 2, "classification", 0)
    assert f"{key} holds NaN or infinity, 1 of " in str(said.value)
    assert f"({key} in {path})" in str(said.value)


@pytest.mark.parametrize("ending", SPOILED[:3])
def test_it_is_named_in_four_bits_too(ending: str, tmp_path: Path) -> None:
    base = saved(tmp_path, "distilbert")
    key, path = spoil(base, ending, float("nan"))
    with pytest.raises(ModelError, match=f"{key} holds NaN or infinity, 1 of ") as said:
        load_base(base, 2, "classification", 0, "nf4")
    assert f"({key} in {path})" in str(said.value)
    assert str(said.value).startswith(f"--base {base}: ")


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_it_is_named_by_the_rank_that_reads_it(quantize: str, tmp_path: Path) -> None:
    """The last row is in the second rank's piece; in four bits each packs the whole first."""
    base = saved(tmp_path, "distilbert")
    key, _ = spoil(base, "layer.1.ffn.lin2.weight", float("nan"))
    with pytest.raises(ModelError, match=f"{key} holds NaN or infinity"):
        load_base(base, 2, "classification", 0, quantize, part=(1, 2))
    if quantize == "none":
        load_base(base, 2, "classification", 0, part=(0, 2))


def test_a_buffer_may_be_infinite_and_not_nan(tmp_path: Path) -> None:
    """BART's final_logits_bias: -inf there is a token that is never written."""
    base = saved(tmp_path, "bart")
    spoil(base, "final_logits_bias", float("-inf"))
    assert load_base(base, 1, "text", 0).model.final_logits_bias[0, -1] == float("-inf")
    spoil(base, "final_logits_bias", float("nan"))
    with pytest.raises(ModelError, match="final_logits_bias holds NaN"):
        load_base(base, 1, "text", 0)


def test_rows_of_zeros_and_16_bits_are_taken(tmp_path: Path) -> None:
    model = build("llama").to(torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight[5:] = 0
        model.model.layers[0].mlp.up_proj.weight.zero_()
    model.save_pretrained(tmp_path)
    load_base("demo-lm-tiny", 1, "text", 0).tokenizer.save_pretrained(tmp_path)
    found = load_base(str(tmp_path), 1, "text", 0).model
    assert torch.equal(found.model.embed_tokens.weight, model.model.embed_tokens.weight.float())


def test_the_command_names_it_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", "llama")
    key, _ = spoil(base, "q_proj.weight", float("nan"))
    data = tmp_path / "x.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "completion": "b"}}\n' for n in range(24)))
    run = tmp_path / "run"
    assert main(["train", "--base", base, "--data", str(data), "--run-dir", str(run)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{key} holds NaN or infinity" in said
    assert not run.exists()


def smaller(folder: Path, name: str, rows: int) -> str:
    """The model with an embedding of fewer rows than its tokenizer has tokens."""
    model = build(name)
    model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    load_base("demo-lm-tiny", 1, "text", 0).tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("load", [load_base, load_skeleton])
@pytest.mark.parametrize(("name", "task"), [("bert", "classification"), ("llama", "text")])
def test_a_tokenizer_that_is_larger_than_the_embedding(
    load: Any, name: str, task: str, tmp_path: Path
) -> None:
    base = smaller(tmp_path, name, 100)
    more = {"seed": 0} if load is load_base else {}
    with pytest.raises(ModelError, match=r"has ids up to \d+ \(.*, its embedding 100 rows"):
        load(base, 2, task, **more)


def test_plan_says_so_as_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = smaller(tmp_path / "base", "bert", 100)
    data = tmp_path / "x.tsv"
    rows = "".join(f"good {i}\tyes\nbad {i}\tno\n" for i in range(12))
    data.write_text("text\tlabel\n" + rows)
    said = []
    for verb in ("plan", "train"):
        run = ["--run-dir", str(tmp_path / "run")] if verb == "train" else []
        assert main([verb, "--base", base, "--data", str(data), *run]) == 2
        found = capsys.readouterr()
        assert "fits" not in found.out
        said.append(found.err.splitlines()[-1])
    assert "its embedding 100 rows" in said[0]
    assert said[0] == said[1]


def test_a_pad_token_past_the_embedding_is_named(tmp_path: Path) -> None:
    base = saved(tmp_path, "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<x{n}>" for n in range(60)]})
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(base)
    with pytest.raises(ModelError, match="its pad_token, '<padding>'"):
        load_base(base, 2, "classification", 0)


def test_a_special_token_past_the_embedding_is_refused_in_the_text_that_holds_it(
    tmp_path: Path,
) -> None:
    """Gemma 3's 1B has no row for <image_soft_token>, and reads every text without it."""
    base = saved(tmp_path, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<x{n}>" for n in range(60)]})
    assert len(tokenizer) > 300
    tokenizer.save_pretrained(base)
    found = load_base(base, 1, "text", 0)
    for text in ("a", "<x0>"):
        check_ids(found.model, found.tokenizer, found.tokenizer(text)["input_ids"], "the text")
    with pytest.raises(DataError, match=r"the text holds the token '<x59>', id \d+"):
        check_ids(found.model, found.tokenizer, found.tokenizer("<x59>")["input_ids"], "the text")


def test_a_decoder_that_starts_past_the_embedding(tmp_path: Path) -> None:
    base = saved(tmp_path, "t5")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder_start_token_id": 300}))
    with pytest.raises(ModelError, match="decoder_start_token_id 300"):
        load_base(base, 1, "text", 0)


def test_a_head_of_words_in_another_shape_is_named(tmp_path: Path) -> None:
    base = saved(tmp_path, "llama", "1GB")
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:77].clone()
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head.weight is \(77, 32\) in its files and"):
        load_base(base, 1, "text", 0)


def test_logits_that_overflow_are_not_taken_for_another_architecture() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(ModelError, match=r"logits of the base are NaN or infinite in .*float32"):
        check_language(model)
