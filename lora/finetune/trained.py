"""From a run, or an adapter alone, back to its model: eval, predict, merge."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from torch import Tensor

from lora import nf4
from lora.checkpoint import load
from lora.errors import ConfigError, DataError, MergeError, RunError, command
from lora.files import writable
from lora.finetune import distributed
from lora.finetune.assemble import add_adapter, build_base, check_head, quantizes_later
from lora.finetune.config import RunConfig
from lora.finetune.data.columns import Columns
from lora.finetune.data.conversations import Conversation, from_row, read_prompts
from lora.finetune.data.corpus import Corpus, Example, examples_of, read_split, unlabelled
from lora.finetune.data.encoding import refuse_prompts
from lora.finetune.data.messages import Message
from lora.finetune.data.rows import BadRows
from lora.finetune.data.templates import template_of
from lora.finetune.data.tokens import Encoded, collate, layout
from lora.finetune.evaluate import EVALUATED, predict, records_of
from lora.finetune.generate import Writing, padded, row_of, scored, written
from lora.finetune.inputs import (
    asked,
    decoder_start,
    encoded_of,
    hand_on,
    prompts_of,
    read_corpus,
    read_texts,
    screened,
    thought_end,
)
from lora.finetune.memory import hold
from lora.finetune.methods import method_named
from lora.finetune.models import load_tokenizer
from lora.finetune.record import answers_of, environment_of, summary_of, write_lines
from lora.finetune.run_folder import check_free
from lora.finetune.screen import progress_bar, reading
from lora.finetune.source import Source, open_source
from lora.finetune.weights import FLOATS
from lora.injection import disabled, eject
from lora.merging import merge, output_on

Acts = Literal["on", "off", "both"]
WrittenDtype = Literal["base", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Trained:
    """A model and all that its answers need."""

    config: RunConfig[Any]
    model: Any
    tokenizer: Any
    device: torch.device
    stored: torch.dtype  # of the base's files


def reopen(source: Source | Path, base: str | None = None) -> Trained:
    """The model of a run directory, or of an adapter's folder: its base with its adapter on, held
    as it is trained. `base` is where the base is now, if not where it was."""
    trained = _reopened(source if isinstance(source, Source) else open_source(source, base))
    hold(trained.model, trained.config.dtype)
    return trained


def _reopened(source: Source) -> Trained:
    """The same in the dtype of its base."""
    config = source.config
    fits = source.adapter if source.resizes else None
    base = build_base(config, config.labels, config.task, adapter=fits)
    if quantizes_later(config):  # the same start again, so that the base is quantized as it was
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
    device = distributed.device()
    config = source.settle(base.model, tokenizer)
    stored = base.stored if base.stored in FLOATS.values() else None
    model = base.model.to(device).eval()
    return Trained(config, model, tokenizer, device, stored or torch.float32)


def newest_runs(folder: Path = Path("runs")) -> list[Path]:
    """The newest complete run of each method under a folder."""
    found = sorted(folder.glob("*/summary.json"), key=lambda path: path.stat().st_mtime)
    newest: dict[str, Path] = {}
    for path in found:
        with suppress(RunError):  # a damaged run is no reason to hide the others
            newest[summary_of(path.parent)["method"]] = path.parent
    if not newest:
        raise RunError(
            f"no complete run under {folder}/. Run python scripts/train_lora_distilbert.py."
        )
    return list(newest.values())


def rescore(
    source: Source,
    data: str | None,
    split: str | None,
    columns: Columns,
    skip_bad_lines: int = 0,
) -> dict[str, float]:
    """A model's scores on a split of its run's own data or of other data."""
    directory = source.directory
    if data is None and source.alone:
        raise ConfigError(f"{directory} is an adapter alone, without data of its own. Pass --data.")
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
                        f"note: {corpus.source} is not as it was when {directory} was trained: rows"
                        f" of {name} may be among those that it learned from.",
                        soft_wrap=True, markup=False,
                    )  # fmt: skip
            elif config.task == "text":
                config = replace(config, data=(data,), weights={})
                corpus, name = read_texts(data, split, skip_bad_lines)
            else:
                corpus, name = read_split(
                    data,
                    columns,
                    asked(config),
                    (config.task, config.labels),
                    split,
                    skip_bad_lines,
                )
            examples = examples_of(corpus, name)
            if config.task != "text":
                _check_pairs(source, examples)
            encoded = _encoded(trained, corpus, examples)
            notes = [corpus.note] if data is not None else []
            if config.task == "text":
                corpus, skipped = screened(corpus)
                examples, notes = examples_of(corpus, name), [*notes, *skipped]
            _say(progress, *corpus.said, *filter(None, notes))
        parts = trained.model, trained.tokenizer, corpus, encoded, examples
        found, _ = scored(config, *parts, progress)
    return {"loss": found.loss, **found.metrics}


def predict_texts(
    source: Source,
    texts: Sequence[str],
    pairs: Sequence[str],
    data: str | None,
    output: Path | None,
    columns: Columns,
    skip_bad_lines: int = 0,
) -> None:
    """Label texts, or the rows of a file, with a model; one that writes answers them."""
    config = source.config
    if config.task == "text":
        if pairs or columns != Columns():
            raise ConfigError(
                f"{source.directory} answers prompts: --pair and columns say nothing there."
            )
        writing = Writing(max_new_tokens=config.max_new_tokens)
        return answer(source, texts, data, output, writing, skip_bad_lines=skip_bad_lines)
    if (data is None) == (not texts):
        raise DataError("one of --text and --data FILE is needed.")
    if data is None and columns != Columns():
        raise ConfigError("columns are of --data. Leave --text-column and its like out.")
    if pairs and len(pairs) != len(texts):
        raise DataError(f"{len(texts)} texts and {len(pairs)} pairs. Pass one --pair per --text.")
    _check_output(output)
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(source)
            config = trained.config
            if data is not None:
                examples, notes = unlabelled(
                    data, columns, asked(config), config.labels, skip_bad_lines
                )
                _say(progress, *notes)
            else:
                examples = [
                    Example(text, pairs[i] if pairs else None, None) for i, text in enumerate(texts)
                ]
            _check_pairs(source, examples)
            corpus = Corpus(str(data), config.task, config.labels, (), (), ())
            encoded = _encoded(trained, corpus, examples, labelled=False)
        logits = predict(trained.model, encoded, EVALUATED, progress)
    _put_out(records_of(corpus, examples, logits), output)
    return None


def _say(progress: Progress, *lines: str) -> None:
    for line in lines:
        progress.console.print(f"note: {line}", soft_wrap=True, markup=False, highlight=False)


def _check_output(output: Path | None) -> None:
    """Raise RunError where a file could not be made."""
    if output is None:
        return
    with writable(output, RunError, "Pass another --output."):
        there = output.exists()
    if there:
        raise RunError(f"--output {output} exists. Pass another, or remove it.")
    if not output.absolute().parent.is_dir():
        raise RunError(f"--output {output}: {output.parent} is no folder. Make it first.")


def _put_out(rows: Iterable[dict[str, Any]], output: Path | None) -> None:
    """Into the file, or as JSON lines on standard output."""
    if output is not None:
        write_lines(output, rows)
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
    """Answer prompts, or those of a file, with a model: a row each, and of a model with its
    adapter on and off the answer of the base beside the other."""
    if (data is None) == (not prompts):
        raise DataError("one of --text (of lora generate: --prompt) and --data FILE is needed.")
    _check_output(output)
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(source)
            if data is None:
                asked = [conversation(trained, [Message("user", one)], system) for one in prompts]
            else:
                bare = trained.config.template == "none"
                # A prompt without an answer does not say how it is meant: as those of the run.
                bad = BadRows(skip_bad_lines)
                asked = [one if one.references else replace(one, raw=bare and one.raw)
                         for one in read_prompts(data, bad=bad)]  # fmt: skip
                refuse_prompts(template_of(trained.tokenizer, trained.config.template), asked, bad)
                asked = bad.usable(asked)
                _say(progress, *bad.judge(left=bool(asked)))
        texts = answers(trained, asked, writing, adapter, progress)
    end = thought_end(trained.config, trained.tokenizer)
    found = {
        acts: [row_of(one, text, thought_end=end) for one, text in zip(asked, some, strict=True)]
        for acts, some in texts.items()
    }
    rows = found["off" if adapter == "off" else "on"]
    if adapter == "both":
        beside = [row["prediction"] for row in found["off"]]
        rows = [row | {"base": text} for row, text in zip(rows, beside, strict=True)]
    _put_out(rows, output)


def conversation(
    trained: Trained, messages: Sequence[Message], system: str | None = None
) -> Conversation:
    """Messages as the run's model was trained on them."""
    raw = trained.config.template == "none"
    said = (Message("system", system),) if system else ()
    return Conversation((*said, *messages), place="the prompt", raw=raw)


def answers(
    trained: Trained,
    asked: Sequence[Conversation],
    writing: Writing,
    adapter: Acts = "on",
    progress: Progress | None = None,
    streamed: Callable[[str], None] | None = None,
) -> dict[str, list[str]]:
    """What the model writes to each, by "on" and "off" as the adapter is."""
    model, tokenizer = trained.model, trained.tokenizer
    ids, stops = prompts_of(trained.config, tokenizer, model, asked)
    found = {}
    for acts in ("on", "off") if adapter == "both" else (adapter,):
        with nullcontext() if acts == "on" else disabled(model):
            found[acts] = written(
                model, tokenizer, ids, writing, stops, progress=progress, streamed=streamed
            )
    return found


def _encoded(
    trained: Trained, corpus: Corpus, examples: Sequence[Any], labelled: bool = True
) -> Encoded:
    parts = trained.tokenizer, trained.model, examples, labelled
    return encoded_of(trained.config, corpus, *parts)[0]


def _check_pairs(source: Source, examples: Sequence[Example]) -> None:
    """Raise DataError where pairs go to a model of single texts, or the other way round; an adapter
    alone does not tell which it is of."""
    found, config = any(example.pair is not None for example in examples), source.config
    if not source.alone and found != (config.pair_column is not None):
        was = "pairs" if config.pair_column else "single texts"
        raise DataError(
            f"{source.directory} was trained on {was}, found"
            f" {'pairs' if found else 'single texts'}. Pass what it was trained on: --pair for a"
            " pair's second text, and in a file --text-column and --pair-column."
        )


def merge_run(
    source: Source,
    output: Path,
    dequantize: bool = False,
    untie: bool = False,
    dtype: WrittenDtype = "base",
    tolerance: float | None = None,
) -> str:
    """Write a model as a plain one into a new folder; what was merged, and how far that, and the
    rounding to the dtype that it is written in, moved the logits of the run's first texts."""
    check_free(output, "--output", "model")
    directory = source.directory
    with progress_bar() as progress, reading(progress):
        trained = _reopened(source)
        model, probe = trained.model, _probe_batch(trained, directory)
        packed = sum(isinstance(module, nf4.NF4Linear) for module in model.modules())
        if packed and not dequantize:
            raise RunError(
                f"{directory} has its base in NF4, whose 16 levels cannot hold a merged weight."
                f" Run {command('lora', 'merge', directory, '--dequantize')}: into the dequantised"
                " base."
            )
        if dequantize and not packed:
            raise ConfigError(f"--dequantize: {directory} has no base in NF4. Leave it out.")
        said = f"into the base {trained.config.base}"
        if packed:
            nf4.dequantize_layers(model)
            said = f"into {packed} dequantised layers, not the original ones of the base"
        if method_named(trained.config.method).keeps_base:
            said = f"{merge(model, untie, probe, tolerance)}; {said}"
        else:
            said = f"nothing to merge: {trained.config.method} trained the base itself"
        eject(model)
        said += f"; {_round(model, trained.stored, dtype, probe)}"
        if trained.config.task == "text":
            hand_on(trained.config, trained.tokenizer, model)
        making = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        try:
            with writable(output, RunError):
                model.save_pretrained(making)
                trained.tokenizer.save_pretrained(making)
                making.rename(output)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return said


def _round(model: Any, stored: torch.dtype, asked: WrittenDtype, probe: dict[str, Tensor]) -> str:
    """Round a model in float32 to the dtype that it is to be written in; what that did to its
    outputs."""
    dtype = stored if asked == "base" else getattr(torch, asked)
    short = str(dtype).removeprefix("torch.")
    said = f"written in {short}, {'as asked' if asked != 'base' else 'as the base is'}"
    if dtype != torch.float32:
        before = output_on(model, probe)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype).float()
            if not parameter.isfinite().all():
                raise MergeError(
                    f"merge: {name} holds numbers that {short} cannot. Pass --dtype float32, or"
                    " bfloat16."
                )
        moved = float((output_on(model, probe) - before).abs().max())
        said += f": rounding moved the outputs by {moved:.3g}"
    model.to(dtype)
    return said


def _probe_batch(trained: Trained, directory: Path) -> dict[str, Tensor]:
    """The first texts that the run answered, as one batch; before its end, a text."""
    path = directory / "predictions.jsonl"
    config, task = trained.config, trained.config.task
    rows = answers_of(directory, task, 8) or [{"text": "a", "prompt": "a"}]
    corpus = Corpus(str(path), task, (), (), (), ())
    if task == "text":
        asked = [one for row in rows for one in from_row(row, str(path), answered=False)]
        ids, _ = prompts_of(config, trained.tokenizer, trained.model, asked)
        model = trained.model
        batch = padded(model, ids, trained.tokenizer.pad_token_id, trained.device)
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"], decoder_start(model))
        return batch
    examples = [Example(row["text"], row.get("pair"), None) for row in rows]
    encoded = _encoded(trained, corpus, examples, labelled=False)
    return collate(encoded, layout(encoded, range(len(examples))), trained.device)[0]


def system_of(directory: Path) -> str | None:
    """The system prompt that a run's conversations began with, the most frequent if there are
    several; None if they had none, or the run did not come to its end."""
    rows = answers_of(directory, "text", 100)
    first = [from_row(row, str(directory), answered=False)[0].messages[0] for row in rows]
    found = Counter(one.content for one in first if one.role == "system")
    return found.most_common(1)[0][0] if found else None
