"""What an adapter's folder says of itself, held against PEFT's own AutoPeftModel classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import batch, build

import lora
import lora.finetune.models
from lora.card import heads_of, stated
from lora.finetune.models import load_base

# Raised by transformers at what peft reads.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

CASES: dict[str, tuple[str, tuple[str, ...], type[Any]]] = {
    "llama": ("CAUSAL_LM", ("q_proj", "down_proj"), peft.AutoPeftModelForCausalLM),
    "gpt2": ("CAUSAL_LM", ("c_attn",), peft.AutoPeftModelForCausalLM),
    "t5": ("SEQ_2_SEQ_LM", ("q", "wo"), peft.AutoPeftModelForSeq2SeqLM),
    "bart": ("SEQ_2_SEQ_LM", ("q_proj",), peft.AutoPeftModelForSeq2SeqLM),
    "distilbert": ("SEQ_CLS", ("q_lin",), peft.AutoPeftModelForSequenceClassification),
    "bert": ("SEQ_CLS", ("query",), peft.AutoPeftModelForSequenceClassification),
    "roberta": ("SEQ_CLS", ("query",), peft.AutoPeftModelForSequenceClassification),
}


def adapted(folder: Path, name: str, labels: int, saved: tuple[str, ...] | None = None) -> Any:
    """A base in folder/base, and on it an adapter in folder/adapter, with weights that show."""
    plain = build(name)
    plain.save_pretrained(folder / "base")
    more = {"num_labels": labels} if labels else {}
    model = type(plain).from_pretrained(folder / "base", ignore_mismatched_sizes=True, **more)
    saved = heads_of(model) if saved is None else saved
    lora.inject(
        model, lora.LoRAConfig(r=2, target_modules=CASES[name][1], modules_to_save=saved), seed=0
    )
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def logits(model: Any, name: str) -> torch.Tensor:
    given = batch(name)
    labels = given.pop("labels")
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = labels
    with torch.no_grad():
        found: torch.Tensor = model(**given).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_peft_finds_the_base_and_the_class_by_itself(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base was given by a relative path; PEFT reads from another working directory."""
    monkeypatch.chdir(tmp_path)
    labels = 3 if CASES[name][0] == "SEQ_CLS" else 0
    model = adapted(Path(), name, labels)
    lora.save(model, "adapter")
    settings = json.loads(Path("adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    assert settings["task_type"] == CASES[name][0]
    assert settings["auto_mapping"] is None
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = {"num_labels": labels, "ignore_mismatched_sizes": True} if labels else {}
    theirs = CASES[name][2].from_pretrained(str(tmp_path / "adapter"), **more)
    assert torch.equal(logits(theirs.eval(), name), logits(model, name))


@pytest.mark.parametrize("name", ["distilbert", "roberta"])
def test_a_head_that_is_not_saved_is_loaded_by_autopeftmodel(name: str, tmp_path: Path) -> None:
    """Under SEQ_CLS PEFT asks the file for the head, and a KeyError is all it says of a missing
    one: the file states the class instead, as PEFT itself does without a task_type."""
    model = adapted(tmp_path, name, 0, saved=())
    lora.save(model, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["task_type"] is None
    assert settings["auto_mapping"] == {
        "base_model_class": type(model).__name__,
        "parent_library": type(model).__module__,
    }
    theirs = peft.AutoPeftModel.from_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(logits(theirs.eval(), name), logits(model, name))
    code = (tmp_path / "adapter/README.md").read_text()
    assert 'peft.AutoPeftModel.from_pretrained("this folder", num_labels=2, pad_token_id=' in code
    assert "ignore_mismatched_sizes" not in code


def test_the_code_in_the_readme_loads_the_adapter(tmp_path: Path) -> None:
    model = adapted(tmp_path, "bert", 3)
    model.config.pad_token_id = 7
    lora.save(model, tmp_path / "adapter")
    text = (tmp_path / "adapter/README.md").read_text()
    (code,) = (line.strip() for line in text.splitlines() if "AutoPeftModel" in line)
    assert code == (
        'peft.AutoPeftModelForSequenceClassification.from_pretrained("this folder", num_labels=3,'
        " pad_token_id=7, ignore_mismatched_sizes=True)"
    )
    theirs = eval(code.replace("this folder", str(tmp_path / "adapter")))
    assert theirs.config.pad_token_id == 7
    assert torch.equal(logits(theirs.eval(), "bert"), logits(model, "bert"))


@pytest.mark.parametrize(("base", "task"), [("demo", "classification"), ("demo-lm-tiny", "text")])
def test_a_built_in_base_is_said_to_be_one(base: str, task: str, tmp_path: Path) -> None:
    model = load_base(base, 2, task, 0).model
    lora.inject(model, lora.LoRAConfig(r=2, target_modules="attention"))
    lora.save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"lora-from-scratch:{base}"
    text = (tmp_path / "README.md").read_text()
    assert "AutoPeftModel" not in text
    (code,) = (line.strip() for line in text.splitlines() if "load_base" in line)
    again = eval(code)
    lora.load(again, tmp_path)  # the fingerprint is that of its base
    kind = peft.AutoPeftModel if task == "classification" else peft.AutoPeftModelForCausalLM
    with pytest.raises(OSError, match=f"lora-from-scratch:{base}"):  # never another's on the hub
        kind.from_pretrained(str(tmp_path))


def test_a_method_that_peft_lacks_claims_no_peft(tmp_path: Path) -> None:
    model = build("bert")
    lora.inject(model, lora.BitFitConfig())
    lora.save(model, tmp_path)
    assert "peft." not in (tmp_path / "README.md").read_text()


def test_a_model_of_no_task_and_one_that_is_no_transformer() -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    found = stated(transformers.BertModel(config), ())
    assert found["task_type"] is None
    assert found["auto_mapping"]["base_model_class"] == "BertModel"
    bare = stated(torch.nn.Sequential(torch.nn.Linear(2, 2)), ())
    assert set(bare.values()) == {None}


def test_an_adapter_of_a_speech_model_works_in_peft(tmp_path: Path) -> None:
    """PEFT's class for SEQ_2_SEQ_LM passes input_ids, which Whisper does not have."""

    def whisper() -> Any:
        torch.manual_seed(0)
        return transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(
                vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1,
                encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
                decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=16,
                max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                decoder_start_token_id=1,
            )
        ).eval()  # fmt: skip

    lora.inject(model := whisper(), lora.LoRAConfig(r=2, target_modules=("q_proj",)))
    lora.testing.perturb(model)
    lora.save(model, tmp_path)
    given = {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": torch.tensor([[1, 5]])}
    with torch.no_grad():
        other = peft.PeftModel.from_pretrained(whisper(), tmp_path)(**given).logits
        torch.testing.assert_close(other, model(**given).logits)
