"""What would be wrong without a word is refused: a save that does not load, a layer not called."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import distilbert, llama, tokens

import lora
from lora.testing import perturb

LORA = lora.LoRAConfig(r=2, target_modules=("q_proj",))
REFUSED = r"save_pretrained: .*lora\.save\(model, folder\).*lora\.merge\(model\) and lora\.eject"


def adapted(**settings: Any) -> Any:
    lora.inject(model := llama(), lora.LoRAConfig(r=2, **settings))
    perturb(model.eval())
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ("q_proj",)},
        {"target_modules": ("lm_head",)},
        {"target_modules": ("q_proj",), "modules_to_save": ("lm_head",)},
    ],
)
def test_a_model_with_adapters_is_not_saved_as_a_whole(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(**settings)
    wanted = model(tokens()).logits
    parts = [model] if settings["target_modules"] == ("lm_head",) else [model, model.model]
    for part in (*parts, copy.deepcopy(model)):
        with pytest.raises(lora.CheckpointError, match=REFUSED):
            part.save_pretrained(tmp_path)
        with pytest.raises(lora.CheckpointError, match=REFUSED):
            part.push_to_hub("nobody/nothing")
    assert not list(tmp_path.iterdir())
    torch.save(model.state_dict(), tmp_path / "state.pt")  # which loads into a model like it
    other = adapted(**settings)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert other(tokens()).logits.equal(wanted)
    lora.merge(model)
    with pytest.raises(lora.CheckpointError, match=REFUSED):  # it still has its wrappers
        model.save_pretrained(tmp_path)
    lora.eject(model)
    model.save_pretrained(tmp_path / "whole")
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(again(tokens()).logits, wanted)


def test_an_adapter_that_was_loaded_is_no_part_of_a_whole_either(tmp_path: Path) -> None:
    lora.save(adapted(target_modules=("q_proj",)), tmp_path)
    lora.load(model := llama(), tmp_path)
    with pytest.raises(lora.CheckpointError, match=REFUSED):
        model.save_pretrained(tmp_path / "whole")


def test_a_selection_is_saved_as_the_model_that_it_is(tmp_path: Path) -> None:
    """It wraps nothing: the folder holds what was trained, under the model's own names."""
    lora.inject(model := distilbert(), lora.METHODS["topk"].Config(k=1))
    perturb(model.eval())
    model.save_pretrained(tmp_path)
    again = hf.DistilBertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits)
