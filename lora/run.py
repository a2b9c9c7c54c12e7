"""One training run, from its configuration to its directory, and back from there to a model.

config.toml        the configuration as resolved: reads back with `lora train --config`
environment.json   versions, machine, command
metrics.jsonl      one line per step and per epoch, as they happen
adapter/           the adapter after the last whole epoch, in PEFT's format
predictions.jsonl  the answers on the held-out split
summary.json       the result; there only when the run is complete
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shlex
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import rich
import tomli_w
import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from lora import __version__, nf4
from lora.adapter import Adapter, PartialConfig, is_number
from lora.checkpoint import json_object, load, save, write_together, write_whole
from lora.config import RunConfig, from_table, method_named, read_toml, to_table
from lora.data import (
    Columns,
    Corpus,
    Example,
    read,
    read_split,
    take,
    unlabelled,
)
from lora.errors import ConfigError, DataError, ModelError, RunError, TrainingError
from lora.evaluate import Evaluation, answers, evaluate, predict
from lora.injection import Report, check_steps, eject, inject, merge
from lora.models import Base, hold, load_base, packable, pick_dtype
from lora.tokens import Encoded, batches, collate, encode
from lora.train import Step, check_room, fit, steps_per_epoch


@dataclass(frozen=True)
class Trained:
    """A model and all that its answers need."""

    config: RunConfig[Any]
    model: Any
    tokenizer: Any
    device: torch.device


def run(config: RunConfig[Any]) -> dict[str, Any]:
    """Train, evaluate, record. Returns the summary. Raises LoraError, no directory left behind
    unless training had begun."""
    started = time.perf_counter()
    given = config
    directory = config.run_dir or default_directory(config)
    check_free(directory)
    with progress_bar() as progress, PeakMemory() as memory:
        with reading(progress) as packed:
            corpus = read_corpus(config)
            base = _base(config, corpus.labels, corpus.task, packed)
            device = pick_device()
            config, said = resolve(config, corpus, base, device)
            base.model.to(device)
            splits = encode_splits(config, corpus, base.tokenizer)
            shown = calibration(config, splits["train"], device)
            report = _injected(config, base, shown)
            per_epoch = steps_per_epoch(splits["train"], config.batch_size)
            check_steps(base.model, config.epochs * per_epoch)
            check_room(base.model)
            hold(base.model, config.dtype)
            if config.compile:
                base.model.compile(dynamic=True)
        for line in filter(None, (config.note, corpus.note, said)):
            progress.console.print(f"note: {line}", soft_wrap=True, markup=False)
        progress.console.print(str(report), markup=False, highlight=False, soft_wrap=True)

        create(directory, config, corpus)
        with recorder(directory) as metrics:
            epochs, final = _train(config, base, corpus, splits, directory, metrics, progress)
        memory.sample()
        bad = _diverged(epochs)
        if bad:
            progress.console.print(f"note: {bad}", soft_wrap=True)
    name, held_out = corpus.held_out
    write_lines(directory / "predictions.jsonl", rows_of(corpus, held_out, final.logits))
    summary = {
        "method": config.method,
        "task": corpus.task,
        "base": given.base,
        "data": given.data,
        "seed": config.seed,
        "note": " ".join(filter(None, (config.note, corpus.note, bad))),
        "trainable": report.trainable,
        "adapter_parameters": report.adapter_parameters,
        "parameters": report.total,
        "learning_rate": config.learning_rate,
        "epochs": epochs,
        "split": name,
        "rows": len(held_out),
        "loss": final.loss,
        "metrics": final.metrics,
        "train_seconds": sum(epoch["seconds"] for epoch in epochs),
        "seconds": time.perf_counter() - started,
        "peak_bytes": memory.peak(device),
    }
    _write(directory / "summary.json", json.dumps(summary, indent=2, allow_nan=False).encode())
    return summary | {"run_dir": str(directory)}


def _train(
    config: RunConfig[Any],
    base: Base,
    corpus: Corpus,
    splits: dict[str, Encoded],
    directory: Path,
    metrics: TextIO,
    progress: Progress,
) -> tuple[list[dict[str, Any]], Evaluation]:
    """The epochs: train, evaluate on dev, save; then the held-out split.

    Returns a record of each epoch, and the last evaluation.
    """
    epochs: list[dict[str, Any]] = []
    steps: list[Step] = []
    good, where = "none: no epoch was finished", ""
    bar = progress.add_task("training", total=None)
    try:
        assert config.learning_rate is not None
        for step in fit(
            base.model,
            splits["train"],
            corpus.task,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            warmup=config.warmup,
            max_grad_norm=config.max_grad_norm,
            dtype=config.dtype,
            seed=config.seed,
        ):
            steps.append(step)
            said = f"epoch {step.epoch}/{config.epochs} loss {step.loss:.3f}"
            progress.update(bar, total=step.steps, completed=step.step, description=said)
            record(metrics, {"kind": "step", **asdict(step)})
            if not step.epoch_ends:
                continue
            where = (
                f"evaluating after step {step.step} (epoch {step.epoch},"
                f" learning rate {step.learning_rate:.2e}): "
            )
            dev = evaluate(
                base.model, corpus, splits["dev"], corpus.dev, 64, config.dtype, progress
            )
            where = ""
            seen = sum(s.examples for s in steps)
            tokens = sum(s.tokens for s in steps)
            padded = sum(s.tokens / (1 - s.padding) for s in steps)
            epochs.append(
                {
                    "epoch": step.epoch,
                    "loss": sum(s.loss * s.examples for s in steps) / seen,
                    "first_loss": steps[0].loss,
                    "seconds": sum(s.seconds for s in steps),
                    "padding": 1 - tokens / padded,
                    "dev_loss": dev.loss,
                    "dev": dev.metrics,
                }
            )
            record(metrics, {"kind": "epoch", **epochs[-1]})
            save(base.model, directory / "adapter")
            good = f"epoch {step.epoch}, in {directory / 'adapter'}"
            scores = "  ".join(f"{k} {v:.4f}" for k, v in dev.metrics.items())
            progress.console.print(
                f"epoch {step.epoch}/{config.epochs}  loss {epochs[-1]['loss']:.4f}"
                f"  dev loss {dev.loss:.4f}  {scores}  {epochs[-1]['seconds']:.1f} s",
                highlight=False,
                soft_wrap=True,
            )
            steps.clear()
        progress.remove_task(bar)
        name, held_out = corpus.held_out
        where = f"evaluating on {name} after the last step: "
        return epochs, evaluate(
            base.model, corpus, splits[name], held_out, 64, config.dtype, progress
        )
    except TrainingError as error:
        raise TrainingError(
            f"{where}{error} Last good state: {good}."
            f" Run again with a lower --learning-rate than {config.learning_rate:g}."
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Last good state: {good}.") from None


def _diverged(epochs: Sequence[Mapping[str, Any]]) -> str:
    """What to say of a training that ended far above where it began, "" of any other."""
    began, ended = epochs[0]["first_loss"], epochs[-1]["loss"]
    if ended <= 2 * began:
        return ""
    return (
        f"the loss began at {began:.3g} and ended at {ended:.3g}: the training diverged. Run again"
        " with a lower --learning-rate."
    )


def default_directory(config: RunConfig[Any]) -> Path:
    """runs/TIME-METHOD, a name that no earlier run has."""
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{config.method}"


def check_free(directory: Path, flag: str = "--run-dir", what: str = "run") -> None:
    """Raise RunError where a folder to make exists or could not be made; makes nothing."""
    try:
        there = os.path.lexists(directory)
    except (OSError, ValueError) as error:
        raise RunError(f"{flag} cannot be made: {error}. Pass another.") from None
    if there:
        raise RunError(
            f"{flag} {directory} exists: no {what} is written over. Pass another, or remove it."
        )
    parent = next(path for path in directory.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "not writable" if parent.is_dir() else "no folder"
        raise RunError(f"{flag} {directory} cannot be made: {parent} is {why}. Pass another.")


def create(directory: Path, config: RunConfig[Any], corpus: Corpus) -> None:
    """Make the directory, with config.toml and environment.json in it or not at all."""
    around = environment() | {"data": corpus.digest()}
    files = {
        "config.toml": tomli_w.dumps(to_table(replace(config, run_dir=None))).encode(),
        "environment.json": json.dumps(around, indent=2).encode(),
    }
    making = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    try:
        making.mkdir(parents=True)
        try:
            write_together(making, files)
            making.rename(directory)
        except BaseException:
            shutil.rmtree(making)
            raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"--run-dir {directory} cannot be made: {reason}. Pass another.") from None


def environment() -> dict[str, Any]:
    """What the result may depend on besides the configuration."""
    import transformers

    return {
        "command": shlex.join(sys.argv),
        "lora-from-scratch": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def read_corpus(config: RunConfig[Any]) -> Corpus:
    """The data set that a configuration asks for."""
    return read(config.data, asked(config), config.task, config.labels, config.limit)


def asked(config: Any) -> Columns:
    """The columns that a configuration names."""
    return Columns(config.text_column, config.pair_column, config.label_column)


def _columns(config: RunConfig[Any], other: Columns) -> Columns:
    """The columns of a file that is not the run's own: what is asked, else the run's."""
    own = asked(config)
    return Columns(other.text or own.text, other.pair or own.pair, other.label or own.label)


def _check_pairs(directory: Path, config: RunConfig[Any], examples: Sequence[Example]) -> None:
    """Raise DataError where pairs go to a model of single texts, or the other way round."""
    found = any(example.pair is not None for example in examples)
    if found != (config.pair_column is not None):
        was = "pairs" if config.pair_column else "single texts"
        raise DataError(
            f"{directory} was trained on {was}, found {'pairs' if found else 'single texts'}."
            " Pass what it was trained on: --pair for a pair's second text, and in a file"
            " --text-column and --pair-column."
        )


def resolve(
    config: RunConfig[Any], corpus: Corpus, base: Base, device: torch.device
) -> tuple[RunConfig[Any], str]:
    """The configuration with everything decided, and what to tell the user of it."""
    rate = config.learning_rate or method_named(config.method).learning_rate
    adapter, said = config.adapter, ""
    if isinstance(adapter, PartialConfig):
        named = tuple(dict.fromkeys((*adapter.modules_to_save, *base.new)))
        adapter = replace(adapter, modules_to_save=named)
        said = f"the head is new: {', '.join(base.new)} trained whole, in modules_to_save"
    paired = corpus.train[0].pair is not None
    length, special = config.max_length, base.tokenizer.num_special_tokens_to_add(paired)
    if length <= special:
        raise ConfigError(
            f"max_length must leave room beside {special} special tokens, found {length}."
            " Set --max-length."
        )
    most = getattr(base.model.config, "max_position_embeddings", None)
    if most is not None and length > most:
        raise ModelError(f"--max-length {length}: {config.base} has {most} positions. Lower it.")
    # Folders by their whole path, so that the run can be reopened from anywhere.
    base_place, data_place = (
        value if value == "demo" or not Path(value).exists() else str(Path(value).resolve())
        for value in (config.base, config.data)
    )
    resolved = replace(
        config,
        learning_rate=rate,
        task=corpus.task,
        labels=corpus.labels,
        pair_column=corpus.pair,
        adapter=adapter,
        base=base_place,
        data=data_place,
        dtype=pick_dtype(device) if config.dtype == "auto" else config.dtype,
    )
    return resolved, said if base.new else ""


def calibration(
    config: RunConfig[Any], encoded: Encoded, device: torch.device
) -> list[dict[str, Tensor]] | None:
    """The first 8 batches of the training, labels with them, where the method starts from data."""
    method = method_named(config.method)
    if not issubclass(method, Adapter) or not method.needs_batches(config.adapter):
        return None
    order = batches(encoded.lengths, config.batch_size, config.seed, 0)[:8]
    return [
        {**collate(encoded, rows, device), "labels": encoded.targets[rows].to(device)}
        for rows in order
    ]


def encode_splits(config: RunConfig[Any], corpus: Corpus, tokenizer: Any) -> dict[str, Encoded]:
    """Every split's token ids."""
    splits = {"train": corpus.train, "dev": corpus.dev, "test": corpus.test}
    return {
        name: encode(tokenizer, split, corpus.targets(split), corpus.task, config.max_length)
        for name, split in splits.items()
        if split
    }


def pick_device() -> torch.device:
    """The accelerator torch finds, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _takes_up(config: RunConfig[Any]) -> bool:
    """Whether the base is packed with the injection, whose start needs its weights as they were."""
    method = method_named(config.method)
    adapts = issubclass(method, Adapter) and method.takes_up(config.adapter)
    return adapts and config.quantize == "nf4"


def _base(
    config: RunConfig[Any],
    labels: tuple[str, ...],
    task: str,
    packed: Callable[[int, int], None] = lambda done, layers: None,
) -> Base:
    """The base as configured, before anything is put on it; `packed` is told of its packing."""
    count, quantize = len(labels) or 1, "none" if _takes_up(config) else config.quantize
    return load_base(config.base, count, task, config.seed, quantize, config.dense, packed)


def _injected(config: RunConfig[Any], base: Base, shown: Any = None) -> Report:
    """The base with the adapter put on it, and packed where that has to wait for it."""
    names = packable(base.model, config.dense) if _takes_up(config) else ()
    return inject(base.model, config.adapter, seed=config.seed, batches=shown, pack=names)


def reopen(directory: Path) -> Trained:
    """The model of a run directory: its base with its adapter on, held as it was in training."""
    trained = _reopened(directory)
    hold(trained.model, trained.config.dtype)
    return trained


def _reopened(directory: Path) -> Trained:
    """The model of a run directory, in the dtype of its base."""
    path = directory / "config.toml"
    if not path.is_file():
        raise RunError(f"{directory} is no run directory: no config.toml. Run lora train first.")
    table = read_toml(path)
    config = from_table(table, table.get("method", ""))
    if config.task == "auto" or (config.task == "classification") != bool(config.labels):
        raise RunError(f"{path} names no task with its labels: not of a run. Run lora train.")
    if not (directory / "adapter").is_dir():
        raise RunError(
            f"{directory}: the run ended before its first epoch did, and left no adapter. Run lora"
            f" train --config {path}."
        )
    base = _base(config, config.labels, config.task)
    if _takes_up(config):  # the base that training began with, packed under the start that it had
        _injected(config, base)
        eject(base.model)
    load(base.model, directory / "adapter")
    device = pick_device()
    return Trained(config, base.model.to(device).eval(), base.tokenizer, device)


def summary_of(directory: Path) -> dict[str, Any]:
    """The result of a complete run. Raises RunError where there is none, or it is damaged."""
    path = directory / "summary.json"
    if not path.is_file():
        raise RunError(f"{directory} holds no complete run: no summary.json. Run lora train.")
    kinds = {"method": str, "task": str, "metrics": dict, "epochs": list}
    try:
        found = json_object(path.read_bytes())
        odd = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
        if odd or not all(map(is_number, found["metrics"].values())):
            raise ValueError(f"{', '.join(odd) or 'metrics'} not as a run writes it")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}. Remove {directory}, run it again.") from None
    return found


def newest_runs(folder: Path = Path("runs")) -> list[Path]:
    """The newest complete run of each method under a folder."""
    found = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    newest: dict[str, Path] = {}
    for path in found:
        with suppress(RunError):  # a damaged run is no reason to hide the others
            newest[str(summary_of(path.parent)["method"])] = path.parent
    if not newest:
        raise RunError(
            f"no complete run under {folder}/. Run python scripts/train_lora_distilbert.py."
        )
    return list(newest.values())


def rows_of(
    corpus: Corpus, examples: Sequence[Example], logits: Tensor
) -> Iterator[dict[str, Any]]:
    """One record per example: its text, its label where known, the prediction and its scores."""
    scores = logits.tolist() if corpus.task == "regression" else logits.softmax(-1).tolist()
    for example, answer, row in zip(examples, answers(corpus, logits), scores, strict=True):
        known = {"pair": example.pair, "label": example.label}
        yield {
            "text": example.text,
            **{key: value for key, value in known.items() if value is not None},
            "prediction": float(answer) if corpus.task == "regression" else answer,
            **({} if corpus.task == "regression" else {"scores": [round(p, 6) for p in row]}),
        }


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write(path: Path, payload: bytes) -> None:
    try:
        write_whole(path, payload)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    reason = error.strerror or error
    return RunError(f"{path} cannot be written: {reason}. Free space, or pass another folder.")


@contextmanager
def recorder(directory: Path) -> Iterator[TextIO]:
    """metrics.jsonl, open for record()."""
    path = directory / "metrics.jsonl"
    try:
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise _unwritable(path, error) from error


def record(metrics: TextIO, row: dict[str, Any]) -> None:
    """One line, on disk at once, so that a reader sees the run as it goes."""
    metrics.write(json.dumps(row, allow_nan=False) + "\n")
    metrics.flush()


def progress_bar() -> Progress:
    """A bar on a terminal; elsewhere only what is printed, on stderr."""
    console = rich.get_console() if sys.stderr.isatty() else rich.console.Console(file=sys.stderr)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    )


@contextmanager
def reading(progress: Progress) -> Iterator[Callable[[int, int], None]]:
    """A bar without an end, since how long a base or a data set takes is not known before; what it
    yields is to be told of a base that is packed, layer by layer."""
    task = progress.add_task("reading data and base", total=None)
    said = "packing the base, in layers"
    yield lambda done, layers: progress.update(task, total=layers, completed=done, description=said)
    progress.remove_task(task)


class PeakMemory:
    """The largest anonymous memory of the process above its value at the start, in bytes.

    Sampled from /proc every 20 ms (RssAnon: neither mapped files nor shared libraries); on CUDA
    the device's own peak is reported instead. Where there is no /proc: 0.
    """

    def __enter__(self) -> PeakMemory:
        self.start = self.most = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.sample()

    def sample(self) -> None:
        self.most = max(self.most, self.now())

    def now(self) -> int:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return 0
        lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
        return int(lines[0].split()[1]) * 1024 if lines else 0

    def peak(self, device: torch.device) -> int:
        """Bytes above the start, or of the device."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return self.most - self.start


def rescore(
    directory: Path, data: str | None, split: str | None, columns: Columns
) -> dict[str, float]:
    """A run's scores on a split of its own data or of other data."""
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(directory)
            config = trained.config
            if data is None:
                corpus = read_corpus(config)
                name = split or corpus.held_out[0]
                if _learned_from(directory) not in (None, corpus.digest()):
                    progress.console.print(
                        f"note: {config.data} is not as it was when {directory} was trained: rows"
                        f" of {name} may be among those that it learned from.",
                        soft_wrap=True, markup=False,
                    )  # fmt: skip
            else:
                where = _columns(config, columns)
                corpus, name = read_split(data, where, config.task, config.labels, split)
            examples = take(corpus, name)
            _check_pairs(directory, config, examples)
            encoded = _encoded(trained, corpus, examples, corpus.targets(examples))
        found = evaluate(trained.model, corpus, encoded, examples, 64, config.dtype, progress)
    return {"loss": found.loss, **found.metrics}


def _learned_from(directory: Path) -> str | None:
    """The digest of a run's data, None where the run has none to tell."""
    try:
        found = json_object((directory / "environment.json").read_bytes()).get("data")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _encoded(
    trained: Trained, corpus: Corpus, examples: Sequence[Example], targets: Sequence[float]
) -> Encoded:
    length = trained.config.max_length
    return encode(trained.tokenizer, examples, targets, corpus.task, length)


def merge_run(directory: Path, output: Path, dequantize: bool, untie: bool) -> str:
    """Write a run's model as a plain one into a new folder; what was merged, and how far that moved
    the logits of the run's first texts."""
    check_free(output, "--output", "model")
    with progress_bar() as progress, reading(progress):
        trained = _reopened(directory)
        model, probe = trained.model, _probe(trained, directory)
        packed = sum(isinstance(module, nf4.NF4Linear) for module in model.modules())
        if packed and not dequantize:
            raise RunError(
                f"{directory} has its base in NF4, whose 16 levels cannot hold a merged weight. Run"
                f" lora merge {directory} --dequantize: into the dequantised base."
            )
        if dequantize and not packed:
            raise ConfigError(f"--dequantize: {directory} has no base in NF4. Leave it out.")
        said = f"into the base {trained.config.base}"
        if packed:
            nf4.dequantize_layers(model)
            said = f"into {packed} dequantised layers, not the original ones of the base"
        if method_named(trained.config.method).keeps_base:
            said = f"{merge(model, untie, probe)}; {said}"
        else:
            said = f"nothing to merge: {trained.config.method} trained the base itself"
        eject(model)
        if trained.config.labels:
            model.config.id2label = dict(enumerate(trained.config.labels))
            model.config.label2id = {label: i for i, label in enumerate(trained.config.labels)}
        making = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        try:
            model.save_pretrained(making)
            trained.tokenizer.save_pretrained(making)
            making.rename(output)
        except OSError as error:
            raise _unwritable(output, error) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return said


def _probe(trained: Trained, directory: Path) -> dict[str, Tensor]:
    """The first texts that the run predicted, as one batch; before the last epoch, a text."""
    path = directory / "predictions.jsonl"
    whole = path.read_text(encoding="utf-8") if path.is_file() else '{"text": "a"}'
    rows = [json_object(line) for line in whole.splitlines()[:8]]
    corpus = Corpus(str(path), trained.config.task, trained.config.labels, (), (), ())
    examples = [Example(str(row["text"]), row.get("pair"), None) for row in rows]
    encoded = _encoded(trained, corpus, examples, [0.0] * len(examples))
    return collate(encoded, range(len(examples)), trained.device)


def predict_texts(
    directory: Path,
    texts: Sequence[str],
    pairs: Sequence[str],
    data: str | None,
    output: Path | None,
    columns: Columns,
) -> None:
    """Label texts, or the rows of a file, with a run's model."""
    if (data is None) == (not texts):
        raise DataError("one of --text and --data FILE is needed.")
    if data is None and columns != Columns():
        raise ConfigError("columns are of --data. Leave --text-column and its like out.")
    if pairs and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs. Pass one --pair per --text.")
    if output is not None and output.exists():
        raise RunError(f"--output {output} exists. Pass another, or remove it.")
    if output is not None and not output.absolute().parent.is_dir():
        raise RunError(f"--output {output}: {output.parent} is no folder. Make it first.")
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(directory)
            config = trained.config
            if data is not None:
                examples = unlabelled(data, _columns(config, columns))
            else:
                examples = [
                    Example(text, pairs[i] if pairs else None, None) for i, text in enumerate(texts)
                ]
            _check_pairs(directory, config, examples)
            corpus = Corpus(str(data), config.task, config.labels, (), (), ())
            encoded = _encoded(trained, corpus, examples, [0.0] * len(examples))
        logits = predict(trained.model, encoded, 64, config.dtype, progress)
    rows = rows_of(corpus, examples, logits)
    if output is not None:
        write_lines(output, rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
