"""No door lets through anything but LoraError: 100,000 damaged files over all readers.

Each input is a function of its reader and its number, so that a failure comes back alone:
`attempt(READERS["load"](folder), "load", 4711)`. What is read is used as the verbs use it. Time and
memory are bounded: an input that takes SECONDS of processor time, or ROOM bytes, is a failure too.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import damage
import pytest
import safetensors.torch
import tomli_w
import torch
from conftest import save_distilbert
from torch import Tensor, nn

import lora
from lora import nf4
from lora.adapter_config import method_and_config
from lora.errors import LoraError
from lora.finetune import config, plots, record, state
from lora.finetune.comparison import analysis, runs, tables
from lora.finetune.data import encoding, templates, tokens
from lora.finetune.data.conversations import from_row, read_prompts
from lora.finetune.data.corpus import Columns, Example, read_predictions, unlabelled
from lora.finetune.export import export
from lora.finetune.inputs import read_corpus
from lora.finetune.models import load_base, load_skeleton
from lora.finetune.run_folder import config_of
from lora.finetune.source import open_source
from lora.finetune.verbs import ExportConfig
from lora.interop.loralib import ConvertConfig, convert
from lora.interop.pretrained import base_config, skeleton_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory")
resource = pytest.importorskip("resource", reason="Windows has no limits of memory and time")
SECONDS = 60
ROOM = 4 << 30

Read = Callable[[random.Random], object]
Make = Callable[[Path], Read]
READERS: dict[str, Make] = {}
COUNTS: dict[str, int] = {}


def reader(count: int) -> Callable[[Make], Make]:
    """Register what makes a reader in a folder, and how many inputs it is given."""

    def add(make: Make) -> Make:
        READERS[make.__name__], COUNTS[make.__name__] = make, count
        return make

    return add


class TooMuchError(BaseException):
    """An input took more time than it may; no `except Exception` may keep it."""


@contextmanager
def bounded() -> Iterator[None]:
    """Inside, the process may take ROOM more bytes, and each input SECONDS of processor time."""

    def stop(number: int, frame: Any) -> None:
        raise TooMuchError(f"more than {SECONDS} seconds")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(read: Read, name: str, number: int) -> str:
    """Read one damaged input: "read", "refused", or the traceback of anything else."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read(random.Random(f"{name} {number}"))
    except LoraError:
        return "refused"
    except (Exception, TooMuchError):
        return traceback.format_exc()
    return "read"


def failures(name: str, folder: Path, count: int) -> tuple[Counter[str], dict[str, str]]:
    """How many inputs were read and refused, and one traceback of each place that failed."""
    outcomes: Counter[str] = Counter()
    failed: dict[str, str] = {}
    read = READERS[name](folder)
    with bounded(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            outcome = attempt(read, name, number)
            if outcome in ("read", "refused"):
                outcomes[outcome] += 1
            else:
                outcomes["failed"] += 1
                last = "".join(outcome.splitlines(keepends=True)[-4:])
                failed.setdefault(last, f"{name} {number}:\n{outcome}")
    return outcomes, failed


class Tiny(nn.Module):
    """An embedding, two blocks of two layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(4, 4), "up": nn.Linear(4, 6)}) for _ in range(2)
        )
        self.head = nn.Linear(4, 2)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 2, "target_modules": ["q_proj", "up"], "modules_to_save": ["head"]}),
    "patterns": ("lora", {"r": 2, "target_modules": r".*\.(q_proj|up)", "bias": "all",
                          "rank_pattern": {"up": 1}, "alpha_pattern": {"0.q_proj": 3}}),
    "blocks": ("lora", {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1],
                        "layers_pattern": ["layers"], "use_rslora": True}),
    "ids": ("lora", {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}),
    "rows": ("lora", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 3]}),
    "dora": ("dora", {"r": 2, "target_modules": ["q_proj"]}),
    "vera": ("vera", {"r": 2, "target_modules": ["q_proj"]}),
    "ia3": ("ia3", {"target_modules": ["q_proj", "up"], "feedforward_modules": ["up"]}),
    "adalora": ("adalora", {"init_r": 3, "target_r": 2, "target_modules": ["q_proj"]}),
    "hira": ("hira", {"r": 2, "target_modules": ["q_proj"]}),
    "bitfit": ("bitfit", {}),
}  # fmt: skip
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def adapters(folder: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """The config and the tensors of an adapter of each kind; half without our mark, as PEFT's."""
    found = {}
    for number, (name, (method, settings)) in enumerate(ADAPTERS.items()):
        model = Tiny()
        held = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        lora.inject(model, lora.METHODS[method].Config(**held))
        saved = lora.save(model, folder / name)
        stated = json.loads((saved / ADAPTER[0]).read_text())
        payload = (saved / ADAPTER[1]).read_bytes()
        if number % 2 == 0:
            payload = safetensors.torch.save(safetensors.torch.load(payload), {"format": "pt"})
        found[name] = stated, payload
    return found


def write_damaged(folder: Path, adapter: tuple[dict[str, Any], bytes], draw: random.Random) -> None:
    """An adapter's files, the config damaged, the tensors, or both."""
    stated, payload = adapter
    kind = draw.randrange(5)
    text = json.dumps(stated).encode() if kind == 0 else damage.of_document(stated, draw)
    payload = damage.of_safetensors(payload, draw) if kind < 2 else payload
    (folder / ADAPTER[0]).write_bytes(text)
    (folder / ADAPTER[1]).write_bytes(payload)


@reader(24_000)
def load(folder: Path) -> Read:
    known, model = adapters(folder), Tiny()
    names = sorted(known)

    def read(draw: random.Random) -> None:
        write_damaged(folder, known[draw.choice(names)], draw)
        report = lora.load(model, folder)
        str(report)
        lora.eject(model)

    return read


@reader(9_000)
def settings(folder: Path) -> Read:
    known = adapters(folder)
    names = sorted(known)

    def read(draw: random.Random) -> None:
        write_damaged(folder, known[draw.choice(names)], draw)
        method_and_config(folder)

    return read


def llama() -> Any:
    import transformers

    stated = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=16, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(stated)


@reader(1_500)
def exported(folder: Path) -> Read:
    pytest.importorskip("gguf")
    model = llama()
    stated = model.config.to_dict()
    lora.inject(model, lora.LoRAConfig(r=2))
    saved = lora.save(model, folder / "saved")
    adapter = json.loads((saved / ADAPTER[0]).read_text()), (saved / ADAPTER[1]).read_bytes()
    for name in ("adapter", "base"):
        (folder / name).mkdir()

    def read(draw: random.Random) -> None:
        (folder / "adapter.gguf").unlink(missing_ok=True)
        if draw.random() < 0.7:
            write_damaged(folder / "adapter", adapter, draw)
            (folder / "base" / "config.json").write_text(json.dumps(stated))
        else:
            (folder / "adapter" / ADAPTER[0]).write_text(json.dumps(adapter[0]))
            (folder / "adapter" / ADAPTER[1]).write_bytes(adapter[1])
            (folder / "base" / "config.json").write_bytes(damage.of_document(stated, draw))
        how: Any = {"adapter": folder / "adapter", "base": str(folder / "base")}
        if draw.random() < 0.5:
            export(ExportConfig(format="vllm", **how))
        else:
            export(ExportConfig(output=folder / "adapter.gguf", **how))

    return read


@reader(2_000)
def bases(folder: Path) -> Read:
    """A base's config.json, to a skeleton."""
    import transformers

    kinds = [
        llama().config.to_dict(),
        transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8).to_dict(),
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16).to_dict(),
        transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).to_dict(),
    ]

    def read(draw: random.Random) -> None:
        (folder / "config.json").write_bytes(damage.of_document(draw.choice(kinds), draw))
        task = draw.choice(("classification", "text"))
        skeleton_of(base_config(str(folder)), task)

    return read


def base_folder(folder: Path) -> Path:
    """A tiny DistilBERT."""
    return save_distilbert(folder, dim=8, n_layers=1, hidden_dim=8)


@reader(150)
def whole_bases(folder: Path) -> Read:
    """A base's folder: its weights, its tokenizer, its config."""
    whole = base_folder(folder / "whole")

    def read(draw: random.Random) -> None:
        shutil.rmtree(folder / "base", ignore_errors=True)
        shutil.copytree(whole, folder / "base")
        name = draw.choice(("config.json", "tokenizer_config.json", "model.safetensors"))
        path = folder / "base" / name
        if name.endswith(".json"):
            path.write_bytes(damage.of_document(json.loads(path.read_text()), draw))
        else:
            path.write_bytes(damage.of_safetensors(path.read_bytes(), draw))
        if draw.random() < 0.5:
            load_base(str(folder / "base"), 2, "classification", 0)
        else:
            load_skeleton(str(folder / "base"), 2, "classification")

    return read


@reader(12_000)
def bitsandbytes(folder: Path) -> Read:
    functional = pytest.importorskip("bitsandbytes.functional")
    known = []
    for double in (False, True):
        codes, held = functional.quantize_4bit(
            torch.randn(16, 32), quant_type="nf4", compress_statistics=double, blocksize=64
        )
        packed = {f"weight.{k}": t.clone() for k, t in held.as_dict(packed=True).items()}
        known.append({"weight": codes, **packed})
    stated = next(key for key in known[0] if "quant_state" in key)

    def read(draw: random.Random) -> Tensor:
        tensors = draw.choice(known)
        if draw.random() < 0.6:
            said = json.loads(bytes(tensors[stated].tolist()))
            payload = bytearray(damage.of_document(said, draw)) or bytearray(b" ")
            tensors = tensors | {stated: torch.frombuffer(payload, dtype=torch.uint8)}
        else:
            tensors = damage.of_tensors(tensors, draw)
        return nf4.dequantize(nf4.from_bitsandbytes(tensors, "layer"), torch.float32)

    return read


@reader(6_000)
def checkpoints_of_loralib(folder: Path) -> Read:
    known: dict[str, Tensor] = {}
    for name in ("h.0.attn.c_attn", "h.0.mlp.c_fc", "wte"):
        known |= {f"{name}.lora_A": torch.randn(2, 4), f"{name}.lora_B": torch.randn(6, 2)}
    known |= {"h.0.mlp.c_fc.bias": torch.randn(6)}
    path = folder / "a.pt"

    def read(draw: random.Random) -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        content: Any = damage.of_tensors(known, draw) if draw.random() < 0.6 else dict(known)
        if draw.random() < 0.1:
            content = {"model": content, "epoch": damage.extreme(draw)}
        elif draw.random() < 0.1:
            content[draw.choice(damage.EXTREMES[:30])] = damage.extreme(draw)
        torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.5)
        if draw.random() < 0.5:
            path.write_bytes(damage.of_bytes(path.read_bytes(), draw))
        flags: list[dict[str, Any]] = [
            {}, {"embeddings": ("wte",)}, {"merged": ("c_attn=1,0,1",)}, {"prefix": "h"},
        ]  # fmt: skip
        convert(
            ConvertConfig(
                checkpoint=path, lora_alpha=8.0, output=folder / "out",
                dry_run=draw.random() < 0.8, **draw.choice(flags),
            )
        )  # fmt: skip

    return read


STEP = {
    "kind": "step", "step": 1, "steps": 2, "epoch": 1, "loss": 0.5, "learning_rate": 1e-3,
    "gradient_norm": 1.0, "examples": 4, "targets": 4, "tokens": 8, "padding": 0.0, "seconds": 0.1,
    "epoch_ends": True,
}  # fmt: skip
EVALUATION = {
    "step": 1, "epoch": 1.0, "loss": 0.5, "first_loss": 1.0, "seconds": 0.1, "padding": 0.0,
    "dev_loss": 0.6, "dev": {"accuracy": 0.7, "f1": 0.6},
}  # fmt: skip
SUMMARY = {
    "method": "lora", "task": "classification", "base": "demo", "data": "demo", "seed": 0,
    "note": "", "trainable": 10, "adapter_parameters": 8, "parameters": 100, "learning_rate": 1e-3,
    "evaluations": [EVALUATION], "step": 1, "split": "test", "rows": 5, "loss": 0.5,
    "metrics": {"accuracy": 0.8}, "train_seconds": 1.0, "seconds": 2.0, "peak_bytes": 10,
}  # fmt: skip
METRICS = [STEP, {"kind": "evaluation", **EVALUATION}, {**STEP, "step": 2}]


@reader(12_000)
def documents(folder: Path) -> Read:
    """What a run's directory says, each file as its readers use it."""
    answers = {
        "classification": [{"text": "a", "pair": "b", "label": "x", "prediction": "y"}],
        "text": [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}],
    }

    def read(draw: random.Random) -> None:
        kind = draw.randrange(5)
        if kind == 0:
            (folder / "summary.json").write_bytes(damage.of_document(SUMMARY, draw))
            tables.markdown(
                tables.rows(analysis.analysis_of([runs.Run(folder, record.summary_of(folder))]))
            )
        elif kind == 1:
            around = {"data": "a", "tokens": "b", "note": "", "torch": "2", "cores": 2}
            (folder / "environment.json").write_bytes(damage.of_document(around, draw))
            record.environment_of(folder)
        elif kind == 2:
            (folder / "metrics.jsonl").write_bytes(damage.of_lines(METRICS, draw))
            plots.read_metrics(folder)
        elif kind == 3:
            task = draw.choice(("classification", "text"))
            lines = damage.of_lines(answers[task], draw)
            (folder / "predictions.jsonl").write_bytes(lines)
            for row in record.answers_of(folder, task, 8):
                list(from_row(row, "a place", answered=False)) if task == "text" else row["text"]
        else:
            lines = damage.of_lines(answers["classification"] * 3, draw)
            (folder / "predictions.jsonl").write_bytes(lines)
            read_predictions(folder / "predictions.jsonl")

    return read


@reader(150)
def curves(folder: Path) -> Read:
    runs = [folder / "one", folder / "two"]
    for run in runs:
        run.mkdir()

    def read(draw: random.Random) -> None:
        for run in runs:
            rows = list(METRICS)
            if draw.random() < 0.7:
                at = draw.randrange(len(rows))
                rows[at] = damage.of_json(rows[at], draw)
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plots.draw_curves(runs, folder / "out")

    return read


@reader(2_500)
def training_states(folder: Path) -> Read:
    model = Tiny()
    lora.inject(model, lora.METHODS["adalora"].Config(target_modules=("q_proj",)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(p.sum() for p in trained).backward()  # type: ignore[union-attr]
    optimizer.step()
    training = state.Training(model, optimizer, 1e-3, step=1)  # type: ignore[call-arg]
    path = state.save_training(training, folder / "checkpoints", b"", record.NOTHING)
    names = ("training.json", "training.safetensors", "manifest.json")
    whole = {name: (path / name).read_bytes() for name in names}

    def read(draw: random.Random) -> None:
        name = draw.choice(names)
        damaged = {
            **whole,
            name: damage.of_safetensors(whole[name], draw)
            if name.endswith("tensors")
            else damage.of_document(json.loads(whole[name]), draw),
        }
        for file, payload in damaged.items():
            (path / file).write_bytes(payload)
        state.find(folder / "checkpoints")
        state.restore_training(training, path)

    return read


RUN = {
    "base": "demo", "labels": ["a", "b"], "task": "classification", "learning_rate": 1e-3,
    "max_length": 128, "dtype": "float32",
}  # fmt: skip


@reader(6_000)
def run_configs(folder: Path) -> Read:
    made = config.from_table(RUN, "lora")
    table = config.to_table(made)

    def read(draw: random.Random) -> None:
        damaged = damage.of_json(table, draw)
        try:
            text = tomli_w.dumps(damaged)
        except (TypeError, AttributeError, ValueError):  # TOML has no such value
            text = tomli_w.dumps(table)
        payload = text.encode("utf-8", "surrogatepass")
        payload = payload if draw.random() < 0.6 else damage.of_bytes(payload, draw)
        (folder / "config.toml").write_bytes(payload)
        held = config_of(folder)
        assert config.from_table(config.to_table(held), held.method) == held

    return read


@reader(120)
def recipes(folder: Path) -> Read:
    table = {"base": "demo", "method": "lora", "r": 4, "epochs": 2, "target_modules": ["q_lin"]}

    def read(draw: random.Random) -> None:
        try:
            text = tomli_w.dumps(damage.of_json(table, draw))
        except (TypeError, AttributeError, ValueError):
            text = "r = "
        (folder / "a.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
        config.parse_run(["--config", str(folder / "a.toml")])

    return read


@reader(1_000)
def sources(folder: Path) -> Read:
    """A run or an adapter that a verb is given."""
    known = adapters(folder)
    names = sorted(known)
    made = config.from_table(RUN, "lora")
    text = tomli_w.dumps(config.to_table(made)).encode()
    (folder / "run" / "adapter").mkdir(parents=True)
    (folder / "alone").mkdir()

    def read(draw: random.Random) -> None:
        stated, payload = known[draw.choice(names)]
        adapter = {**stated, "base_model_name_or_path": "demo", "task_type": "SEQ_CLS"}, payload
        if draw.random() < 0.5:
            (folder / "run" / "config.toml").write_bytes(damage.of_bytes(text, draw))
            write_damaged(folder / "run" / "adapter", adapter, draw)
            open_source(folder / "run")
        else:
            write_damaged(folder / "alone", adapter, draw)
            open_source(folder / "alone")

    return read


ROWS = [
    {"text": "a good film", "label": "good", "id": 1},
    {"text": "a bad one", "label": "bad", "id": 2},
    {"text": "another, \"quoted\" one\u2028", "label": "good", "id": 3},
    {"text": "a last one", "label": "bad", "id": 4, "split": "dev"},
    {"text": "1.5", "label": "good", "id": 5},
]  # fmt: skip
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a", "weight": 1}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"instruction": "i", "input": "x", "output": "o", "system": "s"},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [
        {"role": "assistant", "content": "a"}], "references": ["a", "b"]},
    {"text": "plain text"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None,
      "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
      {"role": "tool", "content": "1"}, {"role": "assistant", "content": "a"}], "tools": [
        {"type": "function", "function": {"name": "f", "parameters": {}}}]},
]  # fmt: skip


def table_of(rows: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Rows as cells between tabs or commas, damaged."""
    mark = draw.choice(("\t", ",", ";"))
    cells = [["text", "label"], *([str(row["text"]), str(row["label"])] for row in rows)]
    if draw.random() < 0.5:
        at = draw.randrange(len(cells))
        cells[at][draw.randrange(2)] = str(damage.extreme(draw))
    text = "\n".join(mark.join(row) for row in cells) + "\n"
    payload = text.encode("utf-8", "surrogatepass")
    return payload if draw.random() < 0.4 else damage.of_bytes(payload, draw)


def use(path: Path, draw: random.Random) -> None:
    """Read a data set as one of the verbs does."""
    kind = draw.randrange(4)
    if kind == 0:
        read_prompts(str(path))
    elif kind == 1:
        unlabelled(str(path), Columns(draw.choice((None, "text", "0", "")), None, None))
    else:
        task = draw.choice(("auto", "classification", "regression", "text"))
        skip = draw.choice((0, 0, 2))
        table = {"data": [str(path)], "base": "demo", "task": task, "skip_bad_lines": skip}
        if task == "text":
            table["base"] = "demo-lm-tiny"
        elif draw.random() < 0.3:
            table |= {"text_column": draw.choice(("text", "0", "1")), "label_column": "label"}
        corpus = read_corpus(config.from_table(table, "lora"))
        corpus.digest()


@reader(12_000)
def rows(folder: Path) -> Read:
    def read(draw: random.Random) -> None:
        end = draw.choice((".tsv", ".csv", ".jsonl", ".json", ".txt"))
        path = folder / f"rows{end}"
        known: list[Any] = draw.choice((ROWS, TALKS, [draw.choice(TALKS)] * 4))
        if end in (".tsv", ".csv"):
            payload = table_of(ROWS, draw)
        elif end == ".jsonl":
            payload = damage.of_lines(known, draw)
        elif end == ".json":
            held: Any = known if draw.random() < 0.5 else {"data": known}
            payload = damage.of_document(held, draw)
        else:
            payload = damage.of_bytes(b"name[a], food[b]||a serves b\n" * 4, draw)
        path.write_bytes(payload)
        use(path, draw)

    return read


@reader(1_200)
def parquet(folder: Path) -> Read:
    arrow, parquet_ = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = folder / "rows.parquet"
    columns: list[Any] = [
        arrow.array([b"\xff", b"a", None, b"b", b"c"]),
        arrow.array([2**50, 0, -1, None, 5], arrow.timestamp("s")),
        arrow.array([1, 0, -1, None, 5], arrow.timestamp("ms", tz="Nowhere/City")),
        arrow.array([10**17, 0, 1, None, 5], arrow.date64()),
        arrow.array([1.5, float("nan"), float("inf"), None, 0.0]),
        arrow.array([["a"], [], None, ["b", "c"], [None]]),
        arrow.array([{"a": 1}, {"a": None}, None, {"a": 3}, {"a": 4}]),
        arrow.array(
            [[("k", 1)], [], None, [("k", 2), ("k", 3)], []], arrow.map_("string", "int64")
        ),
        arrow.array(["train", "dev", "x", None, ""]),
        arrow.array([True, False, None, True, False]),
        arrow.array([str(row["label"]) for row in ROWS]),
        arrow.array([str(row["text"]) for row in ROWS]),
        arrow.array(
            [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * 5
        ),
        arrow.nulls(5),
    ]

    def read(draw: random.Random) -> None:
        names = ["text", "label", "split", "messages", "", "a", "prompt", "completion"]
        chosen = draw.sample(names, draw.randrange(1, 4))
        held = dict(zip(chosen, draw.choices(columns, k=len(chosen))))
        if draw.random() < 0.5:
            held |= {"text": columns[-2], "label": columns[-3]}
        table = arrow.table(list(held.values()), names=list(held))
        parquet_.write_table(table, path)
        if draw.random() < 0.5:
            path.write_bytes(damage.of_bytes(path.read_bytes(), draw))
        use(path, draw)

    return read


@reader(12_000)
def talks(folder: Path) -> Read:
    def read(draw: random.Random) -> None:
        row = damage.of_json(draw.choice(TALKS), draw)
        if isinstance(row, dict):
            for one in from_row(row, "a place", answered=draw.random() < 0.5):
                one.messages  # noqa: B018

    return read


@reader(400)
def chat_templates(folder: Path) -> Read:
    base = load_base("demo-lm-tiny", 1, "text", 0)
    known = base.tokenizer.chat_template.encode()
    talk = [one for row in TALKS[:4] for one in from_row(row, "a place")]
    pieces = (b"{% for i in range(10**9) %}x{% endfor %}", b"{{ '%999999999d' % 1 }}", b"{{ 1/0 }}",
              b"{{ raise_exception('no') }}", b"{{ messages[99].content }}", b"{{ [1]*10**9 }}",
              b"{% include 'x' %}", b"{{ messages.__class__ }}", b"{% generation %}",
              b"{{")  # fmt: skip

    def read(draw: random.Random) -> None:
        payload = damage.of_bytes(known, draw)
        if draw.random() < 0.05:
            payload += draw.choice(pieces)
        (folder / "a.jinja").write_bytes(payload)
        found = templates.template_of(base.tokenizer, str(folder / "a.jinja"))
        encoding.encode(found, talk, 32)

    return read


@reader(100)
def cached_tokens(folder: Path) -> Read:
    base = load_base("demo", 2, "classification", 0)
    examples = [Example("a good film", None, "a"), Example("bad", None, "b")]
    patch = pytest.MonkeyPatch()
    patch.setenv("LORA_CACHE", str(folder))
    given: Any = (base.tokenizer, examples, [0.0, 1.0], "classification", 16)
    whole = tokens.tokenize(*given)
    (path,) = folder.glob("*.safetensors")
    payload = path.read_bytes()
    patch.undo()

    def read(draw: random.Random) -> None:
        path.write_bytes(damage.of_safetensors(payload, draw))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LORA_CACHE", str(folder))
            found = tokens.tokenize(*given)
        assert found.lengths == whole.lengths
        assert all(torch.equal(t, found.fields[name]) for name, t in whole.fields.items())

    return read


def test_there_are_a_hundred_thousand_inputs() -> None:
    assert sum(COUNTS.values()) >= 100_000


@pytest.mark.parametrize("name", READERS)
def test_a_few_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    outcomes, failed = failures(name, tmp_path, max(3, COUNTS[name] // 1000))
    assert not failed, "\n".join(failed.values())
    assert outcomes.total() == max(3, COUNTS[name] // 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_damaged_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    outcomes, failed = failures(name, tmp_path, COUNTS[name])
    print(f"{name}: {dict(outcomes)}")
    assert not failed, f"{outcomes}\n" + "\n".join(list(failed.values())[:20])
    # A damaged cache is refused to nobody: the texts are tokenised anew, to the same ids.
    assert outcomes["refused"] or name == "cached_tokens"
    assert outcomes["read"]
