"""The verbs on what was trained: a run whose base was moved, and adapters that have no run."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import CAUSAL, ENCODERS, SEQUENCES, build

from lora.errors import LoraError, RunError
from lora.finetune import state
from lora.finetune.cli import main
from lora.finetune.models import load_base
from lora.finetune.run_folder import run_around
from lora.finetune.source import open_source
from lora.finetune.trained import reopen

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

TARGETS = {"llama": ["q_proj", "up_proj"], "t5": ["q", "wi"], "distilbert": ["q_lin", "lin1"]}
AUTO = {
    **dict.fromkeys(CAUSAL, ("CAUSAL_LM", transformers.AutoModelForCausalLM)),
    **dict.fromkeys(SEQUENCES, ("SEQ_2_SEQ_LM", transformers.AutoModelForSeq2SeqLM)),
    **dict.fromkeys(ENCODERS, ("SEQ_CLS", transformers.AutoModelForSequenceClassification)),
}


def lora(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:  # tyro leaves so
        return int(stop.code or 0)


def save_base(folder: Path, name: str, template: str | None = None, **more: Any) -> Path:
    """A small base with a byte-level tokenizer, which reads any text."""
    model = build(name)
    model.config.update(more)
    model.config.max_position_embeddings = 64
    model.save_pretrained(folder)
    tokenizer = load_base("demo-lm-tiny", 1, "text", 0).tokenizer
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(
    base: Path, folder: Path, labels: int = 0, stated: bool = True, **more: Any
) -> Any:
    """PEFT's own adapter on it, with weights that show; the PEFT model."""
    config = transformers.AutoConfig.from_pretrained(base)
    task, auto = AUTO[config.model_type]
    given: dict[str, Any] = {"num_labels": labels} if labels else {}
    model = auto.from_pretrained(base, ignore_mismatched_sizes=True, **given)
    settings = {"r": 2, "task_type": task, "target_modules": TARGETS[config.model_type], **more}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if not stated:
        edit(folder, base_model_name_or_path=None)
    model.config.pad_token_id = 0
    return model.eval()


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter alone is run in what the machine multiplies best; here it is compared."""
    monkeypatch.setattr("lora.finetune.source.pick_dtype", lambda device: "float32")


class TestAnAdapterAlone:
    @pytest.mark.parametrize("stated", [True, False])
    def test_it_writes_as_pefts_model_does(
        self, stated: bool, float32: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = save_base(tmp_path / "base", "llama")
        theirs = save_adapter(base, tmp_path / "adapter", stated=stated)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        asked = tokenizer("a talk", return_tensors="pt")
        with torch.no_grad():
            found = theirs.generate(**asked, max_new_tokens=12, do_sample=False)[0]
        wanted = tokenizer.decode(found[asked["input_ids"].shape[1] :], skip_special_tokens=True)
        where = () if stated else ("--base", base)
        flags = ("--prompt", "a talk", "--max-new-tokens", 12)
        assert lora("generate", tmp_path / "adapter", *where, *flags) == 0
        out, err = capsys.readouterr()
        assert out.strip() == wanted.strip() != ""
        assert "base and scaling not verifiable" in err

    def test_a_talk_and_predict_without_a_word_on_how_long(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The model has 64 positions: of 256 new tokens none would fit."""
        save_adapter(save_base(tmp_path / "base", "llama"), tmp_path / "adapter")
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/exit\n"))
        assert lora("generate", tmp_path / "adapter") == 0
        talk = capsys.readouterr().out.strip()
        assert lora("predict", tmp_path / "adapter", "--text", "hello") == 0
        row = json.loads(capsys.readouterr().out)
        assert row["prompt"] == "hello"
        assert row["prediction"].split() == talk.split() != []

    def test_both_sides_of_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = save_base(tmp_path / "base", "t5")
        save_adapter(base, tmp_path / "adapter")
        flags = ("--prompt", "a", "b", "--max-new-tokens", 4, "--adapter", "both")
        assert lora("generate", tmp_path / "adapter", *flags) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == ["a", "b"]
        assert all({"base", "prediction"} <= row.keys() for row in rows)

    @pytest.mark.parametrize("labels", [2, 3])
    @pytest.mark.parametrize("stated", [True, False])
    def test_it_labels_as_pefts_model_does(
        self, labels: int, stated: bool, float32: None, tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        base = save_base(tmp_path / "base", "distilbert")
        theirs = save_adapter(base, tmp_path / "adapter", labels, stated)
        texts = ["good", "a dreadful film", "it is what it is"]
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        wanted = []
        for text in texts:
            given = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            with torch.no_grad():
                wanted.append(theirs(**given).logits[0].softmax(-1))
        where = () if stated else ("--base", base)
        assert lora("predict", tmp_path / "adapter", *where, "--text", *texts) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for row, scores in zip(rows, wanted, strict=True):
            assert row["prediction"] == str(int(scores.argmax()))
            given = torch.tensor([*row["scores"].values()])
            torch.testing.assert_close(given, scores, atol=2e-6, rtol=0)
        data = tmp_path / "data.tsv"
        lines = [f"{row['text']}\t{row['prediction']}" for row in rows]
        data.write_text("\n".join(["text\tlabel", *lines]) + "\n")
        assert lora("eval", tmp_path / "adapter", *where, "--data", data) == 0
        assert "accuracy 1.0000" in capsys.readouterr().out

    def test_the_classes_bear_the_names_that_the_base_gives_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        names = {0: "bad", 1: "good"}
        base = save_base(tmp_path / "base", "distilbert", id2label=names)
        save_adapter(base, tmp_path / "adapter", task_type=None)
        assert open_source(tmp_path / "adapter").config.labels == ("bad", "good")
        assert lora("predict", tmp_path / "adapter", "--text", "x") == 0
        assert json.loads(capsys.readouterr().out)["prediction"] in ("bad", "good")

    def test_one_output_is_a_regression(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", "distilbert")
        save_adapter(base, tmp_path / "adapter", labels=1)
        assert open_source(tmp_path / "adapter").config.task == "regression"

    def test_merged_it_is_pefts_own_merge(
        self, float32: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = save_base(tmp_path / "base", "llama")
        theirs = save_adapter(base, tmp_path / "adapter").merge_and_unload()
        assert lora("merge", tmp_path / "adapter", "--output", tmp_path / "merged") == 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        for (name, ours), wanted in zip(
            merged.named_parameters(), theirs.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5, msg=name)

    def test_texts_are_scored_as_pefts_model_scores_them(
        self, float32: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        base = save_base(tmp_path / "base", "llama")
        theirs = save_adapter(base, tmp_path / "adapter")
        data = tmp_path / "x.jsonl"
        data.write_text('{"prompt": "a talk", "completion": " of two"}\n')
        assert lora("eval", tmp_path / "adapter", "--data", data) == 0
        scores = dict(line.split() for line in capsys.readouterr().out.splitlines())
        words = transformers.AutoTokenizer.from_pretrained(base)
        prompt = words("a talk")["input_ids"]
        ids = [*words("a talk of two")["input_ids"], words.eos_token_id]
        with torch.no_grad():
            z = theirs(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.nn.functional.cross_entropy(z, torch.tensor(ids[len(prompt) :]))
        assert float(scores["loss"]) == pytest.approx(float(wanted), abs=1e-4)

    def test_its_tokenizer_comes_before_the_bases(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", "llama")
        save_adapter(base, tmp_path / "adapter")
        assert reopen(tmp_path / "adapter").config.template == "none"
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        tokenizer.save_pretrained(tmp_path / "adapter")
        found = reopen(tmp_path / "adapter")
        assert found.config.template == "auto"
        assert found.tokenizer.chat_template == tokenizer.chat_template
        assert found.config.max_length == 64

    def test_our_own_keeps_the_names_of_its_classes(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Out of a run whose folder is gone, and within one."""
        run = train(save_base(tmp_path / "base", "distilbert"), tmp_path)
        wanted = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
        shutil.copytree(run / "adapter", tmp_path / "alone")
        assert open_source(tmp_path / "alone").config.labels == ("bad", "good")
        capsys.readouterr()
        for folder in (tmp_path / "alone", run / "adapter"):
            assert lora("predict", folder, "--text", wanted["text"]) == 0
            out, err = capsys.readouterr()
            assert json.loads(out)["prediction"] == wanted["prediction"]
            assert json.loads(out)["scores"] == pytest.approx(wanted["scores"], abs=1e-3)
            assert "not verifiable" not in err

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"base_model_name_or_path": None}, "does not name its base. Pass --base"),
            ({"base_model_name_or_path": "/gone/base"}, "base /gone/base does not exist any more"),
            (
                {"task_type": "TOKEN_CLS"},
                "'TOKEN_CLS' is not supported. Set it to one of SEQ_CLS",
            ),
            ({"task_type": 5}, "task_type 5 is not supported. Set it to one of SEQ_CLS"),
            ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ],
    )
    def test_what_it_does_not_state_is_named(
        self, settings: dict[str, Any], says: str, tmp_path: Path
    ) -> None:
        base = save_base(tmp_path / "base", "llama")
        save_adapter(base, tmp_path / "adapter")
        edit(tmp_path / "adapter", **settings)
        with pytest.raises(LoraError, match=says):
            open_source(tmp_path / "adapter")

    def test_a_task_type_that_is_not_stated_is_the_bases(self, tmp_path: Path) -> None:
        base = save_base(tmp_path / "base", "llama")
        save_adapter(base, tmp_path / "adapter")
        edit(tmp_path / "adapter", task_type=None, auto_mapping=None)
        assert open_source(tmp_path / "adapter").config.task == "text"

    def test_a_head_that_nobody_brings_is_refused(self, tmp_path: Path) -> None:
        """PEFT labels by random weights there, and warns at most."""
        base = save_base(tmp_path / "base", "distilbert")
        save_adapter(base, tmp_path / "adapter", task_type=None)
        build("distilbert").distilbert.save_pretrained(base)
        edit(tmp_path / "adapter", task_type="SEQ_CLS")
        with pytest.raises(LoraError, match="no weights for classifier, and the adapter brings"):
            reopen(tmp_path / "adapter")

    def test_no_data_of_its_own(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = save_base(tmp_path / "base", "distilbert")
        save_adapter(base, tmp_path / "adapter")
        assert lora("eval", tmp_path / "adapter") == 2
        assert "so it does not name any data. Pass --data" in capsys.readouterr().err
        assert lora("eval", tmp_path / "base") == 2
        err = capsys.readouterr().err
        assert "is a plain model (config.json), not a run or an adapter" in err
        (tmp_path / "empty").mkdir()
        assert lora("eval", tmp_path / "empty") == 2
        err = capsys.readouterr().err
        assert "neither a run directory (no config.toml) nor an adapter's folder" in err


def train(base: object, folder: Path, *flags: object) -> Path:
    """A run on two words."""
    data = folder / "data"
    data.mkdir()
    for split in ("train", "dev", "test"):
        rows = [f"{'good' if n % 2 else 'bad'} {n}\t{'good' if n % 2 else 'bad'}" for n in range(8)]
        (data / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")
    run = folder / "run"
    given = ("--base", base, "--data", data, "--run-dir", run, "--r", 2, "--epochs", 2)
    assert lora("train", *given, "--batch-size", 4, *flags) == 0
    return run


@pytest.mark.parametrize(
    ("name", "saved"), [("roberta", ["classifier"]), ("llama", ["score"]), ("bert", ["classifier"])]
)
def test_the_code_in_a_runs_readme_is_peft_with_the_runs_logits(
    name: str, saved: list[str], tmp_path: Path
) -> None:
    """A head that is new is filed as PEFT names it: RoBERTa's by one name, not by its layers'."""
    base = save_base(tmp_path / "base", name)
    build(name).base_model.save_pretrained(base)
    run = train(base, tmp_path, "--dtype", "float32", "--learning-rate", 0.1)
    settings = json.loads((run / "adapter/adapter_config.json").read_text())
    assert settings["modules_to_save"] == saved
    text = (run / "adapter/README.md").read_text()
    (code,) = (line.strip() for line in text.splitlines() if "AutoPeftModel" in line)
    theirs = eval(code.replace("this folder", str(run / "adapter"))).eval()
    ours = reopen(run)
    texts = ["good", "bad 3", "it is what it is"]
    given = ours.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = ours.model(**given).logits
        torch.testing.assert_close(theirs(**given).logits, found)
    assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_training_goes_on_from_an_adapter_on_the_base_that_it_states(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", "distilbert")
    save_adapter(base, tmp_path / "adapter", r=2)
    from lora.finetune.config import parse_run

    config = parse_run(["--adapter", str(tmp_path / "adapter")])
    assert config.base == str(base)
    other = parse_run(["--adapter", str(tmp_path / "adapter"), "--base", "elsewhere"])
    assert other.base == "elsewhere"


class TestABaseThatMoved:
    def test_every_verb_says_so_and_takes_its_new_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        save_base(tmp_path / "base", "distilbert")
        run = train("base", tmp_path)  # by a relative path
        settings = json.loads((run / "adapter/adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tmp_path / "base")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        capsys.readouterr()
        assert lora("eval", run) == 0  # from anywhere
        scores = capsys.readouterr().out
        (tmp_path / "base").rename(tmp_path / "moved")
        verbs: dict[str, tuple[object, ...]] = {
            "eval": (run,),
            "predict": (run, "--text", "good"),
            "merge": (run, "--output", tmp_path / "merged"),
        }
        for verb, given in verbs.items():
            assert lora(verb, *given) == 2
            err = " ".join(capsys.readouterr().err.split())
            assert f"its base {tmp_path / 'base'} does not exist any more" in err
            assert "--base FOLDER" in err
            assert lora(verb, *given, "--base", "../moved") == 0
            out = capsys.readouterr().out
            assert verb != "eval" or out == scores
        assert (tmp_path / "merged/model.safetensors").is_file()

    def test_another_base_is_refused_by_the_fingerprint(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train(save_base(tmp_path / "base", "distilbert"), tmp_path)
        other = save_base(tmp_path / "other", "distilbert")
        torch.manual_seed(5)
        ENCODERS["distilbert"][0](ENCODERS["distilbert"][1]()).save_pretrained(other)
        assert lora("eval", run, "--base", other) == 2
        err = capsys.readouterr().err
        assert "the adapter was trained on another base: fingerprint" in err
        assert str(tmp_path / "base") in err

    def test_a_talk_takes_it_too(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        base = save_base(tmp_path / "base", "llama")
        save_adapter(base, tmp_path / "adapter")
        base.rename(tmp_path / "moved")
        given = ("generate", tmp_path / "adapter", "--prompt", "a", "--max-new-tokens", 3)
        assert lora(*given) == 2
        assert "does not exist any more" in capsys.readouterr().err
        assert lora(*given, "--base", tmp_path / "moved") == 0


class TestARunIsResumedOnIt:
    @pytest.fixture
    def cut(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, bytes]:
        """A run that was cut off after its second step, whose base has moved since, and the
        adapter that it comes to."""
        save_base(tmp_path / "base", "distilbert")
        whole = train(tmp_path / "base", tmp_path, "--save-steps", 1, "--keep-last", 9)
        wanted = (whole / "adapter/adapter_model.safetensors").read_bytes()
        for step in state.steps(whole / "checkpoints")[2:]:
            shutil.rmtree(state.checkpoint_folder(whole / "checkpoints", step))
        shutil.rmtree(whole / "adapter")
        for name in ("summary.json", "predictions.jsonl"):
            (whole / name).unlink()
        (tmp_path / "base").rename(tmp_path / "moved")
        return whole, wanted

    def test_bit_for_bit(
        self, cut: tuple[Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, wanted = cut
        assert lora("train", "--resume", run) == 2
        assert "does not exist any more. Pass its new path: --base" in capsys.readouterr().err
        assert lora("train", "--resume", run, "--base", tmp_path / "moved") == 0
        assert (run / "adapter/adapter_model.safetensors").read_bytes() == wanted
        summary = json.loads((run / "summary.json").read_text())
        assert summary["base"] == str(tmp_path / "moved")
        assert lora("train", "--resume", run, "--epochs", 3) == 2

    def test_not_on_another(
        self, cut: tuple[Path, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run, _ = cut
        torch.manual_seed(5)
        make, config = ENCODERS["distilbert"]
        make(config()).save_pretrained(tmp_path / "moved")
        assert lora("train", "--resume", run, "--base", tmp_path / "moved") == 2
        assert "is of another base" in capsys.readouterr().err

    def test_not_before_its_first_checkpoint(self, cut: tuple[Path, bytes], tmp_path: Path) -> None:
        run, _ = cut
        shutil.rmtree(run / "checkpoints")
        from lora.finetune.run_folder import resumable

        with pytest.raises(RunError, match="no checkpoint yet, so it cannot be checked"):
            resumable(run, str(tmp_path / "moved"))


def test_a_runs_adapter_is_known_from_inside_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "config.toml").write_text("")
    monkeypatch.chdir(tmp_path / "run" / "adapter")
    whole = tmp_path / "run"
    for folder in (whole, whole / "adapter", Path()):
        found = run_around(folder)
        assert found is not None
        assert found.resolve() == whole.resolve()
    assert run_around(tmp_path) is None
