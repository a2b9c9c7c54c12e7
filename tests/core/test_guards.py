"""What would be wrong without a word is refused: a save that does not load, a layer not called."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers as hf
from conftest import distilbert, llama, tokens
from test_ties import with_peft
from torch import nn

import lora
from lora.kernels import off
from lora.targets import UNCALLED
from lora.testing import perturb

LORA = lora.LoRAConfig(r=2, target_modules=("q_proj",))
REFUSED = r"save_pretrained: .*lora\.save\(model, folder\).*lora\.merge\(model\) and lora\.eject"


def adapted(**settings: Any) -> Any:
    lora.inject(model := llama(), lora.LoRAConfig(r=2, **settings))
    perturb(model.eval())
    return model


@pytest.mark.parametrize("method", ["lora", "dora", "hira"])
def test_an_offloaded_layer_is_refused(method: str) -> None:
    """accelerate brings back the weights of modules that are called; adapters are not."""

    def made() -> Any:
        return nn.Sequential(nn.Linear(8, 8))

    config, x = lora.METHODS[method].Config(target_modules=("0",)), torch.randn(4, 8)
    lora.inject(model := made(), config)
    perturb(model)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for context in (nullcontext(), torch.no_grad(), off()):
        with (
            context,
            pytest.raises(lora.errors.ModelError, match="accelerate has offloaded the layer"),
        ):
            offloaded(x)
    offloaded = accelerate.cpu_offload(made(), execution_device=torch.device("cpu"))
    with pytest.raises(lora.TargetError, match="0 is offloaded by accelerate"):
        lora.inject(offloaded, config)


def test_a_merged_model_has_no_state_dict() -> None:
    """It would hold W' beside the adapter, and both would act in a model that loads it."""
    model, other = adapted(target_modules=("q_proj",)), adapted(target_modules=("q_proj",))
    state = other.state_dict()
    lora.merge(model)
    with pytest.raises(lora.MergeError, match="a merged model has no state dict"):
        model.state_dict()
    with pytest.raises(lora.MergeError, match="a merged model has no state dict"):
        model.load_state_dict(state)
    lora.restore(model)
    model.load_state_dict(state)
    assert model(tokens()).logits.equal(other(tokens()).logits)


@pytest.mark.parametrize("method", ["lora", "dora", "hira", "vera", "ia3"])
def test_a_hook_on_an_embedding_sees_its_output_alone(method: str) -> None:
    """Not what the factors look up."""
    model, ids = nn.Sequential(nn.Embedding(10, 8)), torch.tensor([1, 2, 3])
    model[0].register_forward_hook(lambda module, _, y: y + 1)
    more = {"feedforward_modules": ()} if method == "ia3" else {}
    lora.inject(model, lora.METHODS[method].Config(target_modules=("0",), **more))
    assert model(ids).equal(model[0].base_layer(ids))
    perturb(model)
    shapes: list[Any] = []
    model[0].base_layer.register_forward_hook(lambda _, __, y: shapes.append(y.shape))
    model(ids)
    assert shapes == [(3, 8)]


def test_a_sparse_embedding_is_refused() -> None:
    with pytest.raises(lora.TargetError, match="Embedding"):
        lora.inject(
            nn.Sequential(nn.Embedding(10, 8, sparse=True)), lora.LoRAConfig(target_modules=("0",))
        )


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


class Reads(nn.Module):
    """Two blocks of a layer that is called, and one whose weight is read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"one": nn.Linear(8, 8), "two": nn.Linear(8, 8)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            assert block["one"].weight.dtype == x.dtype  # which is no way past it
            x = block["one"](x) @ block["two"].weight
        return x


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_a_layer_whose_weight_is_read_and_not_called_is_named(mode: bool) -> None:
    """In any loop, at the first forward: nothing but the model itself is called."""
    model, x = Reads(), torch.ones(1, 8)
    lora.inject(model, lora.LoRAConfig(r=2))
    model.train(mode)
    for _ in range(2):  # and again
        with pytest.raises(lora.TargetError, match=r"^2 of 4 .*blocks\.0\.two.*--exclude-modules"):
            model(x)
    lora.eject(model)
    assert model(x).shape == (1, 8)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    lora.inject(model, lora.LoRAConfig(r=2, exclude_modules=("two",)))
    model(x).sum().backward()
    lora.training.check_alive(model)


def test_what_acts_no_more_is_not_missed() -> None:
    model, x = Reads(), torch.ones(1, 8)
    lora.inject(model, lora.LoRAConfig(r=2))
    with lora.disabled(model):
        model(x)
    lora.merge(model)
    model(x)
    lora.restore(model)
    with pytest.raises(lora.TargetError, match="reads their weights itself"):
        model(x)


class Experts(nn.Module):
    """Experts of which a step reaches some, and blocks of which it may leave out one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.ModuleDict({
                "experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(3)),
                "mix": nn.Linear(4, 4),
            })
            for _ in range(2)
        )  # fmt: skip
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, chosen: int, blocks: int = 2, end: bool = True) -> Any:
        for block in self.layers[:blocks]:
            x = block["mix"](block["experts"][chosen]["up"](x))
        y = self.last(x)
        return y if end else x


@pytest.mark.parametrize("blocks", [1, 2])
def test_an_expert_without_a_token_and_a_block_left_out_are_no_error(blocks: int) -> None:
    model, x = Experts(), torch.ones(1, 4)
    lora.inject(model, lora.LoRAConfig(r=2))
    model.eval()(x, 0)  # as an evaluation before the training
    for chosen in (1, 2):  # and in a later step
        model.train()(x, chosen, blocks).sum().backward()
        lora.training.check_alive(model)
        model.zero_grad()
    model(x, 1, blocks, end=False).sum().backward()  # called, and its output not used
    with pytest.raises(lora.TargetError, match="1 of 9 .*no gradient, last among them"):
        lora.training.check_alive(model)


SMALL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENDS = SMALL | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
STATES: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
    "mamba_expand": 2, "mamba_chunk_size": 8,
}  # fmt: skip
# model_type: (settings, layers that are not adapted)
MIXERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "mamba": (SMALL | {"state_size": 8}, {"dt_proj", "out_proj"}),
    "falcon_mamba": (SMALL | {"state_size": 8}, {"dt_proj", "out_proj"}),
    "mamba2": (
        SMALL | {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        {"out_proj"}),
    "jamba": (
        ATTENDS | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8,
                   "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2},
        {"dt_proj"}),
    "bamba": (ATTENDS | STATES | {"attn_layer_indices": [1]}, {"out_proj"}),
    "falcon_h1": (ATTENDS | STATES | {"mamba_d_ssm": 64}, {"out_proj"}),
    "granitemoehybrid": (
        ATTENDS | STATES | {"layer_types": ["mamba", "attention"], "num_local_experts": 2,
                            "num_experts_per_tok": 1, "shared_intermediate_size": 48},
        {"out_proj"}),
    "rwkv": (SMALL | {"attention_hidden_size": 32, "context_length": 64}, set()),
}  # fmt: skip


def state_space(name: str) -> Any:
    torch.manual_seed(0)
    config = hf.CONFIG_MAPPING[name](**MIXERS[name][0])
    return hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", MIXERS)
def test_layers_whose_weights_a_model_reads_itself_are_left_alone(name: str) -> None:
    left = MIXERS[name][1]
    model = state_space(name)
    report = lora.inject(model, lora.LoRAConfig(r=2))
    assert left.isdisjoint(path.rpartition(".")[2] for path in report.plan.targets)
    assert not left or f"{', '.join(sorted(left))} not adapted" in str(report)
    output = model.train()(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    lora.training.check_alive(model)
    for end in left:
        before = lora.testing.snapshot(plain := state_space(name))
        config = lora.LoRAConfig(r=2, target_modules=("in_proj", end))
        with pytest.raises(lora.TargetError, match=f"{end}, whose weight .*reads itself"):
            lora.inject(plain, config)
        assert lora.testing.unchanged(before, plain)


def test_every_model_of_transformers_that_reads_such_a_weight_is_known() -> None:
    read = re.compile(
        r"self\.dt_proj\.weight @|outproj_weight=self\.out_proj\.weight|self\.out_proj\.weight,\n"
    )
    folder = Path(hf.__file__).parent / "models"
    found = {
        path.parent.name: {name for hit in hits for name in ("dt_proj", "out_proj") if name in hit}
        for path in sorted(folder.glob("*/modeling_*.py"))
        if (hits := read.findall(path.read_text("utf-8")))
    }
    assert {"mamba", "mamba2", "jamba", "wavlm"} <= set(found)
    for kind, names in found.items():
        assert names <= {end.rpartition(".")[2] for end in UNCALLED[kind]}, kind


@pytest.mark.parametrize("size", [0.0, 0.3])
def test_a_file_of_pefts_with_such_a_layer_acts_as_there_or_says_so(
    size: float, tmp_path: Path
) -> None:
    theirs = with_peft(
        state_space("jamba"), peft.LoraConfig(r=2, target_modules=["in_proj", "dt_proj"])
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=size if "dt_proj" in name else 0.3)
    theirs.save_pretrained(tmp_path)
    lora.load(model := state_space("jamba"), tmp_path)
    if size:  # it says more than the model there does
        with pytest.raises(lora.TargetError, match="dt_proj among them"):
            model(tokens())
        return
    torch.testing.assert_close(model(tokens()).logits, theirs.eval()(tokens()).logits)
