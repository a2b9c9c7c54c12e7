"""One training run, from its configuration to its directory.

config.toml        the configuration as resolved: reads back with `lora train --config`
environment.json   versions, machine, command
metrics.jsonl      one line per step and per evaluation, as they happen
checkpoints/       what `lora train --resume` goes on from (lora.finetune.state)
adapter/           the adapter of the last step, or the best, in PEFT's format
predictions.jsonl  the answers on the held-out split
summary.json       the result; there only when the run is complete
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

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

from lora import __version__
from lora.adapter import Adapter, PartialConfig
from lora.adapter_file import filed_labels, find_folder, read_tensors
from lora.card import heads_of
from lora.checkpoint import load, rows_filed, save
from lora.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    RunError,
    StoppedError,
    TargetError,
    TrainingError,
    command,
)
from lora.files import readable, writable, write_together, write_whole
from lora.finetune import distributed, state, trackers
from lora.finetune.config import RunConfig, from_table, method_named, placed, read_toml, to_table
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.templates import TEMPLATES
from lora.finetune.data.tokens import Encoded
from lora.finetune.evaluate import Evaluation, autocast, evaluate
from lora.finetune.flags import as_flag
from lora.finetune.generate import scored
from lora.finetune.inputs import calibration, digest, inputs_of, read_corpus
from lora.finetune.losses import check_language
from lora.finetune.memory import checkpoint_activations, hold, pick_dtype
from lora.finetune.metrics import LOWER
from lora.finetune.models import Base, load_base, load_tokenizer
from lora.finetune.quantized import packable
from lora.finetune.records import NOTHING, Mark, environment_of, metrics_at
from lora.finetune.state import Training
from lora.finetune.train import SIGNALS, Step, begin, check_room, fit, steps_per_epoch
from lora.injection import Report, check_steps, disabled, inject
from lora.interop.pretrained import read_tokenizer
from lora.layers import inside
from lora.vocabulary import add_tokens, resize, rows_of

CHECKPOINTS = "checkpoints"


def run(config: RunConfig[Any]) -> dict[str, Any]:
    """Train, evaluate, record. Returns the summary. Raises LoraError, no directory left behind
    unless training had begun."""
    with distributed.group(alone=config.shard or config.offload):
        directory = distributed.gather(config.run_dir or default_directory(config))[0]
        with distributed.alike():
            if distributed.rank() == 0:
                check_free(directory)
        return _run(config, directory, resumed=False)


def resume(directory: Path, base: str | None = None) -> dict[str, Any]:
    """Go on with a run that was cut off, from its newest whole checkpoint; `base` is where its base
    is now, if not where it was. Returns the summary."""
    config = resumable(directory, base)
    with distributed.group(alone=config.shard or config.offload):
        return _run(config, directory, resumed=True)


def resumable(directory: Path, base: str | None = None) -> RunConfig[Any]:
    """The configuration of a run that is there and not complete. Raises RunError."""
    config = config_of(directory)
    _check_incomplete(directory)
    if base is not None and state.find(directory / CHECKPOINTS)[0] is None:
        anew = command("lora", "train", "--config", directory / "config.toml", "--base", base)
        raise RunError(
            f"--base {base}: {directory} has no checkpoint yet, by which its base would be known"
            f" again. Train anew: {anew}."
        )
    return at_base(config, base, directory)


def _check_incomplete(directory: Path) -> None:
    if (directory / "summary.json").is_file():
        scored = command("lora", "eval", directory)
        raise RunError(f"{directory} is complete. Run {scored}, or train anew.")


def at_base(config: RunConfig[Any], base: str | None, directory: Path) -> RunConfig[Any]:
    """The configuration of what is in a directory, with its base where it is now: in `base`, or
    where it was. Raises RunError if it is not there any more."""
    if base is not None:
        return replace(config, base=placed(base))
    if os.path.isabs(config.base) and not os.path.isdir(config.base):
        raise RunError(
            f"{directory}: its base {config.base} is not there any more. Pass its new place:"
            " --base FOLDER."
        )
    return replace(config, base=placed(config.base))


def _run(config: RunConfig[Any], directory: Path, resumed: bool) -> dict[str, Any]:
    started = time.perf_counter()
    first = distributed.rank() == 0
    with progress_bar() as progress, PeakMemory() as memory, ExitStack() as held:

        def say(text: str) -> None:
            progress.console.print(text, soft_wrap=True, markup=False, highlight=False)

        with distributed.alike(), reading(progress) as packed:
            trackers.check_trackers(config.trackers)
            corpus = read_corpus(config)
            fits = adapter_to_fit(config)
            base = base_of(config, corpus.labels, corpus.task, packed, parts=True, fits=fits)
            device = distributed.device()
            config, said = resolve(config, corpus, base, device)
            if not base.pieces:
                base.model.to(device)
            inputs = inputs_of(config, corpus, base)
            read, corpus, splits = corpus, inputs.corpus, inputs.splits
            shown = calibration(config, splits["train"], device)
            report = put_on(config, base, shown)
            per_epoch = steps_per_epoch(splits["train"], config.batch_size)
            check_steps(base.model, config.epochs * per_epoch)
            check_room(base.model)
            hold(base.model, config.dtype)
            if config.activation_checkpointing:
                checkpoint_activations(base.model)
            if config.shard or config.offload:
                distributed.shard(base.model, base.pieces, config.seed, config.offload)
            if config.compile:
                base.model.compile(dynamic=True)
            assert config.learning_rate is not None
            if corpus.task == "text":
                with autocast(base.model):
                    check_language(base.model, config.packing)
            training = begin(base.model, config.learning_rate, config.weight_decay, config.seed)
            distributed.same(list(state.values(base.model).values()))
        for line in corpus.said:
            say(f"data: {line}")
        for line in filter(None, (config.note, corpus.note, *inputs.said, said)):
            say(f"note: {line}")
        say(str(report))

        path, noted = None, corpus.note
        with distributed.alike():
            if first and not resumed:
                create(directory, config, read, digest(splits["train"]))
            if first:
                held.enter_context(alone(directory))
                tokens = digest(splits["train"])
                if resumed:
                    path, noted = _checkpoint(directory, read, tokens, say)
        path = distributed.gather(path)[0]
        with distributed.alike():
            mark = state.restore(training, path)["recorded"] if path else NOTHING
            if resumed:
                say(f"resuming {directory} {f'from step {training.step}' if path else 'anew'}.")
        names = config.trackers if first else ()
        try:
            with distributed.alike():
                log = held.enter_context(trackers.tracking(names, directory, to_table(config)))
                record = held.enter_context(recorder(directory, mark, training.step, log))
        except BaseException:
            if first and not resumed:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        stop = held.enter_context(stopping())
        with distributed.together():
            ended = _train(
                config, training, base.tokenizer, corpus, splits, directory, record, progress, stop
            )
        final = ended.final
        memory.sample()
        bad = _diverged(record.evaluations)
        if bad:
            say(f"note: {bad}")
        name, held_out = corpus.held_out
        summary = {
            "method": config.method,
            "task": corpus.task,
            "base": config.base,
            "data": " ".join(config.data),
            "seed": config.seed,
            "note": " ".join(filter(None, (config.note, noted, bad))),
            "trainable": report.trainable,
            "adapter_parameters": report.adapter_parameters,
            "parameters": report.total,
            "learning_rate": config.learning_rate,
            "evaluations": record.evaluations,
            "step": training.step,
            "split": name,
            "rows": len(held_out),
            "loss": final.loss,
            "metrics": final.metrics,
            **({} if ended.baseline is None else {"baseline": ended.baseline}),
            "train_seconds": sum(row["seconds"] for row in record.evaluations),
            "seconds": time.perf_counter() - started,
            "peak_bytes": memory.peak(device),
            "dtype": config.dtype,
        }
        if first:
            write_lines(directory / "predictions.jsonl", ended.rows)
            whole = json.dumps(summary, indent=2, allow_nan=False).encode()
            write_file(directory / "summary.json", whole)
            # Not before: what is cut off until here goes on from the last.
            folder, step = directory / CHECKPOINTS, record.evaluations[-1]["step"]
            state.prune(folder, _kept(config, folder, record.evaluations, step, config.keep_last))
            with suppress(OSError):  # of a run that keeps none
                folder.rmdir()
    return summary | {"run_dir": str(directory)}


def _checkpoint(
    directory: Path, corpus: Corpus, tokens: str, say: Callable[[str], None]
) -> tuple[Path | None, str]:
    """The newest whole checkpoint of a run that may go on here, None if it has none yet; and what
    the run remarked of its data when it began."""
    _check_incomplete(directory)  # again: another process may have completed it meanwhile
    anew = command("lora", "train", "--config", directory / "config.toml")
    then = environment_of(directory)
    if then["data"] != corpus.digest():
        raise RunError(
            f"{directory}: {corpus.source} is not as it was when the run began. Bring it back, or"
            f" run anew: {anew}."
        )
    if then["tokens"] != tokens:
        raise RunError(
            f"{directory}: the same data is other tokens than when the run began: of another"
            " tokenizer, or of a chat template that writes today's date. Bring it back, or run"
            f" anew, with a --template FILE that writes none: {anew}."
        )
    now = environment()
    for key in ("python", "torch", "transformers", "processor", "threads", "device", "ranks"):
        if then.get(key) != now[key]:
            say(f"note: {key} was {then.get(key)}, is {now[key]}: last bits may differ.")
    path, said = state.find(directory / CHECKPOINTS)
    for line in said:
        say(f"note: {line}")
    with readable(directory, RunError, "Bring its files back, or run anew."):
        if path and (path / state.CONFIG).read_bytes() != (directory / "config.toml").read_bytes():
            raise RunError(
                f"{directory / 'config.toml'} is not the one of {path}. Bring it back, or run anew."
            )
    return path, then["note"]


@dataclass(frozen=True)
class Ended:
    """What a training came to on the held-out split."""

    final: Evaluation
    rows: list[dict[str, Any]]  # one for each answer
    baseline: dict[str, float] | None  # metrics with the adapter off


def _train(
    config: RunConfig[Any],
    training: Training,
    tokenizer: Any,
    corpus: Corpus,
    splits: dict[str, Encoded],
    directory: Path,
    record: Record,
    progress: Progress,
    stop: Callable[[], int],
) -> Ended:
    """Train, evaluate and save from where the training is to its end; then the held-out split."""
    folder, first = directory / CHECKPOINTS, distributed.rank() == 0
    written = (directory / "config.toml").read_bytes()
    per_epoch = steps_per_epoch(splits["train"], config.batch_size)
    total = config.epochs * per_epoch
    shown = Shown(progress, config.epochs, total, training.step)
    where, again = "", command("lora", "train", "--resume", directory)

    def evaluates(step: int) -> bool:
        return step % (config.eval_steps or per_epoch) == 0 or step == total

    def saves(step: int) -> bool:
        return evaluates(step) or (config.save_steps is not None and step % config.save_steps == 0)

    def checkpoint() -> None:
        state.save(training, folder, written, record.mark())
        if first:
            last = max(1, config.keep_last)
            state.prune(folder, _kept(config, folder, record.evaluations, training.step, last))

    def score() -> bool:
        """Evaluate on dev; whether that was enough."""
        nonlocal where
        where = f"evaluating after step {training.step}: "
        dev = evaluate(training.model, corpus, splits["dev"], corpus.dev, progress=progress)
        where = ""
        row = record.evaluation(training.step, training.step / per_epoch, dev)
        shown.evaluation(row)
        at_best = best(record.evaluations)["step"]
        since = sum(later["step"] > at_best for later in record.evaluations)
        return config.early_stopping is not None and since >= config.early_stopping

    try:
        # A run that was cut off behind the checkpoint owes the evaluation of its step.
        enough = training.step > 0 and evaluates(training.step) and score()
        for step in () if enough else fit(
            training, splits["train"], corpus.task, config.epochs, config.batch_size,
            config.micro_batch_size, config.warmup, config.schedule, config.max_grad_norm,
            config.seed, stop,
        ):  # fmt: skip
            record.step(step)
            shown.step(step)
            if step.stop or saves(step.step):
                checkpoint()
            if step.stop:
                raise StoppedError(
                    f"{signal.Signals(step.stop).name} after step {step.step} of {total}, which is"
                    f" saved. Go on with {again}",
                    step.stop,
                )
            if evaluates(step.step) and score():
                progress.console.print(
                    f"no better for {config.early_stopping} evaluations: enough."
                )
                break
        shown.done()
        chosen = best(record.evaluations)["step"]
        if config.final == "best" and chosen != training.step:
            path = state.place(folder, chosen)
            with distributed.alike():
                if wrong := state.damage(path):
                    raise CheckpointError(
                        f"{path}, the best, is damaged: {wrong}. Bring it back, or remove {folder}:"
                        f" {again} begins anew then."
                    )
                state.restore(training, path)
            progress.console.print(f"the best is that of step {chosen}.")
        with distributed.alike():
            save(training.model, directory / "adapter", writes=first)
            if first and (config.add_tokens or config.resize_embeddings):
                tokenizer.save_pretrained(directory / "adapter")
        name, held_out = corpus.held_out
        where = f"evaluating on {name} after the last step: "
        split = tokenizer, corpus, splits[name], held_out, progress
        final, rows = scored(config, training.model, *split)
        baseline = None
        if config.baseline:
            where = f"evaluating the base on {name}: "
            with disabled(training.model):
                baseline = scored(config, training.model, *split)[0].metrics
    except TargetError:
        if not first:
            raise SystemExit(2) from None  # as below
        raise
    except (TrainingError, MemoryError, RuntimeError) as error:
        if not isinstance(error, TrainingError) and not out_of_memory(error):
            raise
        # Not memory that is short here, nor another rank that is gone, which has a cause.
        diverged = isinstance(error, TrainingError) and error.__cause__ is None
        if diverged and not first:
            raise SystemExit(2) from None  # every rank finds the same, and rank 0 says it
        if diverged and where:  # what cannot be scored is not to be gone on from
            state.prune(folder, set(state.steps(folder)) - {training.step})
        good, _ = state.find(folder)
        if diverged and not training.step:
            told = (
                f"{error} No step was taken yet: it is the base or the data, not the learning rate."
                " Set --dtype float32, or pass another base."
            )
        elif diverged:
            told = f"{error} Run again with a lower --learning-rate than {config.learning_rate:g}."
        elif isinstance(error, TrainingError):
            told = f"{error} Go on with {again}."
        else:
            told = _short(error, "" if where else f"step {training.step + 1}: ", config)
        raise TrainingError(f"{where}{told} Last good checkpoint: {good or 'none'}.") from None
    return Ended(final, rows, baseline)


def _kept(
    config: RunConfig[Any],
    folder: Path,
    evaluations: Sequence[Mapping[str, Any]],
    step: int,
    last: int,
) -> set[int]:
    """The steps whose checkpoints stay: the newest up to the step, and the best. What is of a later
    step is damaged, or the run would not be here again."""
    newest = [one for one in reversed(state.steps(folder)) if one <= step][:last]
    few = max(config.keep_best, 1 if config.final == "best" else 0)
    return {*newest, *(row["step"] for row in ranked(evaluations)[:few])}


def ranked(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The best on dev first, by the first metric and then by the loss; of equals the earlier."""

    def rank(row: Mapping[str, Any]) -> tuple[float, float]:
        name, score = next(iter(row["dev"].items()))
        score = -score if name in LOWER else score
        return (-math.inf if math.isnan(score) else score), -row["dev_loss"]

    return sorted(evaluations, key=rank, reverse=True)


def best(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first of ranked()."""
    return ranked(evaluations)[0]


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory is short; torch's CPU allocator has no type for it."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or "can't allocate memory" in str(error)


def _short(error: BaseException, step: str, config: RunConfig[Any]) -> str:
    """Where memory was short, in a step or in an evaluation (""), and what to change."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    less = max(1, (config.micro_batch_size or config.batch_size) // 2)
    parts = f"--micro-batch-size {less}, " if step else ""  # an evaluation has none
    return (
        f"{step}out of memory ({reason}). Run again with {parts}a smaller --max-length, or"
        " --quantize nf4."
    )


class Shown:
    """A training as its user sees it: a bar on a terminal, elsewhere a line now and then."""

    EVERY = 30.0  # seconds

    def __init__(self, progress: Progress, epochs: int, total: int, done: int) -> None:
        self.progress, self.epochs = progress, epochs
        self.bar = progress.add_task("training", total=total, completed=done)
        self.recent: deque[Step] = deque(maxlen=20)
        self.said = time.monotonic()

    def step(self, step: Step) -> None:
        self.recent.append(step)
        seconds = sum(s.seconds for s in self.recent)
        tokens = sum(s.tokens for s in self.recent)
        places = sum(s.tokens / (1 - s.padding) for s in self.recent)
        text = (
            f"epoch {step.epoch}/{self.epochs} loss {step.loss:.3f} rate {step.learning_rate:.1e}"
            f" {tokens / seconds:,.0f} tokens/s padding {1 - tokens / places:.0%}"
        )
        self.progress.update(self.bar, completed=step.step, description=text)
        now = time.monotonic()
        if self.progress.disable and now - self.said >= self.EVERY:
            self.said = now
            left = (step.steps - step.step) * seconds / len(self.recent)
            clock = time.strftime("%H:%M:%S", time.gmtime(left))
            self.say(f"step {step.step}/{step.steps} {text} left {clock}")

    def evaluation(self, row: Mapping[str, Any]) -> None:
        scores = "  ".join(
            f"{name} {value:.4f}" for name, value in row["dev"].items() if "/" not in name
        )
        first = next(iter(row["dev"])) + "/"
        parts = [
            f"{name.removeprefix(first)} {value:.4f}"
            for name, value in row["dev"].items()
            if name.startswith(first)
        ]
        scores += f"  ({first[:-1]} of {', '.join(parts)})" if parts else ""
        self.say(
            f"epoch {row['epoch']:.3g}/{self.epochs}  loss {row['loss']:.4f}"
            f"  dev loss {row['dev_loss']:.4f}  {scores}  {row['seconds']:.1f} s"
        )

    def done(self) -> None:
        self.progress.remove_task(self.bar)

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, soft_wrap=True)


class Record:
    """metrics.jsonl, and what it says so far: the evaluations, and the steps since the last."""

    def __init__(
        self, file: BinaryIO | None, rows: Sequence[Mapping[str, Any]], log: trackers.Log
    ) -> None:
        self.file, self.log, self.digest = file, log, hashlib.sha256()
        self.evaluations: list[dict[str, Any]] = []
        self.steps: list[Mapping[str, Any]] = []
        for row in rows:
            self._take(row)

    def step(self, step: Step) -> None:
        row = {"kind": "step", **asdict(step)}
        del row["stop"]  # of this process, not of the training
        self._write(row)

    def evaluation(self, step: int, epoch: float, dev: Evaluation) -> Mapping[str, Any]:
        """The training since the last evaluation, and what it has led to."""
        seen = sum(s["targets"] for s in self.steps)
        tokens = sum(s["tokens"] for s in self.steps)
        places = sum(s["tokens"] / (1 - s["padding"]) for s in self.steps)
        self._write(
            {
                "kind": "evaluation",
                "step": step,
                "epoch": epoch,
                "loss": sum(s["loss"] * s["targets"] for s in self.steps) / seen,
                "first_loss": self.steps[0]["loss"],
                "seconds": sum(s["seconds"] for s in self.steps),
                "padding": 1 - tokens / places,
                "dev_loss": dev.loss,
                "dev": dev.metrics,
            }
        )
        return self.evaluations[-1]

    def mark(self) -> Mark:
        """Bytes and SHA-256 of what is recorded, which is on disk; nothing on ranks that write
        none."""
        if self.file is None:
            return NOTHING
        with writable(self.file.name, RunError):
            os.fsync(self.file.fileno())
        return self.file.tell(), self.digest.hexdigest()

    def _write(self, row: dict[str, Any]) -> None:
        """One line, at once, so that a reader sees the run as it goes."""
        if self.file is not None:
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
            with writable(self.file.name, RunError):
                self.file.write(line)
                self.file.flush()
            self.digest.update(line)
        self.log(row)
        self._take(row)

    def _take(self, row: Mapping[str, Any]) -> None:
        if row["kind"] == "step":
            self.steps.append(row)
        else:
            self.evaluations.append({k: v for k, v in row.items() if k != "kind"})
            self.steps = []


@contextmanager
def recorder(directory: Path, mark: Mark, step: int, log: trackers.Log) -> Iterator[Record]:
    """metrics.jsonl as it was at a mark(); what follows is done again. Rank 0 writes."""
    path, length = directory / "metrics.jsonl", mark[0]
    rows, written = metrics_at(directory, mark, step)
    record = Record(None, rows, log)
    record.digest.update(written)
    with ExitStack() as held:
        if distributed.rank() == 0:
            with writable(path, RunError):
                record.file = path.open("r+b" if length else "wb")
                held.callback(_closed, record.file)
                record.file.truncate(length)
                record.file.seek(length)
        yield record


def _closed(file: BinaryIO) -> None:
    with suppress(OSError):  # of a line that could not be written, which was said
        file.close()


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """A run's directory to oneself: no two processes go on with one run."""
    with readable(directory, RunError, "Pass the folder of a run."):
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{directory}: another process is at work on this run. Wait.") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


@contextmanager
def stopping() -> Iterator[Callable[[], int]]:
    """Within, a first SIGINT or SIGTERM waits for the step to end; a second one ends the process.

    Yields what tells the signal that came, 0 before.
    """
    came, first = 0, distributed.rank() == 0
    before: dict[int, Any] = {}

    def keep(number: int, frame: Any) -> None:
        nonlocal came
        came = int(number)
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        said = (
            f"{signal.Signals(number).name}: finishing the step and saving; once more to stop now"
        )
        with suppress(OSError):
            os.write(2, f"{said}\n".encode() if first else b"")

    if threading.current_thread() is threading.main_thread():
        for one in SIGNALS:
            if signal.getsignal(one) is not signal.SIG_IGN:  # nohup, a job in the background
                before[one] = signal.signal(one, keep)
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _diverged(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """What to say of a training that ended far above where it began, "" of any other."""
    began, ended = evaluations[0]["first_loss"], evaluations[-1]["loss"]
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
    with writable(directory, RunError, f"Pass another {flag}."):
        there = False
        with suppress(FileNotFoundError, NotADirectoryError):
            there = bool(directory.lstat())
        parents = (path for path in directory.absolute().parents if path.exists())
        parent = next(parents, directory)  # the root has none
    if there:
        raise RunError(
            f"{flag} {directory} exists: no {what} is written over. Pass another, or remove it."
        )
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        why = "not writable" if parent.is_dir() else "no folder"
        raise RunError(f"{flag} {directory} cannot be made: {parent} is {why}. Pass another.")


def create(directory: Path, config: RunConfig[Any], corpus: Corpus, tokens: str) -> None:
    """Make the directory, with config.toml and environment.json in it or not at all."""
    around = environment() | {"data": corpus.digest(), "tokens": tokens, "note": corpus.note}
    files = {
        "config.toml": tomli_w.dumps(to_table(replace(config, run_dir=None))).encode(),
        "environment.json": json.dumps(around, indent=2).encode(),
    }
    making = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}")
    with writable(directory, RunError, "Pass another --run-dir."):
        making.mkdir(parents=True)
        try:
            write_together(making, files)
            making.rename(directory)
        except BaseException:
            shutil.rmtree(making)
            raise


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
        "ranks": distributed.size(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n")
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def resolve(
    config: RunConfig[Any], corpus: Corpus, base: Base, device: torch.device
) -> tuple[RunConfig[Any], str]:
    """The configuration with everything decided, and what to tell the user of it."""
    rate = config.learning_rate or method_named(config.method).learning_rate
    settings, said = _training_tokens(config.settings, config.method, base.added), ""
    if isinstance(settings, PartialConfig) and config.adapter is None and base.new:
        heads = heads_of(base.model)  # as PEFT names them, so that it reads the file
        others = [
            name
            for name in (*settings.modules_to_save, *base.new)
            if not any(inside(name, head) for head in heads)
        ]
        settings = replace(settings, modules_to_save=tuple(dict.fromkeys((*others, *heads))))
        named = ", ".join(settings.modules_to_save)
        said = f"the head is new: {named} trained whole, in modules_to_save"
    length, special = config.max_length, 0
    if length is None:
        length = 1024 if corpus.task == "text" else 128
    if corpus.task != "text":
        special = base.tokenizer.num_special_tokens_to_add(corpus.train[0].pair is not None)
    most = getattr(base.model.config, "max_position_embeddings", None)
    if most is not None and config.max_length is None:
        length = min(length, most)
    if length <= special:
        raise ConfigError(
            f"max_length must leave room beside {special} special tokens, found {length}."
            " Set --max-length."
        )
    if most is not None and length > most:
        raise ModelError(f"--max-length {length}: {config.base} has {most} positions. Lower it.")
    _check_task(config, corpus, base)
    template = config.template
    if template == "auto" and corpus.task == "text":
        # What is asked of the model later stands as it is then, too; T5 and BART know no turns.
        bare = base.model.config.is_encoder_decoder and not base.tokenizer.chat_template
        if all(one.raw or (bare and len(one.messages) < 3) for one in corpus.train):
            template = "none"
    resolved = replace(
        config,
        learning_rate=rate,
        task=corpus.task,
        labels=corpus.labels,
        text_column=corpus.columns.text,
        pair_column=corpus.columns.pair,
        label_column=corpus.columns.label,
        adapter=config.adapter.resolve() if config.adapter else None,
        settings=settings,
        max_length=length,
        # By whole paths, so that the run can be reopened from anywhere.
        base=placed(config.base),
        data=tuple(map(placed, config.data)),
        template=template if template in TEMPLATES else placed(template),
        dtype=pick_dtype(device) if config.dtype == "auto" else config.dtype,
    )
    return resolved, said


def _check_task(config: RunConfig[Any], corpus: Corpus, base: Base) -> None:
    """Raise ConfigError where a setting says nothing in the task."""
    if corpus.task == "text":
        _check_idle(config, "of a classification or a regression", {
            "text_column": None, "pair_column": None, "label_column": None, "header": "auto",
            "labels": (),
        })  # fmt: skip
        if config.packing and base.model.config.is_encoder_decoder:
            raise ConfigError("--packing is of models that only decode. Leave it out.")
        if config.loss_on == "all" and base.model.config.is_encoder_decoder:
            raise ConfigError("--loss-on all: an encoder learns no text. Leave it out.")
        return
    _check_idle(config, "of --task text", {
        "template": "auto", "loss_on": "answers", "packing": False, "weights": {}, "temperature": 1,
        "answered": None,
    })  # fmt: skip


def _check_idle(config: RunConfig[Any], of: str, defaults: dict[str, Any]) -> None:
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise ConfigError(f"{as_flag(name)} is {of}, and this is none. Remove it.")


def takes_up(config: RunConfig[Any]) -> bool:
    """Whether the base is packed with the injection, whose start needs its weights as they were."""
    method = method_named(config.method)
    adapts = issubclass(method, Adapter) and method.takes_up(config.settings)
    return adapts and config.quantize == "nf4"


def base_of(
    config: RunConfig[Any],
    labels: tuple[str, ...],
    task: str,
    packed: Callable[[int, int], None] = lambda done, layers: None,
    parts: bool = False,
    fits: Path | None = None,
) -> Base:
    """The base as configured, before anything is put on it; `packed` is told of its packing. With
    `parts` this rank's part of it alone, where it is to be sharded. `fits` is the folder of an
    adapter whose tokens it is to have."""
    count, quantize = len(labels) or 1, "none" if takes_up(config) else config.quantize
    cut = parts and (config.shard or config.offload)
    part = (distributed.rank(), distributed.size()) if cut else None
    base = load_base(config.base, count, task, config.seed, quantize, config.dense, packed, part)
    if labels:
        base.model.config.id2label = dict(enumerate(labels))
        base.model.config.label2id = {label: number for number, label in enumerate(labels)}
    return with_tokens(base, config, task, fits)


def adapter_to_fit(config: RunConfig[Any]) -> Path | None:
    """The folder of the adapter whose tokens --resize-embeddings gives to the base."""
    return config.adapter if config.resize_embeddings else None


def with_tokens(base: Base, config: RunConfig[Any], task: str, fits: Path | None) -> Base:
    """The base with the tokens of the adapter in the folder `fits`: its embeddings resized, and the
    adapter's tokenizer. Then with the tokens that --add-tokens adds."""
    if fits is not None:
        rows = rows_filed(base.model, fits)
        if rows not in (None, rows_of(base.model)):
            resize(base.model, rows)
        place = _tokenizer_for(fits, config)
        if place is not None:
            base = replace(base, tokenizer=load_tokenizer(str(place), base.model, task))
    return _extended(base, config)


def _check_tokens(adapter: Path, base: Base) -> None:
    """Raise ConfigError if the tokenizer beside an adapter has tokens that its base's lacks: the
    adapter would be trained on with other ids than it learned."""
    place = _tokenizer_beside(adapter)
    if place is None:
        return
    known = base.tokenizer.get_vocab()
    vocabulary = read_tokenizer(str(place)).get_vocab()
    other = [token for token, number in vocabulary.items() if known.get(token) != number]
    if other:
        shown = ", ".join(map(repr, sorted(other, key=vocabulary.__getitem__)[:5]))
        raise ConfigError(
            f"--adapter {adapter}: its tokenizer has {len(other)} tokens that the base's lacks or"
            f" numbers otherwise ({shown}). Pass --resize-embeddings to take the adapter's."
        )


def _tokenizer_for(adapter: Path, config: RunConfig[Any]) -> Path | None:
    """The folder of an adapter's tokenizer, None if none was saved beside it. A checkpoint has
    none: its tokenizer is that of the adapter which its run started from. Raises RunError if that
    is not there any more."""
    there, start = _tokenizer_beside(adapter), adapter_to_fit(config)
    if there is not None or start is None:
        return there
    if not start.is_dir():
        raise RunError(
            f"{adapter} has no tokenizer beside it, and the adapter that its run started from,"
            f" {start}, is not there any more. Bring it back."
        )
    return _tokenizer_beside(start)


def _tokenizer_beside(adapter: Path) -> Path | None:
    places = (find_folder(adapter), adapter)
    return next((place for place in places if (place / "tokenizer_config.json").is_file()), None)


def _extended(base: Base, config: RunConfig[Any]) -> Base:
    """The base with the tokens that --add-tokens adds to it. Raises ConfigError if the method
    cannot train their rows."""
    if not config.add_tokens:
        return base
    whole = getattr(config.settings, "modules_to_save", ())
    added = add_tokens(base.model, base.tokenizer, config.add_tokens, whole)
    return replace(base, added=added)


def _training_tokens(settings: Any, method: str, added: dict[str, list[int]]) -> Any:
    """A method's settings with the rows of added tokens among what trains. Raises ConfigError."""
    if not added or not method_named(method).keeps_base:  # which trains every row anyway
        return settings
    if not hasattr(settings, "trainable_token_indices"):
        raise ConfigError(
            f"--add-tokens: {method} trains no rows of embeddings. Set --method lora, dora or full."
        )
    found = replace(settings, trainable_token_indices=added)
    if settings.trainable_token_indices and settings != found:
        raise ConfigError(
            "--add-tokens cannot be combined with --trainable-token-indices. To train rows of known"
            " tokens too, name them in --add-tokens: a known token is not added again."
        )
    return found


def put_on(config: RunConfig[Any], base: Base, shown: Any = None) -> Report:
    """The base with the adapter put on it, and packed where that has to wait for it; or with the
    adapter that training goes on from."""
    if config.adapter is not None:
        return _given(config.adapter, config, base)
    names = packable(base.model, config.dense) if takes_up(config) else ()
    return inject(base.model, config.settings, seed=config.seed, batches=shown, pack=names)


def _given(folder: Path, config: RunConfig[Any], base: Base) -> Report:
    """An adapter of a folder on the base, to be trained on. Raises ModelError or DataError where
    its head is not of this task."""
    report = load(base.model, folder, trainable=True, resize_embeddings=config.resize_embeddings)
    check_head(base, report, config.base, folder)
    if not config.resize_embeddings:
        _check_tokens(folder, base)
    labels = filed_labels(read_tensors(find_folder(folder))[1])
    if labels and config.labels and labels != config.labels:
        raise DataError(
            f"--adapter {folder} was trained on the labels {', '.join(labels)}, found"
            f" {', '.join(config.labels)}. Pass {command('--labels', *labels)}, or data of those."
        )
    return report


def check_head(base: Base, report: Report, place: str, folder: Path) -> None:
    """Raise ModelError if the base has no weights for its head, and the adapter brings none."""
    lost = [one for one in base.new if not any(inside(one, path) for path in report.plan.saved)]
    if lost and isinstance(report.plan.config, PartialConfig):
        raise ModelError(
            f"{folder}: the base {place} has no weights for {lost[0]}, and the adapter brings none."
            " Pass a --base that has its head, or an adapter with modules_to_save."
        )


def run_around(folder: Path) -> Path | None:
    """The run that a folder is, or whose adapter it is; None if it is neither. The folder's whole
    path tells: inside RUN/adapter, `.` is the run's adapter too."""
    whole = folder.resolve()
    runs = [folder, *([whole.parent] if whole.name == "adapter" else [])]
    return next((run for run in runs if (run / "config.toml").is_file()), None)


def config_of(directory: Path) -> RunConfig[Any]:
    """The configuration of a run directory, as resolved. Raises RunError where it is of no run."""
    path = directory / "config.toml"
    with readable(directory, RunError, "Pass the folder of a run."):
        there = path.is_file()
    if not there:
        raise RunError(f"{directory} is no run directory: no config.toml. Run lora train first.")
    try:
        table = read_toml(path)
        if "method" not in table:
            raise ConfigError("method is missing.")
        config = from_table(table, table["method"])
    except ConfigError as error:
        raise RunError(f"{path} is damaged: {error} Bring it back, or run anew.") from None
    open_ = [k for k in ("learning_rate", "max_length") if getattr(config, k) is None]
    open_ += ["dtype"] * (config.dtype == "auto")
    if open_:
        raise RunError(f"{path} is damaged: {open_[0]} is missing. Bring it back, or run anew.")
    if config.task == "auto" or (config.task == "classification") != bool(config.labels):
        raise RunError(f"{path} names no task with its labels: not of a run. Run lora train.")
    return config


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def write_file(path: Path, payload: bytes) -> None:
    with writable(path, RunError):
        write_whole(path, payload)


def progress_bar() -> Progress:
    """A bar on a terminal; elsewhere only what is printed, on stderr. Of several ranks 0 shows."""
    first = distributed.rank() == 0
    console = rich.get_console() if sys.stderr.isatty() else rich.console.Console(file=sys.stderr)
    console = console if first else rich.console.Console(quiet=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty() or not first,
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
        lines = [line for line in status.split("\n") if line.startswith("RssAnon")]
        return int(lines[0].split()[1]) * 1024 if lines else 0

    def peak(self, device: torch.device) -> int:
        """Bytes above the start, or of the device."""
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return self.most - self.start
