"""Regular expressions of files and flags: Python's meaning, within bounds of time and memory."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora
from lora.patterns import BLOCKS, ENDING, FULL_MATCH, SECONDS, compiled


def model() -> nn.Sequential:
    return nn.Sequential(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "visual": nn.Linear(4, 4)}))


ATOMS = st.sampled_from(
    ["a", "b", ".", r"\.", r"\d", "[a-b]", "[^a]", r"\b", "^", "$", r"\w", "A", "", "0"]
)
GROUPS = st.sampled_from(
    ["({})", "(?:{})", "(?={})", "(?!{})", "(?i:{})", "(?>{})", "{}|b", "({})|.a"]
)
REPEATS = st.sampled_from(["*", "+", "?", "{1,2}", "{2}", "*?", "+?", "??", "*+", "++"])


def deeper(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    grouped = st.builds(str.format, GROUPS, inner)
    repeated = st.builds("(?:{}){}".format, inner, REPEATS)
    return grouped | repeated | st.builds(str.__add__, inner, inner)


EXPRESSIONS = st.recursive(ATOMS, deeper, max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(EXPRESSIONS, st.text("abA.0", max_size=8))
def test_an_expression_means_what_pythons_re_makes_of_it(text: str, name: str) -> None:
    for frame in (FULL_MATCH, ENDING, BLOCKS):
        try:
            theirs = re.compile(frame.replace("{}", text))
        except re.error:
            with pytest.raises(lora.ConfigError):
                compiled(text, frame)
            continue
        ours = compiled(text, frame)
        assert bool(ours.match(name)) == bool(theirs.match(name))
        assert bool(ours.fullmatch(name)) == bool(theirs.fullmatch(name))


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (r"^(?!.*visual).*(q_proj|k_proj)$", {"0.q_proj"}),
        (r"(?i).*\.Q_PROJ", {"0.q_proj"}),
        (r".*\.(?:q_proj|[v]isual)", {"0.q_proj", "0.visual"}),
        (r"(?:.*?(?:self_attn|0).*?(?:q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)", {"0.q_proj"}),
    ],
)
def test_what_pefts_users_write(pattern: str, matched: set[str]) -> None:
    built = model()
    lora.inject(built, lora.LoRAConfig(r=2, target_modules=pattern))
    assert set(built.lora_adapters["default"].targets) == matched  # type: ignore[operator,arg-type]


def named(length: int) -> nn.Module:
    return nn.ModuleDict({"a" * length + str(i): nn.Linear(4, 4) for i in range(40)})


EXPONENTIAL = "(a|aa)+[b-d]"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": EXPONENTIAL},
        {"target_modules": "all-linear", "exclude_modules": EXPONENTIAL},
        {"target_modules": ".*", "rank_pattern": {EXPONENTIAL: 2}},
        {"target_modules": ".*", "alpha_pattern": {EXPONENTIAL: 2}},
    ],
)
def test_an_exponential_pattern_of_a_file_is_refused_in_bounded_time(
    settings: dict[str, object], tmp_path: Path
) -> None:
    compiled.cache_clear()
    built = named(60)
    lora.inject(built, lora.LoRAConfig(r=2, target_modules=".*"))
    lora.save(built, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fresh = named(60)
    before = time.process_time()
    with pytest.raises(lora.LoraError, match="takes more than 2 seconds on the names"):
        lora.load(fresh, _without_mark(tmp_path))
    assert time.process_time() - before < 20 * SECONDS  # Python's re takes 2**40 steps
    assert not any("lora" in name for name, _ in fresh.named_parameters())


def _without_mark(folder: Path) -> Path:
    """The adapter as PEFT would have written it: not held to the settings of its digest."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("text", "frame", "match"),
    [
        ("(?:a{65000}){65000}", FULL_MATCH, "counts multiply to 4,225,000,000"),
        ("(?:(?:a{1000}b){1000}c){10}", FULL_MATCH, "counts multiply"),
        ("a{99999999999}", FULL_MATCH, "begins no count"),
        ("(?:a){e<2}", FULL_MATCH, "begins no count"),
        ("x" * 300_000, FULL_MATCH, "300,000 characters"),
        ("[[:alpha:]]", FULL_MATCH, "set"),
        (r"\p{L}", FULL_MATCH, "begins no count|bad escape"),
        ("(?R)", FULL_MATCH, "unknown extension"),
        ("(?<=a+)b", FULL_MATCH, "fixed-width"),
        ("(?i)q_lin", ENDING, r"global flags .*Write \(\?i:\.\.\.\)"),
        ("(?i)layers", BLOCKS, r"global flags .*Write \(\?i:\.\.\.\)"),
        (r"(?P<a>q)\2(?P<a>", ENDING, "not a regular expression"),
    ],
)
def test_what_regex_reads_otherwise_or_unfolds_is_refused(
    text: str, frame: str, match: str
) -> None:
    with pytest.raises(lora.ConfigError, match=match):
        compiled(text, frame)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"(?i)q_lin": 2}},
        {"alpha_pattern": {"(?i)q_lin": 2.0}},
        {"layers_to_transform": (0,), "layers_pattern": ("(?i)layer",)},
    ],
)
def test_flags_inside_a_frame_are_refused_by_name_as_peft_fails_on_them(
    settings: dict[str, object],
) -> None:
    import peft

    field = next(name for name in settings if name.endswith("pattern"))
    with pytest.raises(lora.ConfigError, match=rf"{field} is refused: .*Write \(\?i:"):
        lora.LoRAConfig(target_modules=("q_lin",), **settings)  # type: ignore[arg-type]
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    built = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"q_lin": nn.Linear(4, 4)})])})
    with pytest.raises(re.error):
        peft.get_peft_model(built, peft.LoraConfig(target_modules=["q_lin"], **theirs))


def test_a_flag_in_a_group_of_its_own_picks_the_rank_as_in_peft() -> None:
    import peft

    def built() -> nn.Module:
        return nn.ModuleDict({"Q_lin": nn.Linear(4, 4), "v_lin": nn.Linear(4, 4)})

    settings = {"target_modules": ["Q_lin", "v_lin"], "rank_pattern": {"(?i:q_lin)": 2}, "r": 3}
    ours, theirs = built(), built()
    lora.inject(ours, lora.LoRAConfig(**settings))  # type: ignore[arg-type]
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(**settings))  # type: ignore[arg-type]
    ranks = {
        name: len(adapted.base_model.model[name].lora_A["default"].weight)
        for name in ("Q_lin", "v_lin")
    }
    assert ranks == {"Q_lin": 2, "v_lin": 3}
    assert {name: ours[name].adapters["default"].r for name in ranks} == ranks  # type: ignore


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save"])
def test_a_list_without_end_is_refused(field: str) -> None:
    with pytest.raises(lora.ConfigError, match=f"{field} has 50,001 entries"):
        lora.LoRAConfig(**{field: tuple(map(str, range(50_001)))})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"r": 10**400}),
        ("lora", {"rank_pattern": {"q": 2**31}}),
        ("dora", {"r": 10**5000}),
        ("hira", {"r": 2**31}),
        ("vera", {"r": 10**400}),
        ("adalora", {"init_r": 10**400}),
        ("topk", {"k": 10**400}),
    ],
)
def test_a_number_beyond_all_sizes_is_refused(method: str, settings: dict[str, object]) -> None:
    with pytest.raises(lora.ConfigError, match="at most 2,147,483,647, found"):
        lora.METHODS[method].Config(**settings)


def test_a_large_rank_of_a_file_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    """A file of 3 KB that states r = 30 million: its start would take gigabytes."""
    built = nn.Sequential(nn.Linear(8, 8))
    lora.inject(built, lora.LoRAConfig(r=2, target_modules=("0",)))
    lora.save(built, tmp_path)
    _without_mark(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 30_000_000}))
    made: list[int] = []
    whole = torch.empty

    def counted(*shape: object, **more: object) -> torch.Tensor:
        tensor = whole(*shape, **more)  # type: ignore[call-overload]
        made.append(tensor.numel())
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        with pytest.raises(lora.CheckpointError, match="480,000,000 numbers.*holds 32"):
            lora.load(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    assert max(made, default=0) < 10_000_000
