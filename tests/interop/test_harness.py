"""The LM Evaluation Harness on a task of our own, against the same numbers computed here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from architectures import build
from tokenizers import decoders, models, pre_tokenizers

import lora
from lora.testing import perturb

pytest.importorskip("lm_eval")

from lora.interop.harness import run_tasks

ROWS = [
    {"q": "1 + 1 =", "a": "two", "options": ["two", "three"], "gold": 0},
    {"q": "2 + 2 =", "a": "four", "options": ["five", "four"], "gold": 1},
    {"q": "3 + 1 =", "a": "four", "options": ["four", "seven"], "gold": 0},
    {"q": "9 - 2 =", "a": "seven", "options": ["four", "seven"], "gold": 1},
]
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
doc_to_text: "{{q}}"
"""
GUESS = "task: guess\noutput_type: loglikelihood\ndoc_to_target: ' {{a}}'\n" + COMMON + (
    "metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]\n"
)  # fmt: skip
CHOICE = "task: choice\noutput_type: multiple_choice\ndoc_to_choice: options\n" + COMMON + (
    "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
)  # fmt: skip
WRITE = "task: write\noutput_type: generate_until\ndoc_to_target: '{{a}}'\n" + COMMON + (
    "generation_kwargs: {until: ['\\n'], max_gen_toks: 3, do_sample: false}\n"
    "filter_list: [{name: first, filter: [{function: take_first}]}]\n"
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per byte."""
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = tokenizers.Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def task(tmp_path: Path) -> Any:
    def write(text: str, rows: list[dict[str, Any]] = ROWS) -> str:
        data = tmp_path / "data.json"
        data.write_text("\n".join(map(json.dumps, rows)))
        text = text.replace("DATA", str(data)).replace("CACHE", str(tmp_path / "cache"))
        path = tmp_path / f"{text.split()[1]}.yaml"
        path.write_text(text)
        return str(path)

    return write


def likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """log p(" " + answer | question)"""
    asked, whole = (tokenizer(text).input_ids for text in (question, f"{question} {answer}"))
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logs[i - 1, whole[i]]) for i in range(len(asked), len(whole)))


def test_scores_are_those_of_the_model_as_it_stands(tokenizer: Any, task: Any) -> None:
    model = build("llama")
    lora.inject(model, lora.LoRAConfig(r=2, lora_alpha=8))
    perturb(model)
    tasks = [task(GUESS), task(CHOICE)]

    def wanted() -> tuple[float, float]:
        logs = [likelihood(model, tokenizer, row["q"], row["a"]) for row in ROWS]
        right = [
            row["options"][row["gold"]]
            == max(row["options"], key=lambda one: likelihood(model, tokenizer, row["q"], one))
            for row in ROWS
        ]
        return math.exp(-sum(logs) / len(logs)), sum(right) / len(right)

    model.train()
    before = torch.get_rng_state()
    on = run_tasks(model, tokenizer, tasks, batch_size=3)
    assert model.training
    assert torch.get_rng_state().equal(before)
    model.eval()
    perplexity, right = wanted()
    assert on == {"guess": {"perplexity": pytest.approx(perplexity, rel=1e-4)},
                  "choice": {"acc": right}}  # fmt: skip
    with lora.disabled(model):
        off = run_tasks(model, tokenizer, tasks[:1])
        assert off["guess"]["perplexity"] == pytest.approx(wanted()[0], rel=1e-4)
    assert off["guess"]["perplexity"] != pytest.approx(perplexity, rel=1e-2)


def test_the_first_examples_generated_behind_a_filter(tokenizer: Any, task: Any) -> None:
    model = build("gpt2")
    rows = []
    for row in ROWS:
        asked = tokenizer(row["q"], return_tensors="pt").input_ids
        given = model.generate(asked, max_new_tokens=3, do_sample=False)[0, asked.shape[1] :]
        rows.append(row | {"a": tokenizer.decode(given, skip_special_tokens=True)})
    rows[1]["a"] += "!"
    path = task(WRITE, rows)
    for limit, score in ((None, 0.75), (2, 0.5), (1, 1.0)):
        found = run_tasks(model, tokenizer, [path], limit=limit)
        assert found == {"write": {"exact_match (first)": score}}


def test_a_chat_template_is_the_librarys_unless_it_goes_past_a_limit(
    tokenizer: Any, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("gpt2")
    asked = tokenizer("<q>1 + 1 =</q>", return_tensors="pt").input_ids
    given = model.generate(asked, max_new_tokens=3, do_sample=False)[0, asked.shape[1] :]
    answer = tokenizer.decode(given, skip_special_tokens=True)
    path = task(WRITE, [ROWS[0] | {"a": answer}])
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}<q>{{ m.content }}</q>{% endfor %}"
    )
    found = run_tasks(model, tokenizer, [path], chat=True)
    assert found == {"write": {"exact_match (first)": 1.0}}
    monkeypatch.setattr(tokenizer, "chat_template", "{{ 'x' * 10 ** 8 }}")
    with pytest.raises(lora.errors.DataError, match="the base's chat template cannot be used: it"):
        run_tasks(model, tokenizer, [path], chat=True)


def test_a_task_that_is_not_to_be_had(tokenizer: Any, task: Any, tmp_path: Path) -> None:
    path = Path(task(GUESS))
    (tmp_path / "data.json").unlink()
    with pytest.raises(lora.errors.DataError, match=f"tasks {path}: .*lm_eval ls tasks"):
        run_tasks(build("llama"), tokenizer, [str(path)])


@pytest.mark.slow
def test_a_name_that_is_none(tokenizer: Any) -> None:
    with pytest.raises(lora.errors.DataError, match=r"tasks no_such_task: .*'no_such_task' is not"):
        run_tasks(build("llama"), tokenizer, ["no_such_task"])
