"""Loads the model of a run or of an adapter's folder: eval, predict, generate and merge."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress

from lora.checkpoint import load
from lora.errors import ConfigError, DataError, RunError
from lora.files import writable
from lora.finetune import distributed
from lora.finetune.assemble import add_adapter, build_base, check_head, quantizes_later
from lora.finetune.class_report import ClassReport, class_report
from lora.finetune.config import RunConfig
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import Conversation, from_row, read_prompts
from lora.finetune.data.corpus import Corpus, Example, examples_of, read_split, unlabelled
from lora.finetune.data.encoding import refuse_prompts
from lora.finetune.data.messages import Message
from lora.finetune.data.rows import BadRows
from lora.finetune.data.templates import template_of
from lora.finetune.data.tokens import Encoded
from lora.finetune.evaluate import EVALUATED, predict, records_of
from lora.finetune.generate import Writing, row_of, scored, written
from lora.finetune.inputs import (
    columns_in,
    encoded_of,
    prompts_of,
    read_corpus,
    read_texts,
    screened,
    thought_end,
)
from lora.finetune.memory import set_dtype
from lora.finetune.models import load_tokenizer
from lora.finetune.record import answers_of, environment_of, summary_of, write_lines
from lora.finetune.screen import progress_bar, reading
from lora.finetune.source import Source, open_source
from lora.finetune.weights import FLOATS
from lora.injection import disabled, eject

Acts = Literal["on", "off", "both"]


@dataclass(frozen=True)
class Trained:
    """A model and everything needed to run it on texts."""

    config: RunConfig[Any]
    model: Any
    tokenizer: Any
    device: torch.device
    stored: torch.dtype  # dtype of the base's files


def reopen(source: Source | Path, base: str | None = None) -> Trained:
    """Loads the model of a run directory or of an adapter's folder: the base with the adapter, in
    the dtype that training uses. `base` is the new path of the base if it has moved."""
    opened = source if isinstance(source, Source) else open_source(source, base)
    trained = _on_cpu(opened)
    set_dtype(trained.model, trained.config.dtype, trained.device)
    trained.model.to(trained.device)
    return trained


def reopen_in_base_dtype(source: Source) -> Trained:
    """Loads the same model in the dtype of its base, to merge it."""
    trained = _on_cpu(source)
    trained.model.to(trained.device)
    return trained


def _on_cpu(source: Source) -> Trained:
    """Loads the model, which is still on the CPU. `device` is where it is to go."""
    config = source.config
    resized_by = source.adapter if source.resizes else None
    base = build_base(config, config.labels, config.task, adapter=resized_by)
    if base.note:
        print(base.note, file=sys.stderr)
    if quantizes_later(config):  # initialize again, so that the base is quantized as in training
        add_adapter(config, base)
        eject(base.model)
    report = load(base.model, source.adapter, resize_embeddings=source.resizes)
    tokenizer = base.tokenizer
    if source.alone:
        check_head(base, report, config.base, source.adapter)
        if (source.adapter / "tokenizer_config.json").is_file():
            tokenizer = load_tokenizer(str(source.adapter), base.model, config.task)
        if report.note:
            print(f"note: {report.note}", file=sys.stderr)
    device = distributed.device(config.device)
    config = source.settle(base.model, tokenizer)
    stored = base.stored if base.stored in FLOATS.values() else None
    return Trained(config, base.model.eval(), tokenizer, device, stored or torch.float32)


def newest_runs(folder: Path = Path("runs")) -> list[Path]:
    """Returns the newest complete run of each method under a folder. Raises RunError."""
    summaries = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    newest: dict[str, Path] = {}
    for path in summaries:
        with suppress(RunError):  # skip a damaged run, show the others
            newest[summary_of(path.parent)["method"]] = path.parent
    if not newest:
        raise RunError(
            f"{folder}/ has no complete run. Run python scripts/train_lora_distilbert.py."
        )
    return list(newest.values())


def rescore(
    source: Source,
    data: str | None,
    split: str | None,
    columns: Columns,
    skip_bad_lines: int = 0,
) -> tuple[dict[str, float], ClassReport | None]:
    """Returns a model's scores on a split of its run's data or of other data; of a classifier also
    those of each class."""
    directory = source.directory
    if data is None and source.alone:
        raise ConfigError(
            f"{directory} is an adapter without its run, so it does not name any data. Pass --data."
        )
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(source)
            config = trained.config
            if data is None:
                corpus = read_corpus(config)
                name = split or corpus.held_out[0]
                known = (directory / "environment.json").is_file()
                if known and environment_of(directory)["data"] != corpus.digest():
                    progress.console.print(
                        f"note: {corpus.source} has changed since {directory} was trained: rows"
                        f" of {name} may be rows that the model was trained on.",
                        soft_wrap=True, markup=False,
                    )  # fmt: skip
            elif config.task == "text":
                config = replace(config, data=(data,), weights={})
                corpus, name = read_texts(data, split, skip_bad_lines)
            else:
                corpus, name = read_split(
                    data,
                    columns,
                    columns_in(config),
                    (config.task, config.labels),
                    split,
                    skip_bad_lines,
                )
                corpus = replace(corpus, class_names=config.class_names)
            examples = examples_of(corpus, name)
            if config.task != "text":
                _check_pairs(source, examples)
            encoded = encode_examples(trained, corpus, examples)
            notes = corpus.notes if data is not None else ()
            if config.task == "text":
                corpus, skipped = screened(corpus)
                examples, notes = examples_of(corpus, name), (*notes, *skipped)
            _say(progress, *corpus.summary, *notes)
        parts = trained.model, trained.tokenizer, corpus, encoded, examples
        result, rows = scored(config, *parts, progress)
    metrics = {"loss": result.loss, **result.metrics}
    if corpus.task != "classification":
        return metrics, None
    pairs = [row["prediction"] for row in rows], [row["label"] for row in rows]
    return metrics, class_report(*pairs, corpus.labels, corpus.class_names)


def predict_texts(
    source: Source,
    texts: Sequence[str],
    pairs: Sequence[str],
    data: str | None,
    output: Path | None,
    columns: Columns,
    skip_bad_lines: int = 0,
) -> None:
    """Label texts, or the rows of a file, with a model. A language model answers them instead."""
    config = source.config
    if config.task == "text":
        if pairs or columns != Columns():
            raise ConfigError(
                f"{source.directory} is a language model: --pair, --header and the column flags"
                " have no effect with it. Remove them."
            )
        writing = Writing(max_new_tokens=config.max_new_tokens)
        return answer(source, texts, data, output, writing, skip_bad_lines=skip_bad_lines)
    if (data is None) == (not texts):
        raise DataError("pass either --text TEXT or --data FILE.")
    if data is None and columns != Columns():
        raise ConfigError("--header and the column flags have no effect with --text. Remove them.")
    if pairs and len(pairs) != len(texts):
        raise DataError(
            f"found {len(texts)} texts and {len(pairs)} pairs. Pass one --pair for each --text."
        )
    _check_output(output)
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(source)
            config = trained.config
            if data is not None:
                examples, notes = unlabelled(
                    data, columns, columns_in(config), config.labels, skip_bad_lines
                )
                _say(progress, *notes)
            else:
                examples = [
                    Example(text, pairs[i] if pairs else None, None) for i, text in enumerate(texts)
                ]
            _check_pairs(source, examples)
            corpus = Corpus(
                str(data), config.task, config.labels, (), (), (), class_names=config.class_names
            )
            encoded = encode_examples(trained, corpus, examples, labelled=False)
        logits = predict(trained.model, encoded, EVALUATED, progress)
    _put_out(records_of(corpus, examples, logits), output)
    return None


def _say(progress: Progress, *lines: str) -> None:
    for line in lines:
        progress.console.print(f"note: {line}", soft_wrap=True, markup=False, highlight=False)


def _check_output(output: Path | None) -> None:
    """Raise RunError if the file exists or could not be created."""
    if output is None:
        return
    with writable(output, RunError, "Pass another --output."):
        exists = output.exists()
    if exists:
        raise RunError(f"--output {output} exists. Pass another, or remove it.")
    if not output.absolute().parent.is_dir():
        raise RunError(
            f"--output {output}: the folder {output.parent} does not exist. Create it first."
        )


def _put_out(rows: Iterable[dict[str, Any]], output: Path | None) -> None:
    """Write the rows to the file, or print them as JSON lines."""
    if output is not None:
        write_lines(output, rows)
        print(f"written: {output}")
        return
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))


def answer(
    source: Source,
    prompts: Sequence[str],
    data: str | None,
    output: Path | None,
    writing: Writing,
    adapter: Acts = "on",
    system: str | None = None,
    skip_bad_lines: int = 0,
) -> None:
    """Answer prompts, or those of a file, with a model, one row per prompt. With `adapter` "both"
    each row also has the base's answer."""
    if (data is None) == (not prompts):
        raise DataError("pass either --prompt (lora predict: --text) or --data FILE.")
    _check_output(output)
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(source)
            if data is None:
                talks = [conversation(trained, [Message("user", p)], system) for p in prompts]
            else:
                bare = trained.config.template == "none"
                # A row with only a prompt could be a text or a turn: it is read as in training.
                bad = BadRows(skip_bad_lines)
                talks = [talk if talk.references else replace(talk, raw=bare and talk.raw)
                         for talk in read_prompts(data, bad=bad)]  # fmt: skip
                refuse_prompts(template_of(trained.tokenizer, trained.config.template), talks, bad)
                talks = bad.usable(talks)
                _say(progress, *bad.judge(left=bool(talks)))
        texts = answers(trained, talks, writing, adapter, progress)
    end = thought_end(trained.config, trained.tokenizer)
    results = {
        acts: [row_of(talk, text, thought_end=end) for talk, text in zip(talks, side, strict=True)]
        for acts, side in texts.items()
    }
    rows = results["off" if adapter == "off" else "on"]
    if adapter == "both":
        base_answers = [row["prediction"] for row in results["off"]]
        rows = [row | {"base": text} for row, text in zip(rows, base_answers, strict=True)]
    _put_out(rows, output)


def conversation(
    trained: Trained, messages: Sequence[Message], system: str | None = None
) -> Conversation:
    """Returns the messages as a conversation of the kind that the model was trained on."""
    raw = trained.config.template == "none"
    first = (Message("system", system),) if system else ()
    return Conversation((*first, *messages), place="the prompt", raw=raw)


def answers(
    trained: Trained,
    conversations: Sequence[Conversation],
    writing: Writing,
    adapter: Acts = "on",
    progress: Progress | None = None,
    streamed: Callable[[str], None] | None = None,
) -> dict[str, list[str]]:
    """Returns the model's answers, with the adapter "on" and "off" as `adapter` says."""
    model, tokenizer = trained.model, trained.tokenizer
    ids, stops = prompts_of(trained.config, tokenizer, model, conversations)
    results = {}
    for acts in ("on", "off") if adapter == "both" else (adapter,):
        with nullcontext() if acts == "on" else disabled(model):
            results[acts] = written(
                model, tokenizer, ids, writing, stops, progress=progress, streamed=streamed
            )
    return results


def encode_examples(
    trained: Trained, corpus: Corpus, examples: Sequence[Any], labelled: bool = True
) -> Encoded:
    parts = trained.tokenizer, trained.model, examples, labelled
    return encoded_of(trained.config, corpus, *parts)[0]


def _check_pairs(source: Source, examples: Sequence[Example]) -> None:
    """Raise DataError if a run on single texts gets pairs, or the other way round. An adapter
    without its run does not record which it was trained on."""
    paired, config = any(example.pair is not None for example in examples), source.config
    if not source.alone and paired != (config.pair_column is not None):
        was = "pairs" if config.pair_column else "single texts"
        raise DataError(
            f"{source.directory} was trained on {was}, found"
            f" {'pairs' if paired else 'single texts'}. Pass what it was trained on: --pair for a"
            " pair's second text, and in a file --text-column and --pair-column."
        )


def system_of(directory: Path) -> str | None:
    """Returns the most frequent system prompt of a run's conversations; None if they have none or
    the run is not complete."""
    rows = answers_of(directory, "text", 100)
    first = [from_row(row, str(directory), answered=False)[0].messages[0] for row in rows]
    prompts = Counter(message.content for message in first if message.role == "system")
    return prompts.most_common(1)[0][0] if prompts else None
