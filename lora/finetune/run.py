"""One training run, from its configuration to its folder.

config.toml        the configuration as resolved; `lora train --config` reads it back
environment.json   versions, machine, command
metrics.jsonl      one line per step and per evaluation, as they happen
checkpoints/       what `lora train --resume` resumes from (lora.finetune.state)
adapter/           the adapter of the last step, or the best one, in PEFT's format
predictions.jsonl  the answers on the held-out split
summary.json       the result; written last, so only a complete run has it
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lora.checkpoint import save
from lora.errors import (
    CheckpointError,
    RunError,
    StoppedError,
    TargetError,
    TrainingError,
    command,
)
from lora.finetune import devices, distributed, state, trackers
from lora.finetune.assemble import (
    add_adapter,
    build_base,
    resized_for,
    resolve,
    starts_on_device,
)
from lora.finetune.class_report import single_class
from lora.finetune.comparison.statistics import majority
from lora.finetune.config import RunConfig, to_table
from lora.finetune.data.corpus import Corpus
from lora.finetune.data.tokens import Encoded
from lora.finetune.evaluate import Evaluation, autocast, evaluate, predicted
from lora.finetune.forgetting import UnrelatedText, base_perplexity, perplexity, read_unrelated
from lora.finetune.generate import scored
from lora.finetune.inputs import Inputs, calibration, digest, inputs_of, read_corpus
from lora.finetune.losses import check_language
from lora.finetune.memory import auto_dtype_note, checkpoint_activations, set_dtype
from lora.finetune.methods import label
from lora.finetune.metrics import leading
from lora.finetune.models import Base
from lora.finetune.peak import PeakMemory, process_peak
from lora.finetune.record import (
    DIVERGED,
    NOTHING,
    Forgetting,
    Record,
    recorder,
    write_file,
    write_lines,
)
from lora.finetune.run_folder import (
    CHECKPOINTS,
    alone,
    check_free,
    checkpoint_to_resume,
    create,
    default_directory,
    resumable,
)
from lora.finetune.screen import TrainingScreen, progress_bar, reading, say
from lora.finetune.selection import best_step, divergence, evaluations_since_best, kept
from lora.finetune.signals import stopping
from lora.finetune.state import Training
from lora.finetune.train import Hyperparameters, begin, check_room, fit, steps_per_epoch
from lora.injection import disabled
from lora.report import Report
from lora.training import check_steps


def run(config: RunConfig[Any]) -> dict[str, Any]:
    """Train, evaluate and record. Returns the summary.

    Raises LoraError. It leaves no folder behind if that happens before the first step.
    """
    with _started(config):
        directory = distributed.gather(config.run_dir or default_directory(config))[0]
        with distributed.alike():
            if distributed.rank() == 0:
                check_free(directory)
        return _run(config, directory, resumed=False)


def resume(
    directory: Path,
    base: str | None = None,
    method: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Resume an interrupted run from its newest whole checkpoint. Returns the summary.

    `base` is where its base is now, if it has moved, and `method` names its method in the file that
    defines it, if that has moved. `device` replaces the one of the run.
    """
    config = resumable(directory, base, method, device)
    with _started(config):
        return _run(config, directory, resumed=True)


@contextmanager
def _started(config: RunConfig[Any]) -> Iterator[None]:
    """Inside, the ranks of a run can exchange tensors, and --deterministic holds."""
    group = distributed.group(config.shard or config.offload, config.device)
    with devices.deterministic(config.deterministic), group:
        yield


def _run(config: RunConfig[Any], directory: Path, resumed: bool) -> dict[str, Any]:
    started, first = time.perf_counter(), distributed.rank() == 0
    device = distributed.device(config.device)
    with progress_bar() as progress, PeakMemory(device) as memory, ExitStack() as stack:
        with distributed.alike(), reading(progress) as on_quantized:
            if resumed and first:  # before the base is loaded: lora watch looks for the lock
                stack.enter_context(alone(directory))
            parts = prepare(config, device, on_quantized)
        for line in parts.lines:
            say(progress, line)
        before = _base_perplexity(parts, progress)
        checkpoint, note = _take_folder(parts, directory, resumed, progress, stack)
        with distributed.alike():
            mark = (
                state.restore_training(parts.training, checkpoint)["recorded"]
                if checkpoint
                else NOTHING
            )
            if resumed:
                start = f"from step {parts.training.step}" if checkpoint else "anew"
                say(progress, f"resuming {directory} {start}.")
        try:
            with distributed.alike():
                names = parts.config.trackers if first else ()
                settings = to_table(parts.config)
                log = stack.enter_context(trackers.tracking(names, directory, settings))
                opened = recorder(directory, mark, parts.training.step, log, writes=first)
                record = stack.enter_context(opened)
        except BaseException:
            if first and not resumed:
                stack.close()  # unlocks the folder, which Windows does not remove while it is open
                shutil.rmtree(directory, ignore_errors=True)
            raise
        stop = stack.enter_context(stopping())
        with distributed.together():
            result = _Loop(parts, directory, record, progress, memory, before).run(stop)
        memory.sample()
        warning = divergence(record.evaluations)
        if not warning and parts.corpus.task == "classification":
            answers = [row["prediction"] for row in result.rows]
            warning = _single_class(parts, answers, parts.corpus.held_out[0])
        if warning:
            say(progress, f"note: {warning}")
        summary = _summary(parts, result, record) | {
            "note": " ".join(filter(None, (parts.config.note, note, warning))),
            "adapter_bytes": _adapter_bytes(directory),
            "seconds": time.perf_counter() - started,
            "peak_bytes": memory.peak(),
            "training_bytes": memory.training_peak,
            "process_bytes": process_peak(),
        }
        if first:
            _write_result(parts.config, directory, record, result, summary)
    return summary | {"run_dir": str(directory)}


@dataclass(frozen=True)
class Prepared:
    """What a run is made of, ready to train."""

    config: RunConfig[Any]  # resolved
    given: RunConfig[Any]  # as the user gave it
    source: Corpus  # as it was read: the folder records its digest
    corpus: Corpus  # without the rows that cannot be used
    splits: dict[str, Encoded]
    base: Base
    device: torch.device
    report: Report
    training: Training
    unrelated: UnrelatedText | None
    lines: tuple[str, ...]  # for the user


def prepare(
    config: RunConfig[Any], device: torch.device, on_quantized: Callable[[int, int], None]
) -> Prepared:
    """Read the data, load the base, put the adapter on it."""
    trackers.check_trackers(config.trackers)
    source = read_corpus(config)
    labels, task = source.labels, source.task
    base = build_base(config, labels, task, on_quantized, True, resized_for(config))
    dtype_note = [auto_dtype_note(device)] if config.dtype == "auto" else []
    given = config
    config, note = resolve(config, source, base, device)
    inputs = inputs_of(config, source, base)
    if starts_on_device(config):
        base.model.to(device)
    unrelated = read_unrelated(config, base)
    report = add_adapter(config, base, calibration(config, inputs.splits["train"], device))
    training = _begin(config, base, inputs, device)
    notes = config.note, *inputs.corpus.notes, *inputs.notes, note
    lines = (
        *(f"data: {line}" for line in inputs.corpus.summary),
        *([base.note] if base.note else []),
        *dtype_note,
        *(f"note: {line}" for line in notes if line),
        str(report),
    )
    return Prepared(
        config, given, source, inputs.corpus, inputs.splits, base, device, report, training,
        unrelated, lines,
    )  # fmt: skip


def _base_perplexity(parts: Prepared, progress: Progress) -> float | None:
    """The perplexity of --unrelated-text before training, None without that text.

    Call it before a checkpoint is loaded: full fine-tuning does not keep the base's weights.
    """
    if parts.unrelated is None:
        return None
    with distributed.together():
        return base_perplexity(parts.training.model, parts.unrelated, progress)


def _begin(config: RunConfig[Any], base: Base, inputs: Inputs, device: torch.device) -> Training:
    """Bring the model with its adapter into the form in which it trains, and make its optimizer.

    The order matters: the final dtypes come before the move to the device, which would else need
    room for the base in float32, and before sharding, which comes before compiling.
    """
    model = base.model
    per_epoch = steps_per_epoch(inputs.splits["train"], config.batch_size)
    check_steps(model, config.epochs * per_epoch)
    set_dtype(model, config.dtype, device)
    if not base.pieces:
        model.to(device)
    check_room(model)
    if config.activation_checkpointing:
        checkpoint_activations(model)
    if config.shard or config.offload:
        distributed.shard(model, base.pieces, config.seed, config.offload, device)
    if config.compile:
        model.compile(dynamic=True)
    if inputs.corpus.task == "text":
        with autocast(model):
            check_language(model, config.packing)
    assert config.learning_rate is not None
    training = begin(model, config.learning_rate, config.weight_decay, config.seed)
    distributed.same(list(state.values(model).values()))
    return training


def _take_folder(
    parts: Prepared, directory: Path, resumed: bool, progress: Progress, stack: ExitStack
) -> tuple[Path | None, str]:
    """Make the run's folder and lock it until `stack` ends, or find the checkpoint to resume from.

    Returns the checkpoint (None if there is none), and the note on the data.
    """
    checkpoint, note = None, "; ".join(parts.corpus.notes)
    with distributed.alike():
        if distributed.rank() == 0:
            tokens = digest(parts.splits["train"])
            if not resumed:
                create(directory, parts.config, parts.given, parts.source, tokens, parts.device)
                stack.enter_context(alone(directory))
            else:
                checkpoint, note = checkpoint_to_resume(
                    directory,
                    parts.source,
                    tokens,
                    parts.device,
                    lambda text: say(progress, text),
                )
                (directory / DIVERGED).unlink(missing_ok=True)
    return distributed.gather(checkpoint)[0], note


@dataclass(frozen=True)
class _Result:
    """The scores on the held-out split."""

    final: Evaluation
    rows: list[dict[str, Any]]  # one for each answer
    baseline: dict[str, float] | None  # metrics with the adapter off
    forgetting: Forgetting | None


def hyperparameters(config: RunConfig[Any], corpus: Corpus) -> Hyperparameters:
    """What fit() takes of a run's configuration and data."""
    return Hyperparameters(
        config.epochs, config.batch_size, config.micro_batch_size, config.warmup, config.schedule,
        config.max_grad_norm, config.seed, corpus.class_weights, config.label_smoothing,
    )  # fmt: skip


class _Loop:
    """The training of a run: steps, evaluations on dev, checkpoints; then the held-out split."""

    def __init__(
        self,
        parts: Prepared,
        directory: Path,
        record: Record,
        progress: Progress,
        memory: PeakMemory,
        before: float | None,
    ) -> None:
        self.parts, self.config, self.training = parts, parts.config, parts.training
        self.directory, self.record, self.progress = directory, record, progress
        self.folder, self.first = directory / CHECKPOINTS, distributed.rank() == 0
        self.memory = memory
        self.before = before  # the perplexity of --unrelated-text
        self.config_bytes = (directory / "config.toml").read_bytes()
        self.per_epoch = steps_per_epoch(parts.splits["train"], self.config.batch_size)
        self.total = self.config.epochs * self.per_epoch
        self.screen = TrainingScreen(progress, self.config.epochs, self.total, self.training.step)
        self.phase = ""  # what is done besides training steps, for errors
        self.warned = False  # of a single class
        self.resume_command = command("lora", "train", "--resume", directory)

    def run(self, stop: Callable[[], int]) -> _Result:
        """Train from where the training is to its end, save the adapter, and score it.

        Raises StoppedError after a signal, and TrainingError if the training diverges or memory
        runs out; both say how to continue.
        """
        try:
            with self.memory.training(self.training.model):
                self._train(stop)
            self._load_best()
            self._save_adapter()
            return self._score_held_out()
        except TargetError:
            if not self.first:
                raise SystemExit(2) from None  # every rank finds the same, and rank 0 reports it
            raise
        except (TrainingError, MemoryError, RuntimeError) as error:
            if not isinstance(error, TrainingError) and not out_of_memory(error):
                raise
            raise self._explained(error) from None

    def _train(self, stop: Callable[[], int]) -> None:
        config, training = self.config, self.training
        settings = hyperparameters(config, self.parts.corpus)
        # A run that was killed between a checkpoint and its evaluation has still to evaluate.
        unscored = training.step > 0 and self._evaluates(training.step)
        if not (unscored and self._evaluate()):
            data = self.parts.splits["train"]
            for step in fit(training, data, self.parts.corpus.task, settings, stop):
                self.record.step(step)
                self.screen.step(step)
                if step.stop or self._saves(step.step):
                    self._save_checkpoint()
                if step.stop:
                    raise StoppedError(
                        f"{signal.Signals(step.stop).name} after step {step.step} of {self.total},"
                        f" which is saved. Resume with {self.resume_command}",
                        step.stop,
                    )
                if self._evaluates(step.step) and self._evaluate():
                    patience = config.early_stopping
                    say(self.progress, f"no better for {patience} evaluations: stopping early.")
                    break
        self.screen.done()

    def _evaluates(self, step: int) -> bool:
        return step % (self.config.eval_steps or self.per_epoch) == 0 or step == self.total

    def _saves(self, step: int) -> bool:
        every = self.config.save_steps
        return self._evaluates(step) or (every is not None and step % every == 0)

    def _evaluate(self) -> bool:
        """Evaluate on dev. True if the training is to stop early."""
        step, corpus = self.training.step, self.parts.corpus
        self.phase = f"evaluating after step {step}: "
        split, rows = self.parts.splits["dev"], corpus.dev
        with self.memory.paused():
            dev = evaluate(self.training.model, corpus, split, rows, progress=self.progress)
        dev = replace(dev, metrics=leading(dev.metrics, self.config.metric))
        self.phase = ""
        self.screen.evaluation(self.record.evaluation(step, step / self.per_epoch, dev))
        self._warn_of_a_single_class(dev)
        patience = self.config.early_stopping
        return patience is not None and evaluations_since_best(self.record.evaluations) >= patience

    def _warn_of_a_single_class(self, dev: Evaluation) -> None:
        """Say once if all rows of dev are predicted as one class."""
        if self.warned or self.parts.corpus.task != "classification":
            return
        predictions = predicted(self.parts.corpus, dev.logits)
        if warning := _single_class(self.parts, predictions, "dev"):
            say(self.progress, f"note: {warning}")
            self.warned = True

    def _save_checkpoint(self) -> None:
        state.save_training(self.training, self.folder, self.config_bytes, self.record.mark())
        if self.first:
            last = max(1, self.config.keep_last)
            evaluations, step = self.record.evaluations, self.training.step
            state.prune(self.folder, kept(self.config, self.folder, evaluations, step, last))

    def _load_best(self) -> None:
        """With --final best, load the best checkpoint unless the model is that one already."""
        best = best_step(self.record.evaluations)
        if self.config.final != "best" or best == self.training.step:
            return
        path = state.checkpoint_folder(self.folder, best)
        with distributed.alike():
            if wrong := state.damage(path):
                raise CheckpointError(
                    f"{path}, the best, is damaged: {wrong}. Bring it back, or remove"
                    f" {self.folder} and start over: {self.resume_command}."
                )
            state.restore_training(self.training, path)
        say(self.progress, f"the best checkpoint is that of step {best}.")

    def _save_adapter(self) -> None:
        adapter = self.directory / "adapter"
        with distributed.alike():
            save(self.training.model, adapter, writes=self.first)
            if self.first and (self.config.add_tokens or self.config.resize_embeddings):
                self.parts.base.tokenizer.save_pretrained(adapter)

    def _score_held_out(self) -> _Result:
        model, (name, rows) = self.training.model, self.parts.corpus.held_out
        split = (
            self.parts.base.tokenizer, self.parts.corpus, self.parts.splits[name], rows,
            self.progress,
        )  # fmt: skip
        self.phase = f"evaluating on {name} after the last step: "
        final, answers = scored(self.config, model, *split)
        baseline = None
        if self.config.baseline:
            self.phase = f"evaluating the base on {name}: "
            with disabled(model):
                baseline = scored(self.config, model, *split)[0].metrics
        return _Result(final, answers, baseline, self._forgetting())

    def _forgetting(self) -> Forgetting | None:
        """The perplexity of --unrelated-text before and after training."""
        text = self.parts.unrelated
        if text is None or self.before is None:
            return None
        self.phase = f"evaluating on {text.source} after the last step: "
        after = perplexity(self.training.model, text, self.progress)
        return Forgetting(source=text.source, tokens=text.tokens, before=self.before, after=after)

    def _explained(self, error: BaseException) -> TrainingError:
        """The error with its cause, the last good checkpoint, and what to do next."""
        # A TrainingError with a cause is a rank that is gone. One without is a loss that is not
        # finite, which every rank finds, so rank 0 alone reports it.
        diverged = isinstance(error, TrainingError) and error.__cause__ is None
        step = self.training.step
        if diverged and not self.first:
            raise SystemExit(2) from None
        if diverged and self.phase:  # a model that cannot be scored is not worth resuming
            state.prune(self.folder, set(state.steps(self.folder)) - {step})
        if diverged and not step:
            text = (
                f"{error} This is the first step, so the cause is the base or the data, not the"
                " learning rate. Set --dtype float32, or pass another base."
            )
        elif diverged:
            rate = f"{self.config.learning_rate:g}"
            text = f"{error} Run again with a lower --learning-rate than {rate}."
        elif isinstance(error, TrainingError):
            text = f"{error} Resume with {self.resume_command}."
        else:
            text = _memory_advice(error, "" if self.phase else f"step {step + 1}: ", self.config)
        if diverged:
            with suppress(RunError):  # without the file it is a run that was interrupted
                table = {"step": step, "error": f"{self.phase}{error}"}
                write_file(self.directory / DIVERGED, json.dumps(table).encode())
        good, _ = state.find(self.folder)
        return TrainingError(f"{self.phase}{text} Last good checkpoint: {good or 'none'}.")


def out_of_memory(error: BaseException) -> bool:
    """True if memory ran out. torch's CPU allocator has no exception type for it."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or "can't allocate memory" in str(error)


def _memory_advice(error: BaseException, step: str, config: RunConfig[Any]) -> str:
    """Where memory ran out (`step` is "" in an evaluation), and which settings need less."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    half = max(1, (config.micro_batch_size or config.batch_size) // 2)
    flag = f"--micro-batch-size {half}, " if step else ""  # evaluations do not depend on it
    return (
        f"{step}out of memory ({reason}). Run again with {flag}a smaller --max-length, or"
        " --quantize nf4."
    )


def _summary(parts: Prepared, result: _Result, record: Record) -> dict[str, Any]:
    """summary.json, but for the note, the time, the memory and the adapter's size."""
    config, corpus, report = parts.config, parts.corpus, parts.report
    name, rows = corpus.held_out
    train_seconds = sum(row["seconds"] for row in record.evaluations)
    return {
        "method": label(config.method),
        **({"name": config.name} if config.name else {}),
        "task": corpus.task,
        "base": config.base,
        "data": " ".join(config.data),
        "seed": config.seed,
        "note": "",
        "trainable": report.trainable,
        "adapter_parameters": report.adapter_parameters,
        "parameters": report.total,
        "learning_rate": config.learning_rate,
        "evaluations": record.evaluations,
        "step": parts.training.step,
        "split": name,
        "rows": len(rows),
        "loss": result.final.loss,
        "metrics": result.final.metrics,
        **({} if result.baseline is None else {"baseline": result.baseline}),
        **({"majority": _majority(corpus)} if corpus.task == "classification" else {}),
        **({} if result.forgetting is None else {"forgetting": result.forgetting}),
        "train_seconds": train_seconds,
        "tokens_per_second": record.tokens / train_seconds,
        "seconds": 0.0,
        "peak_bytes": 0,
        "dtype": config.dtype,
    }


def _adapter_bytes(directory: Path) -> int:
    """The size of the saved adapter, or of the whole model that full fine-tuning saves."""
    return sum(path.stat().st_size for path in (directory / "adapter").glob("*.safetensors"))


def _single_class(parts: Prepared, predictions: Sequence[str], split: str) -> str:
    """A warning if all rows of dev or test are predicted as one class, else ""."""
    config, corpus = parts.config, parts.corpus
    references = [str(example.label) for example in getattr(corpus, split)]
    assert config.learning_rate is not None
    shown = [corpus.shown(label) for label in predictions]
    wanted = [corpus.shown(label) for label in references]
    return single_class(shown, wanted, split, config.learning_rate, bool(corpus.class_weights))


def _majority(corpus: Corpus) -> dict[str, float]:
    """The accuracy of the most frequent class of train on the other splits."""
    train = [str(example.label) for example in corpus.train]
    others = {"dev": corpus.dev, "test": corpus.test}
    return {
        name: majority(train, [str(example.label) for example in rows])
        for name, rows in others.items()
        if rows
    }


def _write_result(
    config: RunConfig[Any],
    directory: Path,
    record: Record,
    result: _Result,
    summary: dict[str, Any],
) -> None:
    """Write predictions.jsonl and summary.json, then remove the checkpoints that are not kept."""
    write_lines(directory / "predictions.jsonl", result.rows)
    payload = json.dumps(summary, indent=2, allow_nan=False).encode()
    write_file(directory / "summary.json", payload)
    # Not before: a run that is killed until here resumes from its last checkpoint.
    folder, step = directory / CHECKPOINTS, record.evaluations[-1]["step"]
    state.prune(folder, kept(config, folder, record.evaluations, step, config.keep_last))
    with suppress(OSError):  # empty with --keep-last 0: then remove the folder too
        folder.rmdir()
