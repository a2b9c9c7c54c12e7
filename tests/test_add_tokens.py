"""New tokens: added to the tokenizer and the embeddings, trained, saved, and read by PEFT."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from test_foreign import off

import lora
from lora import cli
from lora.models import load_base
from lora.source import open_source
from lora.testing import perturb
from lora.trained import reopen
from lora.vocabulary import add_tokens, resize, rows_of

NEW = ["<call>", "<end>"]


def untied() -> tuple[Any, Any]:
    """A LLaMA with a head of its own, and the tokenizer of demo-lm, which has 259 tokens."""
    tokenizer = load_base("demo-lm", 1, "text", 0).tokenizer
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=259, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), tokenizer


def test_tokens_are_added_and_their_rows_begin_as_their_text(tmp_path: Path) -> None:
    model, tokenizer = untied()
    base, _ = untied()
    pieces = tokenizer("<call>", add_special_tokens=False)["input_ids"]
    asked = add_tokens(model, tokenizer, NEW)
    assert asked == {"model.embed_tokens": [259, 260], "lm_head": [259, 260]}
    assert tokenizer("a<call>b<end>", add_special_tokens=False)["input_ids"].count(259) == 1
    assert rows_of(model) == model.config.vocab_size == 261
    for name in ("model.embed_tokens", "lm_head"):
        now, then = (m.get_submodule(name).weight for m in (model, base))
        assert torch.equal(now[:259], then)
        assert torch.allclose(now[259], then[pieces].mean(0), atol=1e-7)
    assert add_tokens(model, tokenizer, ["<call>"], whole=["lm_head"]) == {
        "model.embed_tokens": [259]
    }
    assert rows_of(model) == 261

    lora.inject(model, lora.LoRAConfig(r=2, target_modules=("q_proj",),
                                       trainable_token_indices=asked))  # fmt: skip
    perturb(model)
    lora.save(model.eval(), tmp_path)
    ids = torch.randint(1, 261, (3, 11), generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs, _ = untied()
        theirs.resize_token_embeddings(261, mean_resizing=False)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    assert off(theirs, model, ids) < 1e-5
    lora.load(base, tmp_path, resize_embeddings=True)
    assert off(base, model, ids) < 1e-5


def test_rows_that_no_adapter_trains_are_filed_with_it(tmp_path: Path) -> None:
    model, _ = untied()
    resize(model, 261)
    lora.inject(model, lora.LoRAConfig(r=2, target_modules=("q_proj",)))
    perturb(model)
    lora.save(model.eval(), tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert stored["base_model.model.lm_head.weight"].shape == (261, 32)
    again, _ = untied()
    lora.load(again, tmp_path, resize_embeddings=True)
    ids = torch.randint(1, 261, (3, 11), generator=torch.Generator().manual_seed(1))
    assert off(again, model, ids) < 1e-5


@pytest.mark.parametrize("tokens", [[], [""], ["a", "a"]])
def test_what_are_no_tokens_to_add(tokens: list[str]) -> None:
    model, tokenizer = untied()
    with pytest.raises(lora.ConfigError, match="add_tokens must be distinct texts"):
        add_tokens(model, tokenizer, tokens)


def test_a_run_adds_tokens_and_every_verb_knows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "d.jsonl", tmp_path / "run"
    rows = [{"prompt": f"say {n}", "response": f"<call>{n}<end>"} for n in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--base", "demo-lm", "--data", str(data), "--add-tokens", *NEW, "--epochs", "1",
             "--batch-size", "4", "--max-new-tokens", "4", "--dtype", "float32"]  # fmt: skip
    assert cli.main(["plan", *flags]) == 0
    assert "embed_tokens  ×1    261 -> 128" in capsys.readouterr().out
    assert cli.main(["train", *flags, "--run-dir", str(run)]) == 0
    stored = safetensors.torch.load_file(run / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert stored[key].shape == (2, 128)
    trained = reopen(run)
    assert trained.tokenizer("<call>", add_special_tokens=False)["input_ids"] == [259]
    ids = torch.randint(1, 261, (3, 11), generator=torch.Generator().manual_seed(1))

    # PEFT's user has the tokenizer beside the adapter, resizes the base by it, and loads
    theirs = load_base("demo-lm", 1, "text", 0).model
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "adapter")
    theirs.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        judge = peft.PeftModel.from_pretrained(theirs, run / "adapter").eval()
    assert off(judge, trained.model, ids) < 1e-5

    # The adapter alone
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    with pytest.raises(lora.CheckpointError, match="--resize-embeddings"):
        reopen(open_source(alone))
    again = reopen(open_source(alone, resizes=True))
    assert off(again.model, trained.model, ids) < 1e-5
    assert again.tokenizer("<end>", add_special_tokens=False)["input_ids"] == [260]

    merged = tmp_path / "merged"
    assert cli.main(["merge", str(run), "--output", str(merged)]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert off(plain, trained.model, ids) < 1e-5
    found = transformers.AutoTokenizer.from_pretrained(merged)
    assert found("<end>", add_special_tokens=False)["input_ids"] == [260]

    # Training goes on from it
    further = ["train", "--adapter", str(alone), "--base", "demo-lm", "--data", str(data),
               "--epochs", "1", "--batch-size", "4", "--max-new-tokens", "4",
               "--dtype", "float32"]  # fmt: skip
    assert cli.main([*further, "--run-dir", str(tmp_path / "no")]) == 2
    assert "--resize-embeddings" in capsys.readouterr().err
    assert cli.main([*further, "--resize-embeddings", "--run-dir", str(tmp_path / "on")]) == 0
    assert reopen(tmp_path / "on").tokenizer.convert_tokens_to_ids("<call>") == 259


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--add-tokens", "a", "a"], "--add-tokens must be distinct"),
        (["--add-tokens", "a", "--shard"], "--add-tokens cannot be combined with --shard"),
        (["--add-tokens", "<a>", "--method", "bitfit"], "bitfit trains no rows of embeddings"),
        (["--add-tokens", "<a>", "--trainable-token-indices", "3"], "cannot be combined with"),
        (["--resize-embeddings"], "--resize-embeddings has no effect without --adapter"),
    ],
)
def test_flags_that_do_not_go_together(
    flags: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    rows = [{"prompt": f"say {n}", "response": f"{n}"} for n in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    given = ["train", "--base", "demo-lm", "--data", str(data), *flags]
    assert cli.main([*given, "--run-dir", str(tmp_path / "run")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
