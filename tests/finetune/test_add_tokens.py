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
from test_resume import result

import lora
import lora.finetune.run
from lora.errors import RunError
from lora.finetune import cli
from lora.finetune.models import load_base
from lora.finetune.source import open_source
from lora.finetune.trained import reopen
from lora.testing import perturb
from lora.vocabulary import add_tokens, resize, rows_of

NEW = ["<call>", "<end>"]


def untied() -> tuple[Any, Any]:
    """A LLaMA with a head of its own, and the tokenizer of demo-lm-tiny, which has 259 tokens."""
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
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
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_BFLOAT16", "0")  # an adapter alone computes in the processor's dtype
    data, run = tmp_path / "d.jsonl", tmp_path / "run"
    rows = [{"prompt": f"say {n}", "response": f"<call>{n}<end>"} for n in range(10)]
    data.write_text("\n".join(map(json.dumps, rows)))
    flags = ["--base", "demo-lm-tiny", "--data", str(data), "--add-tokens", *NEW, "--epochs", "1",
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
    theirs = load_base("demo-lm-tiny", 1, "text", 0).model
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
    further = ["train", "--adapter", str(alone), "--base", "demo-lm-tiny", "--data", str(data),
               "--epochs", "1", "--batch-size", "4", "--max-new-tokens", "4",
               "--dtype", "float32"]  # fmt: skip
    assert cli.main([*further, "--run-dir", str(tmp_path / "no")]) == 2
    assert "--resize-embeddings" in capsys.readouterr().err
    assert cli.main([*further, "--resize-embeddings", "--run-dir", str(tmp_path / "on")]) == 0
    assert reopen(tmp_path / "on").tokenizer.convert_tokens_to_ids("<call>") == 259


def test_tokens_in_spare_rows_of_the_base_are_not_lost_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = untied()
    model.resize_token_embeddings(300)  # as bases are padded to a round number
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    tokenizer.add_tokens(NEW)
    lora.inject(model, lora.LoRAConfig(r=2))
    lora.save(model, tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    flags = [*texts(tmp_path / "d.jsonl"), "--adapter", str(tmp_path / "adapter")]
    flags += ["--base", str(tmp_path / "base"), "--max-length", "64", "--template", "none"]
    for verb in (["train", "--run-dir", str(tmp_path / "no")], ["plan"], ["data", "preview"]):
        assert cli.main([*verb, *flags]) == 2
        assert "2 tokens that the base's lacks or numbers otherwise ('<call>', '<end>')" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "no").exists()
    flags = ["train", *flags]
    assert cli.main([*flags, "--resize-embeddings", "--run-dir", str(tmp_path / "on")]) == 0
    assert reopen(tmp_path / "on").tokenizer.convert_tokens_to_ids("<end>") == 260


class CutError(Exception):
    """What stands for a process's end."""


def cut_at(step: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `lora train`, cut off in the middle of a step."""
    real = lora.finetune.record.Record.step

    def stop(self: Any, now: Any) -> None:
        real(self, now)
        if now.step == step:
            raise CutError

    with monkeypatch.context() as patch:
        patch.setattr(lora.finetune.record.Record, "step", stop)
        with pytest.raises(CutError):
            cli.main(arguments)


def texts(path: Path) -> list[str]:
    """Flags of a tiny run on texts with both tokens."""
    rows = [{"prompt": f"say {n}", "response": f"<call>{n}<end>"} for n in range(10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return ["--base", "demo-lm-tiny", "--data", str(path), "--epochs", "2", "--batch-size", "4",
            "--max-new-tokens", "4", "--dtype", "float32", "--save-steps", "1"]  # fmt: skip


def test_a_run_that_adds_tokens_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["train", *texts(tmp_path / "d.jsonl"), "--add-tokens", *NEW]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main([*flags, "--run-dir", str(whole)]) == 0
    cut_at(3, [*flags, "--run-dir", str(run)], monkeypatch)
    assert (run / "checkpoints" / "step-00000002").is_dir()
    assert not (run / "adapter").exists()
    halfway = reopen(run)  # by its checkpoint
    assert halfway.tokenizer("<end>", add_special_tokens=False)["input_ids"] == [260]
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert result(run) == result(whole)
    files = ["tokenizer.json", "tokenizer_config.json", "adapter_model.safetensors"]
    assert [(run / "adapter" / name).read_bytes() for name in files] == [
        (whole / "adapter" / name).read_bytes() for name in files
    ]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's adapter of a base with both tokens, the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("grown")
    flags = ["train", *texts(folder / "d.jsonl"), "--add-tokens", *NEW]
    assert cli.main([*flags, "--run-dir", str(folder / "run")]) == 0
    return Path(shutil.copytree(folder / "run" / "adapter", folder / "alone" / "adapter"))


@pytest.mark.slow
@pytest.mark.parametrize("inner", [True, False], ids=["its folder", "the folder around it"])
def test_a_run_from_a_resized_adapter_keeps_its_tokens_at_every_step(
    inner: bool, grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = shutil.copytree(grown, tmp_path / "given" / "default")
    flags = [*texts(tmp_path / "d.jsonl"), "--resize-embeddings", "--adapter",
             str(given if inner else given.parent)]  # fmt: skip

    # What a run would learn and take is said of the adapter's tokens: one for <call>, not six
    assert cli.main(["data", "preview", *flags]) == 0
    shown = capsys.readouterr().out
    assert "line 2: 10 tokens, 4 learned" in shown
    assert cli.main(["plan", *flags, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli.main(["train", *flags, "--run-dir", str(whole)]) == 0
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().split("\n") if line]
    steps = [row["tokens"] for row in rows if row["kind"] == "step"]
    assert planned["tokens"] == pytest.approx(sum(steps) / len(steps))

    cut_at(3, ["train", *flags, "--run-dir", str(run)], monkeypatch)
    assert not (run / "adapter").exists()
    halfway = reopen(run)
    assert halfway.tokenizer("<call>", add_special_tokens=False)["input_ids"] == [259]
    assert rows_of(halfway.model) == 261
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert result(run) == result(whole)
    cut_at(3, ["train", *flags, "--run-dir", str(tmp_path / "cut")], monkeypatch)
    shutil.rmtree(given.parent)
    assert reopen(run).tokenizer.convert_tokens_to_ids("<call>") == 259  # complete: its own
    with pytest.raises(RunError, match=r"started from, .*given.* does not exist any more"):
        reopen(tmp_path / "cut")


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
    given = ["train", "--base", "demo-lm-tiny", "--data", str(data), *flags]
    assert cli.main([*given, "--run-dir", str(tmp_path / "run")]) == 2
    assert match in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
