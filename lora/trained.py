"""From a run's directory back to its model: eval, predict, merge."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora import distributed, nf4, state
from lora.adapter import is_number
from lora.checkpoint import CONFIG, json_object, load
from lora.config import RunConfig, method_named
from lora.conversations import from_row
from lora.data import Columns, Corpus, Example, read_split, take, unlabelled
from lora.errors import ConfigError, DataError, RunError
from lora.evaluate import EVALUATED, predict, rows_of
from lora.generate import left_padded, scored
from lora.injection import eject, merge
from lora.inputs import asked, encoded_of, prompts_of, read_corpus, read_texts
from lora.models import hold
from lora.run import (
    CHECKPOINTS,
    base_of,
    check_free,
    config_of,
    progress_bar,
    put_on,
    reading,
    takes_up,
    unwritable,
    write_lines,
)
from lora.tokens import Encoded, collate, layout


@dataclass(frozen=True)
class Trained:
    """A model and all that its answers need."""

    config: RunConfig[Any]
    model: Any
    tokenizer: Any
    device: torch.device


def reopen(directory: Path) -> Trained:
    """The model of a run directory: its base with its adapter on, held as it was in training."""
    trained = _reopened(directory)
    hold(trained.model, trained.config.dtype)
    return trained


def _reopened(directory: Path) -> Trained:
    """The model of a run directory, in the dtype of its base."""
    config = config_of(directory)
    adapter = directory / "adapter"
    there = (adapter / CONFIG).is_file() or (directory / "summary.json").is_file()
    if not there:  # of a run that is not complete, that of its newest checkpoint
        path, _ = state.find(directory / CHECKPOINTS)
        if path is None:
            raise RunError(
                f"{directory}: the run ended before its first checkpoint. Go on with lora train"
                f" --resume {directory}."
            )
        print(f"note: {directory} is not complete: the adapter is that of {path}.", file=sys.stderr)
        adapter = path / "adapter"
    base = base_of(config, config.labels, config.task)
    if takes_up(config):  # the base that training began with, packed under the start that it had
        put_on(config, base)
        eject(base.model)
    load(base.model, adapter)
    device = distributed.device()
    return Trained(config, base.model.to(device).eval(), base.tokenizer, device)


def summary_of(directory: Path) -> dict[str, Any]:
    """The result of a complete run. Raises RunError where there is none, or it is damaged."""
    path = directory / "summary.json"
    if not path.is_file():
        raise RunError(f"{directory} holds no complete run: no summary.json. Run lora train.")
    kinds = {"method": str, "task": str, "metrics": dict, "evaluations": list}
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


def rescore(
    directory: Path, data: str | None, split: str | None, columns: Columns
) -> dict[str, float]:
    """A run's scores on a split of its own data or of other data."""
    with progress_bar() as progress:
        with reading(progress):
            trained = reopen(directory)
            config, where = trained.config, _columns(trained.config, columns)
            if data is None:
                corpus = read_corpus(config)
                name = split or corpus.held_out[0]
                if _learned_from(directory) not in (None, corpus.digest()):
                    progress.console.print(
                        f"note: {corpus.source} is not as it was when {directory} was trained: rows"
                        f" of {name} may be among those that it learned from.",
                        soft_wrap=True, markup=False,
                    )  # fmt: skip
            elif config.task == "text":
                config = replace(config, data=(data,), weights={})
                corpus, name = read_texts(data, split)
            else:
                corpus, name = read_split(data, where, config.task, config.labels, split)
            examples = take(corpus, name)
            if config.task != "text":
                _check_pairs(directory, config, examples)
            encoded = _encoded(trained, corpus, examples)
        parts = trained.model, trained.tokenizer, corpus, encoded, examples
        found, _ = scored(config, *parts, progress)
    return {"loss": found.loss, **found.metrics}


def _learned_from(directory: Path) -> str | None:
    """The digest of a run's data, None where the run has none to tell."""
    try:
        found = json_object((directory / "environment.json").read_bytes()).get("data")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


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
            encoded = _encoded(trained, corpus, examples, labelled=False)
        logits = predict(trained.model, encoded, EVALUATED, config.dtype, progress)
    rows = rows_of(corpus, examples, logits)
    if output is not None:
        write_lines(output, rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))


def _encoded(
    trained: Trained, corpus: Corpus, examples: Sequence[Any], labelled: bool = True
) -> Encoded:
    parts = trained.tokenizer, trained.model, examples, labelled
    return encoded_of(trained.config, corpus, *parts)[0]


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
            raise unwritable(output, error) from error
        finally:
            shutil.rmtree(making, ignore_errors=True)
    return said


def _probe(trained: Trained, directory: Path) -> dict[str, Tensor]:
    """The first texts that the run answered, as one batch; before its end, a text."""
    path = directory / "predictions.jsonl"
    whole = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json_object(line) for line in whole.splitlines()[:8]] or [{"text": "a", "prompt": "a"}]
    config, corpus = trained.config, Corpus(str(path), trained.config.task, (), (), (), ())
    if config.task == "text":
        asked = [one for row in rows for one in from_row(row, str(path), answered=False)]
        ids, _ = prompts_of(config, trained.tokenizer, trained.model, asked)
        return left_padded(ids, trained.tokenizer.pad_token_id, trained.device)
    examples = [Example(str(row["text"]), row.get("pair"), None) for row in rows]
    encoded = _encoded(trained, corpus, examples, labelled=False)
    return collate(encoded, layout(encoded, range(len(examples))), trained.device)[0]
