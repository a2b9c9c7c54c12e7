"""Merges a trained model into its base and writes the result: as a folder, or as a GGUF file."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lora import nf4
from lora.errors import ConfigError, MergeError, RunError, command
from lora.files import writable
from lora.finetune.data.conversations import from_row
from lora.finetune.data.corpus import Corpus, Example
from lora.finetune.data.tokens import collate, layout
from lora.finetune.generate import padded
from lora.finetune.inputs import decoder_start, prompts_of, set_answer_format
from lora.finetune.methods import method_named
from lora.finetune.record import answers_of
from lora.finetune.run_folder import check_free
from lora.finetune.screen import progress_bar, reading
from lora.finetune.source import Source
from lora.finetune.trained import Trained, encode_examples, reopen_in_base_dtype
from lora.injection import eject
from lora.merging import merge, output_on

WrittenDtype = Literal["base", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Merged:
    """A model without adapters."""

    trained: Trained
    probe: dict[str, Tensor]  # the run's first texts as one batch
    report: str


def merge_run(
    source: Source,
    output: Path,
    dequantize: bool = False,
    untie: bool = False,
    dtype: WrittenDtype = "base",
    tolerance: float | None = None,
) -> str:
    """Merge a model and save it as a plain one in a new folder. Returns a report: what was merged,
    and how much merging and rounding changed the logits on the run's first texts."""
    check_free(output, "--output", "model")
    with progress_bar() as progress, reading(progress):
        merged = merge_source(source, dequantize, untie, tolerance)
        trained, model = merged.trained, merged.trained.model
        report = f"{merged.report}; {_round(model, trained.stored, dtype, merged.probe)}"
        if trained.config.task == "text":
            set_answer_format(trained.config, trained.tokenizer, model)
        temporary = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
        try:
            with writable(output, RunError):
                model.save_pretrained(temporary)
                trained.tokenizer.save_pretrained(temporary)
                temporary.rename(output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return report


def merge_source(
    source: Source, dequantize: bool, untie: bool = False, tolerance: float | None = None
) -> Merged:
    """Returns a run's model, or an adapter's, merged into its base in float32.

    Raises RunError if the base is quantized and `dequantize` is False, and what merge() raises.
    """
    directory = source.directory
    trained = reopen_in_base_dtype(source)
    model, probe = trained.model, _probe_batch(trained, directory)
    packed = sum(isinstance(module, nf4.NF4Linear) for module in model.modules())
    if packed and not dequantize:
        raise RunError(
            f"{directory} has a base in NF4, whose 16 levels cannot represent a merged weight."
            " To merge into the dequantized base, run"
            f" {command('lora', 'merge', directory, '--dequantize')}."
        )
    if dequantize and not packed:
        raise ConfigError(
            f"--dequantize has no effect: the base of {directory} is not quantized. Remove it."
        )
    report = f"into the base {trained.config.base}"
    if packed:
        nf4.dequantize_layers(model)
        report = f"into {packed} dequantized layers, not the base's original weights"
    if method_named(trained.config.method).keeps_base:
        report = f"{merge(model, untie, probe, tolerance)}; {report}"
    else:
        report = f"nothing to merge: {trained.config.method} trained the base itself"
    eject(model)
    return Merged(trained, probe, report)


def _round(model: Any, stored: torch.dtype, to: WrittenDtype, probe: dict[str, Tensor]) -> str:
    """Round a float32 model to the dtype that it is saved in. Returns a report: the dtype, and how
    much rounding changed the outputs. Raises MergeError if a weight overflows."""
    dtype = stored if to == "base" else getattr(torch, to)
    short = str(dtype).removeprefix("torch.")
    report = f"saved in {short}{', the dtype of the base' if to == 'base' else ''}"
    if dtype != torch.float32:
        before = output_on(model, probe)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(dtype).float()
            if not parameter.isfinite().all():
                raise MergeError(
                    f"merge: {name} holds numbers outside the range of {short}. Set --dtype float32"
                    " or bfloat16."
                )
        moved = float((output_on(model, probe) - before).abs().max())
        report += f"; rounding changed the outputs by at most {moved:.3g}"
    model.to(dtype)
    return report


def _probe_batch(trained: Trained, directory: Path) -> dict[str, Tensor]:
    """Returns the first texts of the run's predictions.jsonl as one batch; without that file, a
    single text."""
    path = directory / "predictions.jsonl"
    config, task = trained.config, trained.config.task
    rows = answers_of(directory, task, 8) or [{"text": "a", "prompt": "a"}]
    corpus = Corpus(str(path), task, (), (), (), ())
    if task == "text":
        talks = [talk for row in rows for talk in from_row(row, str(path), answered=False)]
        ids, _ = prompts_of(config, trained.tokenizer, trained.model, talks)
        model = trained.model
        batch = padded(model, ids, trained.tokenizer.pad_token_id, trained.device)
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = torch.full_like(batch["input_ids"], decoder_start(model))
        return batch
    examples = [Example(row["text"], row.get("pair"), None) for row in rows]
    encoded = encode_examples(trained, corpus, examples, labelled=False)
    return collate(encoded, layout(encoded, range(len(examples))), trained.device)[0]
