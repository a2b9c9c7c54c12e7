"""Language models on the corridor: trained, scored, made to write and merged, as a user does it."""

from __future__ import annotations

import copy
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import CAUSAL, SEQUENCES, SHAPE, build
from safetensors.torch import load_file
from tokenizers import AddedToken

from lora.finetune.chat import HELP
from lora.finetune.class_report import scores_of_file
from lora.finetune.cli import main
from lora.finetune.comparison.grid import parse_compare
from lora.finetune.comparison.standing import standing
from lora.finetune.config import parse_run
from lora.finetune.data.corpus import read_predictions
from lora.finetune.demo import language
from lora.finetune.generate import Writing, padded, written
from lora.finetune.metrics import score
from lora.finetune.models import load_base
from lora.finetune.trained import answers, reopen

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


def saved(folder: Path, name: str, template: str | None = None) -> str:
    """A small model with a byte-level tokenizer."""
    torch.manual_seed(0)
    make, config = {**CAUSAL, **SEQUENCES}[name]
    shape = config()
    shape.max_position_embeddings = 512
    make(shape).save_pretrained(folder)
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def pairs(path: Path, count: int = 24, **more: str) -> str:
    rows = [
        {"prompt": f"{i % 6} is", "completion": f" number {i % 6}", **more} for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talks(path: Path, count: int = 24) -> str:
    rows = [
        {"messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": f"{i} and one?"},
            {"role": "assistant", "content": f"{i + 1}"},
            {"role": "user", "content": "And one?"},
            {"role": "assistant", "content": f"{i + 2}"},
        ]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ROUNDING = {"float32": 1e-5, "bfloat16": 4 * torch.finfo(torch.bfloat16).eps}
"""How far the same computed in another order may be off, of the largest."""

FLAGS = ("--r", 2, "--learning-rate", 0.01, "--batch-size", 8, "--max-length", 128,
         "--max-new-tokens", 6)  # fmt: skip


@pytest.fixture(scope="module")
def base(auto_dtype: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("base"), "llama", CHATML)


@pytest.fixture(scope="module")
def run(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On conversations, packed."""
    folder = tmp_path_factory.mktemp("run")
    data = talks(folder / "talks.jsonl", 40)
    flags = ("--base", base, "--data", data, "--packing", *FLAGS, "--epochs", 2, "--baseline")
    assert lora("train", *flags, "--run-dir", folder / "run") == 0
    return folder / "run"


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_baseline_of_a_method_that_changes_the_base_is_refused_before_training(
    verb: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = talks(tmp_path / "talks.jsonl", 40)
    flags = ("--base", base, "--data", data, "--method", "full", "--baseline")
    assert lora(verb, *flags, "--run-dir", tmp_path / "run") == 2
    assert "--baseline scores the base after training, and --method full" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def summary_of(run: Path) -> Any:
    return json.loads((run / "summary.json").read_text())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_long_answers_are_scored_by_rouge_row_by_row(base: str, tmp_path: Path) -> None:
    """The mean of the rows is the score, and the file can be answered again."""
    data = pairs(tmp_path / "pairs.jsonl", 40)
    path = Path(data)
    path.write_text(path.read_text().replace(" number", " one of these six numbers, and it is"))
    flags = ("--base", base, "--data", data, *FLAGS, "--epochs", 1)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    scores = summary_of(tmp_path / "run")["metrics"]
    assert next(iter(scores)) == "rougeL"
    rows = lines(tmp_path / "run" / "predictions.jsonl")
    mean = sum(row["rougeL"] for row in rows) / len(rows)
    assert mean == pytest.approx(scores["rougeL"], abs=1e-6)
    again = ("--data", tmp_path / "run" / "predictions.jsonl", "--output", tmp_path / "again")
    assert lora("generate", tmp_path / "run", *again, "--max-new-tokens", 6) == 0
    chosen = ("--metric", "bleu", "--run-dir", tmp_path / "chosen")
    assert lora("train", *flags, *chosen) == 0
    assert next(iter(summary_of(tmp_path / "chosen")["metrics"])) == "bleu"
    assert "rougeL" not in lines(tmp_path / "chosen" / "predictions.jsonl")[0]


@pytest.mark.parametrize(
    ("flags", "known"),
    [
        (("--metric", "macro_f1"), "exact_match, bleu, rouge1, rouge2, rougeL, perplexity"),
        (("--metric", "bleu", "--answered", 0), "are perplexity, token_accuracy"),
    ],
)
def test_a_metric_that_the_run_will_not_have_is_refused(
    flags: tuple[Any, ...],
    known: str,
    base: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = pairs(tmp_path / "pairs.jsonl", 40)
    assert lora("train", "--base", base, "--data", data, *flags, "--run-dir", tmp_path / "run") == 2
    assert known in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_on_conversations_leaves_its_scores(run: Path) -> None:
    summary = summary_of(run)
    assert summary["task"] == "text"
    assert list(summary["metrics"])[:2] == ["exact_match", "bleu"]
    assert summary["metrics"]["perplexity"] == pytest.approx(
        torch.tensor(summary["loss"]).exp().item(), rel=1e-5
    )
    assert summary["baseline"].keys() == summary["metrics"].keys()
    assert summary["baseline"]["perplexity"] > summary["metrics"]["perplexity"]
    steps = [row for row in lines(run / "metrics.jsonl") if row["kind"] == "step"]
    assert all(step["padding"] < 0.5 for step in steps)
    assert summary["evaluations"][1]["loss"] < summary["evaluations"][0]["loss"]
    rows = lines(run / "predictions.jsonl")
    assert [message["role"] for message in rows[0]["messages"]] == [
        "system", "user", "assistant", "user",
    ]  # fmt: skip
    assert len(rows) == summary["rows"] == 4


def test_the_predictions_score_as_the_run_says(run: Path) -> None:
    again = score("text", *read_predictions(run / "predictions.jsonl")[:2])
    assert again == {name: summary_of(run)["metrics"][name] for name in again}


def test_eval_gives_the_runs_scores_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora("eval", run) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    want = {"loss": summary_of(run)["loss"], **summary_of(run)["metrics"]}
    assert printed == {name: f"{value:.4f}" for name, value in want.items()}


def test_eval_takes_other_data(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("eval", run, "--data", talks(tmp_path / "more.jsonl", 5)) == 0
    assert "exact_match" in capsys.readouterr().out


def test_predict_and_generate_answer_a_file_alike(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = talks(tmp_path / "asked.jsonl", 3)
    assert lora("predict", run, "--data", data, "--output", tmp_path / "one.jsonl") == 0
    assert lora("generate", run, "--data", data, "--output", tmp_path / "two.jsonl") == 0
    assert capsys.readouterr().out.count("written: ") == 2
    one, two = lines(tmp_path / "one.jsonl"), lines(tmp_path / "two.jsonl")
    assert one == two
    assert [row["references"] for row in one] == [["2"], ["3"], ["4"]]
    assert lora("generate", run, "--data", data, "--adapter", "both") == 0
    both = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in both] == [row["prediction"] for row in one]
    assert lora("generate", run, "--data", data, "--adapter", "off") == 0
    off = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in off] == [row["base"] for row in both]


def test_one_prompt_is_answered_as_text_and_streamed_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("generate", run, "--prompt", "3 and one?", "--system", "Count.") == 0
    streamed = capsys.readouterr().out
    assert lora("generate", run, "--prompt", "3 and one?", "4 and one?", "--system", "Count.") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert streamed.strip() == rows[0]["prediction"]


def test_a_talk_goes_on_from_what_was_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talk(text: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert lora("generate", run, "--temperature", 1, "--seed", 3) == 0
        return capsys.readouterr().out.splitlines()

    two = talk("1 and one?\nAnd one?\n")
    anew = talk("1 and one?\n/new\n1 and one?\n/exit\nnever\n")
    assert len(two) >= 2
    assert anew[: len(anew) // 2] == anew[len(anew) // 2 :]
    assert two[0] == anew[0]


def test_with_the_adapter_on_and_off_each_talks_with_itself(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What either answers is what it answers when it is asked alone."""
    heard: dict[str, list[tuple[str, list[str]]]] = {"on": [], "off": []}

    def listening(trained: Any, asked: Any, writing: Any, adapter: str, **more: Any) -> Any:
        found = answers(trained, asked, writing, adapter, **more)
        heard[adapter].append(
            (found[adapter][0], [message.content for message in asked[0].messages])
        )
        return found

    monkeypatch.setattr("lora.finetune.chat.answers", listening)
    talk = "1 and one?\nAnd one?\nAnd one?\n"
    found = {}
    for adapter in ("both", "on", "off"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(talk))
        assert lora("generate", run, "--adapter", adapter, "--system", "Count.") == 0
        found[adapter] = {side: [*some] for side, some in heard.items()}
        for some in heard.values():
            some.clear()
    assert found["both"] == {"on": found["on"]["on"], "off": found["off"]["off"]}
    on, off = found["both"]["on"], found["both"]["off"]
    assert on[0][0] != off[0][0]
    for some in (on, off):
        assert some[2][1] == [
            "Count.", "1 and one?", some[0][0], "And one?", some[1][0], "And one?",
        ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *said: str) -> None:
    """Lines typed in a terminal, and Ctrl-D."""
    lines = iter(said)

    def ask(prompt: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ask)


def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the model is asked from here on, and answers "so"."""
    seen: list[list[str]] = []

    def answer(trained: Any, some: Any, writing: Any, adapter: str, streamed: Any) -> Any:
        seen.append([message.content for message in some[0].messages])
        streamed("so")
        return {adapter: ["so"]}

    monkeypatch.setattr("lora.finetune.chat.answers", answer)
    return seen


@pytest.mark.parametrize("word", ["exit", "quit", "/exit", "/quit", "Exit"])
def test_a_talk_is_left_by_the_word(
    word: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = asked(monkeypatch)
    typed(monkeypatch, "1 and one?", f" {word} ", "never")
    assert lora("generate", run) == 0
    assert seen == [["1 and one?"]]
    assert "Type exit, quit or Ctrl-D to leave the chat, or /help for" in capsys.readouterr().out


def test_a_talk_has_commands_and_offers_the_system_prompt_of_the_training(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = asked(monkeypatch)
    typed(monkeypatch, "a", "/system", "b", "/help", "/nothing", "c", "/new", "d",
          "/system Be brief.", "/etc/hosts is?")  # fmt: skip
    assert lora("generate", run) == 0
    assert seen == [
        ["a"],
        ["Count.", "b"],
        ["Count.", "b", "so", "c"],
        ["Count.", "d"],
        ["Be brief.", "/etc/hosts is?"],
    ]
    said = capsys.readouterr().out.splitlines()
    assert said[1] == "The model was trained with a system prompt. /system sets it here: Count."
    assert "system: Count." in said
    assert "system: Be brief." in said
    assert "There is no command /nothing. /help lists the commands." in said
    assert "\n".join(said).count(HELP) == 1


def test_what_cannot_be_answered_is_named_and_the_talk_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "long " * 400, "1 and one?")
    assert lora("generate", run) == 0
    said = capsys.readouterr().out.splitlines()
    assert "leaves no room" in said[2]
    assert said[2].endswith("Or type /new to start a new conversation.")
    assert len(said) > 3
    monkeypatch.setattr(sys, "stdin", io.StringIO("long " * 400))
    assert lora("generate", run) == 2


def test_an_answer_beside_another_is_no_markup(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = {"on": ["so [/INST] [b]it[/b] is"], "off": ["no"]}
    monkeypatch.setattr(
        "lora.finetune.chat.answers", lambda *given, **more: {given[3]: said[given[3]]}
    )
    assert lora("generate", run, "--prompt", "1", "--adapter", "both") == 0
    assert "[/INST] [b]it[/b]" in capsys.readouterr().out


@pytest.mark.parametrize("typed", [None, "h\udcffi\n"])
def test_a_talk_without_words(
    typed: str | None,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", typed and io.StringIO(typed))
    assert lora("generate", run) == (0 if typed is None else 2)
    assert ("encoding" in capsys.readouterr().err) == bool(typed)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--prompt", "a", "--max-new-tokens", 0), "--max-new-tokens must be"),
        (("--data", "x.jsonl", "--system", "Count."), "--system has no effect with --data"),
        (("--prompt", "a", "--top-k", 3), "temperature 0"),
    ],
)
def test_flags_of_generate_without_effect_are_refused(
    flags: Any, says: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("generate", run, *flags) == 2
    assert says in capsys.readouterr().err


def test_sampling_is_of_its_seed(run: Path) -> None:
    trained = reopen(run)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]

    def write(**how: Any) -> list[str]:
        writing = Writing(max_new_tokens=12, **how)
        return written(trained.model, trained.tokenizer, prompts, writing)

    warm = write(temperature=1.0, seed=1)
    state = torch.get_rng_state()
    assert write(temperature=1.0, seed=1) == warm
    assert torch.equal(torch.get_rng_state(), state)
    assert write(temperature=1.0, seed=2) != warm
    assert write(temperature=1.0, seed=1, top_k=1) == write()


@pytest.mark.parametrize("name", [*CAUSAL, *SEQUENCES])
def test_what_is_padded_goes_on_as_it_would_alone(name: str) -> None:
    model = build(name)
    prompts = [list(range(5, 5 + n)) for n in (4, 13)]
    batch = padded(model, prompts, 0, torch.device("cpu"))
    first: dict[str, Any] = {}
    if name in SEQUENCES:
        first = {"decoder_input_ids": torch.tensor([[2]])}
        batch |= {"decoder_input_ids": torch.tensor([[2]] * 2)}
    else:  # as generate() counts them
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch).logits[0, -1]
        alone = model(input_ids=torch.tensor(prompts[:1]), **first).logits[0, -1]
    assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()


def test_a_token_that_ends_an_answer_is_none_of_it() -> None:
    """Also one that the tokenizer does not take for special, and decodes."""
    model = build("llama")
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    tokenizer.add_tokens([AddedToken("<end>", special=False)])
    ends = tokenizer.convert_tokens_to_ids("<end>")
    model.get_output_embeddings().weight.data[ends] *= 1.4
    told: list[str] = []
    writing = Writing(max_new_tokens=40)
    for prompt in range(5, 60):
        with torch.no_grad():
            free = written(model, tokenizer, [[prompt]], writing)[0]
        if "<end>" in free[1:]:
            break
    found = written(model, tokenizer, [[prompt]], writing, [ends], streamed=told.append)[0]
    assert "".join(told) == found == free.partition("<end>")[0]


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_bases_own_generation_config_decides_nothing(name: str) -> None:
    model = build(name)
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]

    def write() -> list[str]:
        return written(model, tokenizer, prompts, Writing(max_new_tokens=12))

    want = write()
    own = transformers.GenerationConfig(repetition_penalty=1.9, num_beams=3, no_repeat_ngram_size=1)
    model.generation_config = own
    assert write() == want
    assert model.generation_config is own


def test_a_batch_is_padded_without_a_trace(run: Path, auto_dtype: str) -> None:
    trained = reopen(run)
    prompts = [list(range(5, 5 + n)) for n in (3, 17, 9, 1)]
    writing = Writing(max_new_tokens=8)
    model, pad = trained.model, trained.tokenizer.pad_token_id
    batch = padded(model, prompts, pad, trained.device)
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(input_ids=torch.tensor([p])).logits[:, -1] for p in prompts])
    assert (together - alone).abs().max() <= ROUNDING[auto_dtype] * alone.abs().max()
    if auto_dtype == "float32":  # in bfloat16 the two most probable tokens may change places
        texts = [written(model, trained.tokenizer, [p], writing)[0] for p in prompts]
        assert written(model, trained.tokenizer, prompts, writing) == texts


def test_a_cut_off_run_goes_on_to_the_same_bytes(base: str, tmp_path: Path) -> None:
    data = [f"a={talks(tmp_path / 'a.jsonl', 40)}", f"b={pairs(tmp_path / 'b.jsonl', 30)}"]
    flags = (
        "--base",
        base,
        "--data",
        *data,
        "--packing",
        *FLAGS,
        "--lora-dropout",
        0.1,
        "--temperature",
        2,
        "--weights",
        "b",
        3,
        "--save-steps",
        2,
        "--keep-last",
        99,
    )
    assert lora("train", *flags, "--run-dir", tmp_path / "whole") == 0
    assert lora("train", *flags, "--run-dir", tmp_path / "cut") == 0
    (tmp_path / "cut" / "summary.json").unlink()
    for path in sorted((tmp_path / "cut" / "checkpoints").iterdir())[2:]:
        for file in path.rglob("*"):
            if file.is_file():
                file.unlink()
    assert lora("train", "--resume", tmp_path / "cut") == 0
    for name in ("adapter/adapter_model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    metrics = summary_of(tmp_path / "whole")["metrics"]
    assert metrics == summary_of(tmp_path / "cut")["metrics"]
    assert {"exact_match/a", "exact_match/b", "perplexity/a", "perplexity/b"} <= metrics.keys()
    assert {row["task"] for row in lines(tmp_path / "whole" / "predictions.jsonl")} == {"a", "b"}


@pytest.mark.slow
def test_ranks_write_what_one_writes(base: str, tmp_path: Path) -> None:
    """Also where the base lies in pieces on them, and one has a prompt less than the other."""
    data = talks(tmp_path / "x.jsonl", 40)
    flags = ("--base", base, "--data", data, *FLAGS, "--epochs", 1, "--answered", 3)
    found = []
    for name, more in (("one", ()), ("two", ("--nproc", 2)), ("cut", ("--nproc", 2, "--shard"))):
        assert lora("train", *flags, *more, "--run-dir", tmp_path / name) == 0
        found.append(lines(tmp_path / name / "predictions.jsonl"))
    assert len(found[0]) == 3
    assert found[0] == found[1] == found[2]


def test_a_data_set_without_the_held_out_split_has_no_score_there(
    base: str, tmp_path: Path
) -> None:
    for name, splits in (("a", ("train", "dev", "test")), ("b", ("train", "dev"))):
        (tmp_path / name).mkdir()
        for split in splits:
            pairs(tmp_path / name / f"{split}.jsonl", 8)
    flags = ("--base", base, "--data", tmp_path / "a", tmp_path / "b", *FLAGS, "--epochs", 1)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    summary = summary_of(tmp_path / "run")
    assert {"perplexity/a", "exact_match/a"} <= summary["metrics"].keys()
    assert not any(name.endswith("/b") for name in summary["metrics"])
    assert "perplexity/b" in summary["evaluations"][0]["dev"]


def test_merging_leaves_a_plain_language_model(
    run: Path, auto_dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("merge", run, "--output", tmp_path / "plain") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == CHATML
    assert (tmp_path / "plain" / "generation_config.json").is_file()
    trained = reopen(run)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        ours, theirs = trained.model(input_ids=ids).logits, model(input_ids=ids).logits
    assert theirs.dtype == torch.float32  # as the base is, whatever the run computed in
    assert (ours - theirs).abs().max() <= ROUNDING[auto_dtype] * ours.abs().max()


def test_a_reopened_model_computes_in_its_dtype_whoever_calls_it(
    run: Path, auto_dtype: str
) -> None:
    trained = reopen(run)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=auto_dtype == "bfloat16"):
        wanted = trained.model(input_ids=ids).logits
    assert trained.config.dtype == auto_dtype
    with torch.no_grad():
        assert wanted.equal(trained.model(input_ids=ids).logits)
        assert wanted.equal(copy.deepcopy(trained.model)(input_ids=ids).logits)
        hidden = trained.model.model(input_ids=ids).last_hidden_state  # a part of it
    assert hidden.shape == (1, 35, 32)
    trained.model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_is_written_in_what_the_bases_files_hold(
    dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Merged in float32, rounded once."""
    short = str(dtype).removeprefix("torch.")
    base = saved(tmp_path / "base", "llama", CHATML)
    transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    flags = ("--base", base, "--data", talks(tmp_path / "talks.jsonl"), *FLAGS, "--epochs", 1)
    run = tmp_path / "run"
    assert lora("train", *flags, "--dtype", "float32", "--run-dir", run) == 0
    config = tmp_path / "base" / "config.json"
    said = json.loads(config.read_text())
    written = {}
    for name, more in (("own", ()), ("unsaid", ()), ("wide", ("--dtype", "float32"))):
        if name == "unsaid":  # as older files: the weights themselves say it
            config.write_text(json.dumps({k: v for k, v in said.items() if k != "dtype"}))
        capsys.readouterr()
        assert lora("merge", run, "--output", tmp_path / name, *more) == 0
        printed = capsys.readouterr().out
        wants = "saved in float32\n" if more else f"saved in {short}, the dtype of the base; "
        assert wants in printed
        assert "in float32; outputs changed by" in printed  # certified before the rounding
        written[name] = load_file(tmp_path / name / "model.safetensors")
        stated = json.loads((tmp_path / name / "config.json").read_text())["dtype"]
        assert stated == ("float32" if more else short)
    for key, wide in written["wide"].items():
        assert wide.dtype == torch.float32
        assert written["own"][key].equal(wide.to(dtype)), key
        assert written["unsaid"][key].equal(wide.to(dtype)), key
    assert lora("merge", run, "--output", tmp_path / "no", "--tolerance", -1) == 2
    assert "tolerance must be a number of at least 0" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert lora("merge", run, "--output", tmp_path / "set", "--tolerance", "0.5") == 0
    assert "(tolerance 0.5)" in capsys.readouterr().out


def test_numbers_past_float16_are_not_written_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = saved(tmp_path / "base", "llama", CHATML)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.model.norm.weight.data[0] = 1e5
    model.save_pretrained(base)
    flags = ("--base", base, "--data", talks(tmp_path / "talks.jsonl"), *FLAGS, "--epochs", 1)
    flags = (*flags, "--dtype", "float32", "--answered", 0)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    out = ("--output", tmp_path / "plain", "--dtype", "float16")
    assert lora("merge", tmp_path / "run", *out) == 2
    assert "model.norm.weight holds numbers outside the range of float16" in capsys.readouterr().err
    assert not (tmp_path / "plain").exists()


ENDED = (
    "{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("asked", ["auto", "file"])
def test_a_merged_model_stops_where_the_run_does(
    asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template whose turn ends in a token that is not the base's end token, the base's own
    or one of a file."""
    base = saved(tmp_path / "base", "llama", ENDED if asked == "auto" else CHATML)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"]})
    tokenizer.save_pretrained(base)
    generation = transformers.GenerationConfig.from_pretrained(base)
    stop = tokenizer.convert_tokens_to_ids("a")  # as the base's own config may name some more
    generation.eos_token_id = [tokenizer.eos_token_id, stop]
    generation.save_pretrained(base)
    rows = [{"question": f"{i}?", "answer": "no"} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.jinja").write_text(ENDED)
    template = ("--template", tmp_path / "mine.jinja") if asked == "file" else ()
    flags = ("--base", base, "--data", tmp_path / "x.jsonl", *FLAGS, *template, "--epochs", 12)
    assert lora("train", *flags, "--r", 8, "--run-dir", tmp_path / "run") == 0
    assert lora("merge", tmp_path / "run", "--output", tmp_path / "plain") == 0
    capsys.readouterr()
    assert lora("generate", tmp_path / "run", "--prompt", "7?", "--max-new-tokens", 40) == 0
    answer = capsys.readouterr().out.strip()

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == ENDED
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert set(model.generation_config.eos_token_id) == {tokenizer.eos_token_id, stop, end}
    asking = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7?"}], add_generation_prompt=True, return_tensors="pt"
    )
    written = model.generate(**asking, max_new_tokens=40)[0, asking["input_ids"].shape[1] :]
    assert answer == "no"
    assert written.tolist() == [*tokenizer("no", add_special_tokens=False)["input_ids"], end]
    exported(tmp_path / "run", asked, (tokenizer.eos_token_id, end, stop), capsys)


def exported(
    run: Path, asked: str, ends: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What other engines are told of a run's template and the tokens that end its answers."""
    pytest.importorskip("gguf")
    assert lora("export", run, "--format", "vllm") == 0
    words = shlex.split(capsys.readouterr().out)
    folder = Path(words[words.index("--generation-config") + 1])
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [*ends]
    assert lora("export", run, "--output", run / "a b.gguf") == 0
    flags = shlex.split(capsys.readouterr().out)
    assert flags[flags.index("--override-kv") + 1] == f"tokenizer.ggml.eot_token_id=int:{ends[1]}"
    assert lora("export", run, "--format", "ollama", "--output", run / "c d.gguf") == 0
    said = capsys.readouterr().out.strip()
    assert said.endswith(shlex.join(["ollama", "create", "NAME", "-f", f"{run}/c d.Modelfile"]))
    modelfile = (run / "c d.Modelfile").read_text()
    assert modelfile.startswith(
        "FROM BASE.gguf\nADAPTER ./c d.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|turn|>system\n'
        '{{ .Content }}<|end|>\n{{ else if eq .Role "user" }}<|turn|>user\n'
        "{{ .Content }}<|end|>\n<|turn|>assistant\n"
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|end|>\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "</s>"\nPARAMETER stop "<|end|>"\nPARAMETER stop "a"\n'
    )
    own = [words[words.index(flag) + 1] for flag in ("--chat-template",) if flag in words]
    own += [flags[flags.index(flag) + 1] for flag in ("--chat-template-file",) if flag in flags]
    assert [Path(path).read_text() for path in own] == ([ENDED] * 2 if asked == "file" else [])


THINKING = (
    "{% if tools %}{{ tools | tojson + '</s>\n' }}{% endif %}{% for m in messages %}"
    "{{ '<s>' + m.role + '\n' }}{% if m.reasoning_content %}"
    "{{ '<think>' + m.reasoning_content + '</think>\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name + ' ' }}"
    "{{ call.function.arguments | tojson }}</call>{% endfor %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def test_reasoning_and_tools_go_the_whole_way(tmp_path: Path) -> None:
    base = saved(tmp_path / "base", "llama", THINKING)
    call = {"type": "function", "function": {"name": "f", "arguments": {"n": 1}}}
    rows = [
        {"tools": [{"type": "function", "function": {"name": "f"}}], "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        ]}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--base", base, "--data", tmp_path / "x.jsonl", *FLAGS, "--epochs", 20, "--r", 8)
    flags += ("--learning-rate", 0.03)
    run = tmp_path / "run"
    assert lora("train", *flags, "--max-length", 256, "--max-new-tokens", 30, "--run-dir", run) == 0
    written = lines(run / "predictions.jsonl")
    assert [(row["reasoning"], row["prediction"]) for row in written] == [
        ("<think>hm</think>", "ok")
    ] * len(written)
    assert written[0]["tools"] == rows[0]["tools"]
    assert written[0]["messages"][2]["tool_calls"] == [call]
    assert summary_of(run)["metrics"]["exact_match"] == 1
    assert lora("merge", run, "--output", tmp_path / "plain") == 0
    data = run / "predictions.jsonl"
    assert lora("generate", run, "--data", data, "--output", tmp_path / "again.jsonl") == 0
    again = lines(tmp_path / "again.jsonl")
    assert [row["prediction"] for row in again] == ["ok"] * len(written)


def test_a_run_whose_base_knows_its_ends_is_exported_without_more(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    assert lora("export", run, "--format", "vllm") == 0
    assert "--generation-config" not in capsys.readouterr().out
    assert not (run / "adapter" / "generation_config.json").exists()


STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + CHATML.partition("%}")[2]
)


def mixed(folder: Path) -> list[str]:
    """A folder of conversations, and the places of its five rows that cannot be used."""
    folder.mkdir()
    bad = []
    for split, count in (("train", 16), ("dev", 6), ("test", 6)):
        rows = []
        for i in range(count):
            turns = [("user", f"{i} and one?"), ("assistant", f"{i + 1}")]
            if (split, i) in (("train", 3), ("train", 9), ("dev", 2), ("test", 4)):
                turns = turns[:1] * 2 + turns[1:]
            rows.append(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}))
        if split == "train":
            rows[5] = "{"
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    for split, number in (("train", 6), ("train", 4), ("train", 10), ("dev", 3), ("test", 5)):
        bad.append(f"{folder}/{split}.jsonl, line {number}: ")
    return bad


def test_every_row_that_cannot_be_used_is_found_in_one_pass_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = saved(tmp_path / "base", "llama", STRICT), tmp_path / "run"
    bad = mixed(tmp_path / "data")
    flags = ("--base", base, "--data", tmp_path / "data", *FLAGS, "--epochs", 1)
    for verb in (("train", "--run-dir", run), ("plan",), ("data", "preview")):
        capsys.readouterr()
        assert lora(*verb, *flags) == 2
        said = capsys.readouterr().err.split("\n")
        assert said[0] == "DataError: 5 rows cannot be used:"
        assert [line.strip()[: len(place)] for line, place in zip(said[1:6], bad)] == bad
        assert "refuses a conversation of user: roles must alternate" in said[2]
        assert said[6] == "Fix them, or pass --skip-bad-lines 5 to skip them."
    assert not run.exists()
    assert lora("train", *flags, "--run-dir", run, "--skip-bad-lines", 4) == 2
    flags = (*flags, "--skip-bad-lines", 5)
    assert lora("train", *flags, "--run-dir", run) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "5 rows skipped, as --skip-bad-lines 5 allows:" in said
    assert len(lines(run / "predictions.jsonl")) == summary_of(run)["rows"] == 5
    assert lora("eval", run) == 0
    said = capsys.readouterr()
    assert "has changed since" not in said.err
    assert f"loss {summary_of(run)['loss']:.4f}" in said.out
    assert lora("plan", *flags) == 0
    assert lora("data", "preview", *flags) == 0
    capsys.readouterr()
    test = tmp_path / "data" / "test.jsonl"
    for verb in ("eval", "predict", "generate"):
        assert lora(verb, run, "--data", test) == 2
        said = capsys.readouterr().err
        assert f"1 row cannot be used:\n  {bad[4]}" in said
        assert lora(verb, run, "--data", test, "--skip-bad-lines", 1) == 0
        assert "1 row skipped" in capsys.readouterr().err


def test_rows_of_an_encoders_data_are_skipped_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, run = saved(tmp_path / "base", "t5"), tmp_path / "run"
    rows: list[Any] = [{"prompt": f"{i} is", "completion": f" {i}"} for i in range(20)]
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant") * 2]
    rows[7] = {"messages": turns}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--base", base, "--data", tmp_path / "x.jsonl", *FLAGS, "--epochs", 1)
    flags = (*flags, "--template", "none", "--run-dir", run)
    assert lora("train", *flags) == 2
    assert "x.jsonl, line 8: 4 messages" in capsys.readouterr().err
    assert lora("train", *flags, "--skip-bad-lines", 1) == 0
    assert "1 row skipped" in capsys.readouterr().err


def test_answers_with_unicode_line_breaks_merge(base: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i % 9} is\u2028", "completion": f" number\u2029{i}\u0085."} for i in range(24)
    ]
    path, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    flags = ("--base", base, "--data", path, *FLAGS, "--epochs", 1, "--run-dir", run)
    assert lora("train", *flags) == 0
    assert "\u2028" in (run / "predictions.jsonl").read_text("utf-8")
    assert lora("merge", run, "--output", tmp_path / "plain") == 0


@pytest.mark.parametrize("name", SEQUENCES)
def test_an_encoder_and_a_decoder_learn_answers(name: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", name)
    data = pairs(tmp_path / "pairs.jsonl", 40)
    flags = ("--base", base, "--data", data, *FLAGS, "--epochs", 3)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    summary = summary_of(tmp_path / "run")
    assert summary["evaluations"][-1]["loss"] < summary["evaluations"][0]["loss"]
    assert lora("generate", tmp_path / "run", "--prompt", "3 is") == 0
    assert lora("merge", tmp_path / "run", "--output", tmp_path / "plain") == 0
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "plain")
    assert lora("train", *flags, "--packing", "--run-dir", tmp_path / "packed") == 2


@pytest.mark.parametrize("method", ["qlora", "bitfit", "full", "dora", "tokens"])
def test_other_methods_run_on_texts(method: str, base: str, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs.jsonl", 40)
    own = {"bitfit": (), "full": (), "tokens": ("--token-indices", 5, 3)}.get(method, ("--r", 2))
    name = "gpt2" if method in ("bitfit", "tokens") else "llama"  # which has no biases, and no tie
    base = saved(tmp_path / "base", name) if name == "gpt2" else base
    flags = ("--base", base, "--data", data, "--method", method, *own, *FLAGS[2:])
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    assert lora("eval", tmp_path / "run") == 0


def test_the_loss_may_be_on_all_of_a_text(base: str, tmp_path: Path) -> None:
    data = tmp_path / "plain.txt"
    data.write_text("".join(f"line {i} of a plain text\n" for i in range(40)))
    flags = ("--base", base, "--data", data, *FLAGS)
    assert lora("train", *flags, "--run-dir", tmp_path / "auto") == 2  # a text may be of any task
    assert lora("train", *flags, "--task", "text", "--run-dir", tmp_path / "run") == 0
    summary = summary_of(tmp_path / "run")
    assert "perplexity" in summary["metrics"]
    assert "exact_match" not in summary["metrics"]  # nothing was asked


def test_a_plan_of_texts_counts_their_tokens(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "t.jsonl"
    rows = [{"prompt": f"{i}", "completion": "x" * (1 + i % 17)} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--base", base, "--data", data, *FLAGS[:5], 32, *FLAGS[6:])
    found = []
    for more in ((), ("--packing",)):
        assert lora("plan", *flags, *more, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["largest"][0] == 32
    assert found[1]["padding"] < found[0]["padding"]


def test_a_plan_counts_what_a_decoder_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, found = saved(tmp_path / "base", "t5"), []
    for length in (4, 100):
        data = tmp_path / f"{length}.jsonl"
        rows = [{"prompt": f"{i}", "completion": "x" * length} for i in range(30)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert lora("plan", "--base", base, "--data", data, *FLAGS, "--json") == 0
        found.append(json.loads(capsys.readouterr().out))
    assert [one["largest"][3] for one in found] == [6, 102]  # between <s> and </s>
    few, many = (one["memory"][0]["training"]["activations"] for one in found)
    assert many > 4 * few


class TestBadInput:
    """Each is a named error before any step, and leaves no run."""

    def refused(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, *flags: object) -> str:
        assert lora("train", *flags, "--run-dir", tmp_path / "run") == 2
        assert not (tmp_path / "run").exists()
        return " ".join(capsys.readouterr().err.split())

    def test_a_broken_line(
        self, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = Path(pairs(tmp_path / "x.jsonl", 40))
        rows = data.read_text().splitlines()
        data.write_text("\n".join([*rows[:6], rows[6][:-3], *rows[7:]]))
        said = self.refused(capsys, tmp_path, "--base", base, "--data", data, *FLAGS)
        assert "x.jsonl, line 7" in said
        assert "--skip-bad-lines 1" in said
        flags = ("--base", base, "--data", data, *FLAGS, "--skip-bad-lines", 1)
        assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
        assert "1 row skipped" in " ".join(capsys.readouterr().err.split())

    @pytest.mark.parametrize(
        ("row", "says"),
        [
            ({"messages": []}, "an empty conversation"),
            ({"messages": [{"role": "wizard", "content": "x"}]}, "has the role 'wizard'"),
            ({"messages": [{"role": "user", "content": "x"}]}, "must be the assistant's answer"),
        ],
    )
    def test_a_row_that_is_no_conversation(
        self, row: Any, says: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = Path(talks(tmp_path / "x.jsonl"))
        data.write_text(data.read_text() + json.dumps(row) + "\n")
        said = self.refused(capsys, tmp_path, "--base", base, "--data", data, *FLAGS)
        assert says in said
        assert "line 25" in said

    def test_a_template_that_refuses_a_role(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        strict = CHATML.replace(
            "{% for m in messages %}",
            "{% for m in messages %}{% if m.role == 'system' %}"
            "{{ raise_exception('no system here') }}{% endif %}",
        )
        base = saved(tmp_path / "base", "llama", strict)
        data = talks(tmp_path / "x.jsonl")
        said = self.refused(capsys, tmp_path, "--base", base, "--data", data, *FLAGS)
        assert "no system here" in said
        assert "--template plain" in said

    def test_answers_that_are_all_cut_off(
        self, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = talks(tmp_path / "x.jsonl")
        flags = ("--base", base, "--data", data, *FLAGS[:6], "--max-length", 12)
        assert "--max-length 12" in self.refused(capsys, tmp_path, *flags)

    def test_more_positions_than_the_model_has(
        self, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = talks(tmp_path / "x.jsonl")
        flags = ("--base", base, "--data", data, *FLAGS[:6], "--max-length", 513)
        assert "has 512 positions" in self.refused(capsys, tmp_path, *flags)

    @pytest.mark.parametrize("lost", ["eos_token", "vocabulary"])
    def test_a_tokenizer_that_does_not_fit(
        self, lost: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = saved(tmp_path / "base", "llama")
        path = tmp_path / "base" / "tokenizer_config.json"
        if lost == "eos_token":
            path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": None}))
        else:
            small = transformers.LlamaConfig(**SHAPE | {"vocab_size": 100})
            transformers.LlamaForCausalLM(small).save_pretrained(tmp_path / "base")
        data = pairs(tmp_path / "x.jsonl")
        said = self.refused(capsys, tmp_path, "--base", base, "--data", data, *FLAGS)
        assert {"eos_token": "has no end token", "vocabulary": "embedding 100 rows"}[lost] in said

    def test_a_base_that_is_no_language_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = pairs(tmp_path / "x.jsonl")
        said = self.refused(capsys, tmp_path, "--data", data, *FLAGS)
        assert "Pass --base demo-lm-tiny, smollm2, or a lang" in said

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (("--weights", "nobody", 2), "--data has no such name, found x"),
            (("--weights", "x", 0), "--weights [x] must be more than 0"),
            (("--temperature", 0), "temperature"),
            (("--template", "gone.jinja"), "gone.jinja cannot be read"),
            (("--loss-on", "none"), "loss-on"),
            (
                ("--task", "text", "--text-column", "body"),
                "--text-column has no effect with --task text",
            ),
            (("--task", "text", "--labels", "a", "b"), "--labels has no effect with --task text"),
        ],
    )
    def test_settings(
        self, flags: Any, says: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        data = pairs(tmp_path / "x.jsonl")
        said = self.refused(capsys, tmp_path, "--base", base, "--data", data, *FLAGS, *flags)
        assert says in said

    def test_a_prompt_that_cannot_be_answered_after_training(
        self, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ("--base", base, "--data", pairs(tmp_path / "x.jsonl"), *FLAGS[:8])
        said = self.refused(capsys, tmp_path, *flags, "--max-new-tokens", 510)
        assert "leaves no room for 510 new ones in the model's 512 positions" in said
        assert lora("plan", *flags, "--max-new-tokens", 510) == 2
        assert lora("plan", *flags, "--max-new-tokens", 510, "--answered", 0) == 0

    def test_settings_of_texts_on_classes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        said = self.refused(capsys, tmp_path, "--limit", 20, "--packing")
        assert "--packing has no effect with --task classification" in said


def test_a_prompt_that_leaves_no_room_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora("generate", run, "--prompt", "x" * 600) == 2
    assert "leaves no room" in capsys.readouterr().err


def test_an_empty_prompt_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a tokenizer that puts nothing before a text there is nothing to go on from."""
    base = saved(tmp_path / "base", "gpt2")
    path = tmp_path / "base" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    for split in ("train", "dev", "test"):
        data = Path(pairs(tmp_path / f"{split}.jsonl", 8))
        data.write_text(data.read_text() + '{"prompt": "", "completion": "by itself"}\n' * 2)
    flags = ("--base", base, "--data", tmp_path, *FLAGS, "--epochs", 1)
    assert lora("train", *flags, "--run-dir", tmp_path / "run") == 0
    assert all(row["prompt"] for row in lines(tmp_path / "run" / "predictions.jsonl"))
    assert lora("generate", tmp_path / "run", "--prompt", "") == 2
    assert "a prompt is empty" in capsys.readouterr().err


def test_a_file_called_as_a_template_is_not_meant_by_it(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path)
    flags = ("--base", base, "--data", talks(tmp_path / "x.jsonl"), *FLAGS)
    assert lora("plan", *flags, "--template", "plain") == 0


def test_a_comparison_with_a_template_of_a_file_goes_on(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jinja").write_text(CHATML)
    monkeypatch.chdir(tmp_path)
    flags = ("--base", base, "--data", talks(tmp_path / "x.jsonl"), *FLAGS, "--epochs", 1)
    compared = [*map(str, flags), "--template", "own.jinja", "--methods", "lora"]
    (run,) = parse_compare(compared)[1].finals("lora")
    assert run.run_dir is not None
    assert lora("train", *flags, "--template", "own.jinja", "--run-dir", run.run_dir) == 0
    assert standing(run) == "complete"


def test_preview_shows_what_is_learned(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = talks(tmp_path / "x.jsonl")
    assert lora("data", "preview", "--base", base, "--data", data, "--count", 1) == 0
    shown = capsys.readouterr().out
    learned = [line for line in shown.splitlines() if line.startswith("learned")]
    assert len(learned) == 2
    assert learned[0].endswith("</s>")
    assert lora("data", "tasks") == 0
    assert "tasks/reverse" in capsys.readouterr().out
    assert lora("data") == 0
    assert "demo-tiny" in capsys.readouterr().out
    assert lora("data", "task") == 2
    assert "takes preview, fetch or tasks, found task" in capsys.readouterr().err


def test_preview_of_texts_without_labels_says_what_training_needs(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(20)))
    assert lora("data", "preview", "--base", base, "--data", data, "--count", 1) == 0
    note = "to train on these texts, set --task text"
    assert note in capsys.readouterr().err
    assert lora("data", "preview", "--base", base, "--data", data, "--task", "text") == 0
    assert note not in capsys.readouterr().err


def test_preview_is_of_what_training_would_make(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cut where the model's positions end, and T5, which knows no turns, without a template."""
    long = tmp_path / "long.jsonl"
    long.write_text(
        "".join(json.dumps({"prompt": f"{i}", "completion": "b" * 600}) + "\n" for i in range(20))
    )
    assert lora("data", "preview", "--base", "demo-lm-tiny", "--data", long, "--count", 1) == 0
    assert "--max-length 512 and truncated" in capsys.readouterr().out
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": "so"}) + "\n" for i in range(20))
    )
    base = saved(tmp_path / "t5", "t5")
    assert lora("data", "preview", "--base", base, "--data", asked, "--count", 1) == 0
    shown = capsys.readouterr().out
    assert "learned s│o│</s>" in shown
    assert "U│s│e│r" not in shown


def test_data_that_the_demo_base_cannot_use_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A preview reports what training would, and a task that nobody typed is explained."""
    ids = tmp_path / "ids.csv"
    ids.write_text(
        "id,day,text,kind\n" + "".join(f"{i},2026-01-{i},t{i},k\n" for i in range(10, 30))
    )
    asked = tmp_path / "asked.jsonl"
    asked.write_text(
        "".join(json.dumps({"question": f"{i}?", "answer": "so"}) + "\n" for i in range(20))
    )
    for data, words in ((ids, "no label column among id, day, text, kind"), (asked, "prompts")):
        for verb in (("data", "preview"), ("plan",)):
            assert lora(*verb, "--base", "demo", "--data", data) == 2
            assert words in capsys.readouterr().err


def test_a_made_task_is_asked_as_it_was_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--base", "demo-lm-tiny", "--data", "tasks/copy", "--method", "full", "--max-length", 64,
    )  # fmt: skip
    assert lora("data", "preview", *flags[:4], "--count", 1) == 0
    shown = capsys.readouterr().out
    assert "masked  <s>│c│o│p│y│:│ │" in shown
    run = tmp_path / "run"
    # In float32, which gives in a batch of two what it gives in a batch of eight.
    more = ("--limit", 8, "--epochs", 1, "--max-new-tokens", 8, "--dtype", "float32")
    assert lora("train", *flags, *more, "--run-dir", run) == 0
    first = lines(run / "predictions.jsonl")[0]
    prompt = first["messages"][0]["content"]
    assert first["references"] == [prompt.removeprefix("copy: ")]
    # The file is scored by the task's own exact match too, which tells capitals apart.
    again, _ = scores_of_file(run / "predictions.jsonl")
    metrics = summary_of(run)["metrics"]
    assert again == {name: metrics[name] for name in again}
    assert metrics.keys() - again == {"perplexity", "token_accuracy"}
    capsys.readouterr()
    assert lora("generate", run, "--prompt", prompt, prompt) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prediction"] for row in rows] == [first["prediction"]] * 2


def test_the_demos_tokenizer_is_of_bytes() -> None:
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    text = "Ünï 漢字\n\t x  y"
    start, *ids = tokenizer(text)["input_ids"]
    assert start == tokenizer.bos_token_id
    assert [i - len(language.SPECIAL) for i in ids] == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == language.LLAMA["vocab_size"]


def test_the_recipes_template_ends_a_prompt_with_a_line_break() -> None:
    """The model's own puts nothing there, and runs of earlier versions were trained with it."""
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<s>qa</s>"
    root = Path(__file__).parents[2]
    config = parse_run(["--config", str(root / "recipes" / "demo-lm-tiny-base.toml")])
    template = (root / config.template).read_text(encoding="utf-8")
    text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
    assert text == "<s>q\na</s>"
