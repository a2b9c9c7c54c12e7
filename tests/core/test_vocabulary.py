"""Adapters of a base with another number of tokens: PEFT's files, resized here as there."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import llama, tokens
from test_foreign import off
from test_peft import fill
from torch import Tensor, nn

import lora

FORMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved in part": {"modules_to_save": ["embed_tokens"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "rows": {"trainable_token_indices": [92, 94]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [92, 94], "lm_head": [92, 94]}},
    "rows alone": {"token_indices": [92, 94]},
}


def base_of(folder: Path, tied: bool = False, rows: int | None = None) -> Any:
    """The same small LLaMA again and again, from a folder, resized as PEFT's users do."""
    if not folder.exists():
        llama(tie_word_embeddings=tied).save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def written(folder: Path, base: nn.Module, whole: bool | str = "auto", **settings: Any) -> Any:
    if "token_indices" in settings:
        config: Any = peft.TrainableTokensConfig(**settings)
    else:
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})
    theirs = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        fill({n: p for n, p in theirs.named_parameters() if p.requires_grad})
    theirs.save_pretrained(folder, save_embedding_layers=whole)
    return theirs


def ids_below(rows: int) -> Tensor:
    return torch.randint(1, rows, (3, 11), generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore")  # peft warns of each of these files as it writes it
@pytest.mark.parametrize(
    ("form", "rows", "tied"),
    [
        pytest.param(form, rows, tied, id=f"{form} {rows} {'tied' if tied else 'untied'}")
        for form in FORMS for rows in (102, 95) for tied in (False, True)
        # PEFT files no new row of the head beside rows alone: the test after the next
        if (form, rows, tied) != ("rows alone", 102, False)
    ],
)  # fmt: skip
def test_pefts_files_of_resized_embeddings(
    form: str, rows: int, tied: bool, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", tied)
    theirs = written(tmp_path / "a", base_of(tmp_path / "base", rows=rows), **FORMS[form])
    ids, before = ids_below(rows), state(base)
    wanted = f"made on a base with {rows} tokens, found one with 99.*--resize-embeddings"
    with pytest.raises(lora.CheckpointError, match=wanted):
        lora.load(base, tmp_path / "a")
    drawn = torch.get_rng_state()
    report = lora.load(base, tmp_path / "a", resize_embeddings=True, trainable=True)
    assert torch.equal(drawn, torch.get_rng_state())
    assert f"the embeddings were resized from 99 to {rows} rows" in str(report)
    assert base.config.vocab_size == rows
    assert off(base, theirs, ids) < 1e-5

    # Written again by us it says the same, to us and to PEFT
    lora.save(base, tmp_path / "b")
    again = base_of(tmp_path / "base")
    lora.load(again, tmp_path / "b", resize_embeddings=True)
    assert off(again, theirs, ids) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing key, an unknown setting
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", category=FutureWarning)
        resized = base_of(tmp_path / "base", rows=rows)
        judge = peft.PeftModel.from_pretrained(resized, tmp_path / "b").eval()
    assert off(judge, theirs, ids) < 1e-5
    # and to us on a base that its user resized, whatever the new rows are
    user = base_of(tmp_path / "base", rows=rows)
    lora.load(user, tmp_path / "b")
    assert off(user, theirs, ids) < 1e-5

    lora.merge(again, untie=True)
    lora.eject(again)
    again.save_pretrained(tmp_path / "merged")
    assert off(base_of(tmp_path / "merged"), theirs, ids) < 1e-5

    lora.eject(base)
    now, least = base.state_dict(), min(rows, 99)
    assert all(torch.equal(now[key][:least], tensor[:least]) for key, tensor in before.items())


@pytest.mark.filterwarnings("ignore")
def test_a_load_that_fails_gives_the_embeddings_back(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=True)
    written(tmp_path / "a", base_of(tmp_path / "base", rows=102))
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[key] = torch.full_like(tensors[key], torch.nan)
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    before, modules = state(base), dict(base.named_modules())
    parameters, places = dict(base.named_parameters()), vars(base.model.embed_tokens).copy()
    with pytest.raises(lora.CheckpointError, match="not finite"):
        lora.load(base, tmp_path / "a", resize_embeddings=True)
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert dict(base.named_modules()) == modules
    assert {name: id(p) for name, p in base.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert vars(base.model.embed_tokens).keys() == places.keys()
    assert base.model.embed_tokens.num_embeddings == 99
    assert base.config.vocab_size == 99
    assert base.lm_head.weight is base.model.embed_tokens.weight
    lora.inject(base, lora.LoRAConfig(r=2))  # and takes an adapter as before


@pytest.mark.filterwarnings("ignore")
def test_rows_that_nobody_filed_are_refused(tmp_path: Path) -> None:
    """PEFT reads the file to random logits: the head's new rows are nowhere."""
    written(
        tmp_path / "a", base_of(tmp_path / "base", rows=102), whole=False,
        trainable_token_indices=[99, 100, 101],
    )  # fmt: skip
    base = base_of(tmp_path / "base")
    with pytest.raises(lora.CheckpointError, match=r"lm_head.weight is not in the file.*layers=Tr"):
        lora.load(base, tmp_path / "a", resize_embeddings=True)
    assert base.lm_head.weight.shape == (99, 32)
    written(tmp_path / "c", base_of(tmp_path / "base", rows=102), token_indices=[99, 100, 101])
    with pytest.raises(lora.CheckpointError, match=r"lm_head.weight is not in the file"):
        lora.load(base, tmp_path / "c", resize_embeddings=True)
    # of a tied model they are
    base = base_of(tmp_path / "tied", tied=True)
    theirs = written(
        tmp_path / "b", base_of(tmp_path / "tied", rows=102), whole=False,
        trainable_token_indices=[99, 100, 101],
    )  # fmt: skip
    lora.load(base, tmp_path / "b", resize_embeddings=True)
    assert off(base, theirs, ids_below(102)) < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_embeddings_saved_without_a_change_of_size(tmp_path: Path) -> None:
    """save_embedding_layers=True: what is the base's own is dropped, what is not replaces it."""
    base = base_of(tmp_path / "base")
    theirs = written(tmp_path / "a", copy.deepcopy(base), whole=True)
    report = lora.load(base, tmp_path / "a")
    assert not report.plan.carried
    assert off(base, theirs) < 1e-5
    other = base_of(tmp_path / "base")
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(1.5)
    theirs = written(tmp_path / "b", other, whole=True)
    base = base_of(tmp_path / "base")
    report = lora.load(base, tmp_path / "b")
    assert report.plan.carried == ("model.embed_tokens.weight",)
    assert "model.embed_tokens.weight is the file's, not the base's" in str(report)
    assert off(base, theirs) < 1e-5
    with lora.disabled(base):
        assert off(base, base_of(tmp_path / "base")) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_tied_weight_that_a_file_gives_twice_is_one(tmp_path: Path) -> None:
    written(tmp_path / "a", base_of(tmp_path / "base", tied=True, rows=102))
    path = tmp_path / "a/adapter_model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    base = base_of(tmp_path / "base")
    with pytest.raises(lora.CheckpointError, match="differ, and are one parameter of the model"):
        lora.load(base, tmp_path / "a", resize_embeddings=True)
    assert base.config.vocab_size == 99


def test_a_model_that_cannot_be_resized_says_so(tmp_path: Path) -> None:
    base = llama()
    lora.inject(base, lora.LoRAConfig(r=2))
    from lora.vocabulary import resize

    with pytest.raises(lora.ConfigError, match="102 rows: the model has the adapters default"):
        resize(base, 102)
    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    with pytest.raises(lora.ConfigError, match="Sequential has no resize_token_embeddings"):
        resize(plain, 12)


@pytest.mark.filterwarnings("ignore")
def test_our_file_of_a_resized_base_is_held_to_that_base(tmp_path: Path) -> None:
    """The base is known by its own rows, whatever it is resized to; another base is refused."""
    written(tmp_path / "a", base_of(tmp_path / "base", rows=102))
    base = base_of(tmp_path / "base")
    lora.load(base, tmp_path / "a", resize_embeddings=True, trainable=True)
    lora.save(base, tmp_path / "b")
    stranger = base_of(tmp_path / "base")
    with torch.no_grad():
        stranger.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(lora.CheckpointError, match="trained on another base"):
        lora.load(stranger, tmp_path / "b", resize_embeddings=True)
    assert stranger.config.vocab_size == 99
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["r"] == 2
    assert tokens().max() < 99
