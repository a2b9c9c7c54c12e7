"""Suggests flags for names from other tools, and lays out the texts of --help.

    hint("lr", known, as_flag)    "Did you mean --learning-rate?"
    describe_flags(TrainFlags)    what tyro shows for each flag
    usage_line("lora eval [RUN]")  the first line of the help

NEAR maps a name to our name for the same thing. HOW maps a name that has no single counterpart to a
sentence that says what to do instead.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import itertools
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from lora.declared import declared, is_list

NEAR = {
    # The adapter
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target": "target_modules",
    "targets": "target_modules",
    "lora_modules_to_save": "modules_to_save",
    "peft_type": "method",
    "peft_method": "method",
    "adapter_type": "method",
    "finetuning_type": "method",
    "adapter_name_or_path": "adapter",
    "peft_model": "adapter",
    "adapter_path": "adapter",
    # The base and the data
    "model": "base run",
    "model_id": "base run",
    "model_name": "base run",
    "model_name_or_path": "base run",
    "model_path": "base run",
    "base_model": "base",
    "pretrained_model_name_or_path": "base",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "data_path": "data",
    "data_dir": "data",
    "train_file": "data",
    "train_data": "data",
    "input_file": "data",
    "file": "data",
    "files": "data",
    "dataset_text_field": "text_column",
    "text_field": "text_column",
    "text_col": "text_column",
    "label_col": "label_column",
    "label_field": "label_column",
    "target_column": "label_column",
    "label": "label_column",
    "chat_template": "template",
    "prompt_template": "template",
    "sample_packing": "packing",
    "pack": "packing",
    "max_samples": "limit",
    "max_train_samples": "limit",
    "max_eval_samples": "dev_limit",
    "max_predict_samples": "test_limit",
    "num_samples": "limit",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_len": "max_length",
    "seq_len": "max_length",
    "seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "block_size": "max_length",
    "model_max_length": "max_length",
    "dataset_mixing": "weights",
    "forgetting": "unrelated_text",
    "perplexity_text": "unrelated_text",
    "num_labels": "labels",
    "classes": "labels",
    "class_weight": "class_weights",
    "label_smoothing_factor": "label_smoothing",
    "metric_for_best_model": "metric",
    "eval_metric": "metric",
    "scorer": "metric",
    # The training
    "lr": "learning_rate",
    "rate": "learning_rate",
    "epoch": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "bs": "batch_size",
    "batch": "batch_size",
    "train_batch_size": "batch_size",
    "total_batch_size": "batch_size",
    "per_device_batch_size": "micro_batch_size",
    "wd": "weight_decay",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "warmup_ratio": "warmup",
    "gradient_clipping": "max_grad_norm",
    "grad_clip": "max_grad_norm",
    "clip_grad_norm": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "gradient_checkpointing": "activation_checkpointing",
    "use_gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "precision": "dtype",
    "mixed_precision": "dtype",
    "torch_dtype": "dtype",
    "random_seed": "seed",
    "random_state": "seed",
    "manual_seed": "seed",
    "fsdp": "shard",
    "deepspeed": "shard",
    "cpu_offload": "offload",
    "num_gpus": "nproc",
    "gpus": "nproc",
    "n_gpu": "nproc",
    "devices": "nproc",
    "num_processes": "nproc",
    "nproc_per_node": "nproc",
    "num_devices": "nproc",
    # Files of a run
    "out": "run_dir output",
    "out_dir": "run_dir output",
    "output": "run_dir",
    "output_dir": "run_dir output",
    "output_file": "output",
    "save_dir": "run_dir output",
    "save_path": "run_dir output",
    "save_total_limit": "keep_last",
    "early_stopping_patience": "early_stopping",
    "patience": "early_stopping",
    "resume_from_checkpoint": "resume",
    "resume_from": "resume",
    "checkpoint": "resume run",
    "ckpt": "resume run",
    "config_file": "config",
    "report_to": "trackers",
    "wandb": "trackers",
    "use_wandb": "trackers",
    "wandb_project": "trackers",
    "tensorboard": "trackers",
    "name": "run_dir",
    "run_name": "run_dir",
    # Commands on a trained model
    "run_dir": "run",
    "input": "text prompt data",
    "inputs": "text prompt data",
    "texts": "text",
    "sentence": "text",
    "text": "prompt",
    "question": "prompt",
    "message": "prompt",
    "instruction": "prompt",
    "prompts": "prompt",
    "system_prompt": "system",
    "max_tokens": "max_new_tokens",
    "max_gen_len": "max_new_tokens",
    "num_predict": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "temp": "temperature",
    "dir": "run",
    "tasks": "harness",
    "tokenizer": "base",
}
"""A name elsewhere -> our names, separated by spaces: the first one of the command is suggested."""

HOW = {
    "per_device_train_batch_size": (
        "Set --batch-size to the examples per step over all devices, and --micro-batch-size to the"
        " examples that a device computes at a time."
    ),
    "per_device_eval_batch_size": "The batch size of evaluations is fixed. Remove it.",
    "gradient_accumulation_steps": (
        "Set --batch-size to the examples per step, and --micro-batch-size to the examples that are"
        " computed at a time: gradients accumulate over them."
    ),
    "load_in_4bit": "Set --quantize nf4.",
    "use_4bit": "Set --quantize nf4.",
    "qlora": "Set --quantize nf4, or --method qlora.",
    "bnb_4bit_quant_type": "Set --quantize nf4.",
    "load_in_8bit": "8 bits are not supported, 4 bits are. Set --quantize nf4.",
    "bf16": "Set --dtype bfloat16.",
    "fp16": "Set --dtype float16.",
    "half": "Set --dtype float16.",
    "fp32": "Set --dtype float32.",
    "tf32": "Set --dtype bfloat16 or float32.",
    "cuda": "Set --device cuda.",
    "gpu": "Set --device cuda.",
    "cpu": "Set --device cpu.",
    "use_cpu": "Set --device cpu.",
    "no_cuda": "Set --device cpu.",
    "mps": "Set --device mps.",
    "device_map": "Set --shard to shard the base over devices, --offload to keep it on the CPU.",
    "warmup_steps": "Set --warmup to the fraction of all steps.",
    "max_steps": "Set --epochs; --limit N uses only the first N rows.",
    "steps": "Set --epochs; --limit N uses only the first N rows.",
    "logging_steps": "Every step is logged to metrics.jsonl. Remove it.",
    "logging_dir": "Set --trackers tensorboard, which writes into --run-dir.",
    "eval_strategy": "Set --eval-steps N. The default is once per epoch.",
    "evaluation_strategy": "Set --eval-steps N. The default is once per epoch.",
    "save_strategy": "Set --save-steps N. The default is a checkpoint at each evaluation.",
    "load_best_model_at_end": "Set --final best.",
    "lora_target_linear": "Set --target-modules all-linear.",
    "use_dora": "Set --method dora.",
    "use_lora": "Set --method lora.",
    "full": "Set --method full.",
    "train_on_inputs": "Set --loss-on all.",
    "completion_only_loss": "Set --loss-on answers.",
    "assistant_only_loss": "Set --loss-on answers.",
    "optim": "The optimizer is always AdamW. Remove it.",
    "optimizer": "The optimizer is always AdamW. Remove it.",
    "adam_beta1": "AdamW uses torch's default betas. Remove it.",
    "adam_beta2": "AdamW uses torch's default betas. Remove it.",
    "attn_implementation": "torch chooses the fastest attention kernel. Remove it.",
    "use_flash_attention_2": "torch chooses the fastest attention kernel. Remove it.",
    "flash_attn": "torch chooses the fastest attention kernel. Remove it.",
    "trust_remote_code": "Code that comes with a model is never run. Remove it.",
    "tokenizer_name": "The tokenizer is always that of --base. Remove it.",
    "validation_file": "Set --data to a folder with train, dev and test files.",
    "eval_file": "Set --data to a folder with train, dev and test files.",
    "test_file": "Set --data to a folder with train, dev and test files.",
    "do_train": "Remove it: lora train always trains and evaluates.",
    "do_eval": "Remove it: lora train always evaluates; lora eval RUN does it again.",
    "do_predict": "Remove it, and run lora predict RUN.",
    "overwrite_output_dir": "Runs are never overwritten. Set another --run-dir.",
    "merge": "Run lora merge RUN --output FOLDER.",
    "merge_and_unload": "Run lora merge RUN --output FOLDER.",
    "push_to_hub": "Nothing is uploaded. Run hf upload NAME RUN/adapter.",
    "dataloader_num_workers": "Batches are prepared in the background. Remove it.",
    "verbose": "Remove it: the run's folder holds all details.",
}
"""A name elsewhere -> how to do the same here. Flags in the sentences are those of `lora train`."""


def hint(name: str, known: Collection[str], write: Callable[[str], str]) -> str:
    """Returns a sentence that suggests what to write for an unknown name: by meaning, else by
    spelling. `write` turns a name of ours into what the user types: a flag, or a key."""
    if name in HOW:
        return re.sub(r"--([a-z-]+)", lambda match: write(match[1].replace("-", "_")), HOW[name])
    near = [ours for ours in NEAR.get(name, "").split() if ours in known]
    near = near or difflib.get_close_matches(name, known, n=1)
    if near:
        return f"Did you mean {write(near[0])}?"
    return f"Known: {', '.join(sorted(map(write, known)))}."


def describe_flags(kind: type, first: str | None = None) -> None:
    """Tells tyro what --help shows for each flag of a dataclass: its docstring in one line, which
    tyro wraps to the terminal, the form of its value, and its default. `first` names the flag whose
    values may come first, without it.

    tyro itself keeps the line breaks of a docstring, and shows None among the values and defaults.
    """
    from tyro.conf import arg  # here: `lora --help` does not need tyro

    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        with suppress(OSError, TypeError):  # no source: builtins, classes made at run time
            body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0]
            for statement, below in itertools.pairwise(getattr(body, "body", ())):
                match statement, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        texts[name] = " ".join(text.split())
    if first in texts:
        texts[first] += " The flag's name can be left out."
    for name, annotation in declared(kind).items():
        if isinstance(annotation, TypeVar):  # the method's settings: the title of their box
            shown = arg(name="method")
        else:
            value = None if annotation is bool else value_form(annotation)
            shown = arg(help=texts.get(name), metavar=value, help_behavior_hint=_default)
        kind.__annotations__[name] = Annotated[annotation, shown]


def _default(value: str) -> str:
    """Returns what --help shows after a flag's text. The text says what happens without a value."""
    return "" if value in ("None", "", "''") else f"(default: {value})"


def value_form(annotation: Any) -> str:
    """Returns what --help shows for a flag's value: INT; {yes,no}; STR ... for a list; STR INT ...
    for a table. Of `str | list | None` the list, which one value fits too."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(map(str, options)) + "}" if options[1:] else str(options[0])
    if origin in (Union, UnionType):
        lists = [option for option in options if is_list(option)]
        return " | ".join(value_form(o) for o in lists or options if o is not NoneType)
    if origin is None:
        return str(getattr(annotation, "__name__", annotation)).upper()
    parts = [value_form(option) for option in options if option is not Ellipsis]
    return " ".join([*parts, "..."])


class _LikeStdout(io.StringIO):
    """Collects what tyro prints, which depends on the real output: its colours and its boxes."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return sys.__stdout__.encoding if sys.__stdout__ else "utf-8"

    def isatty(self) -> bool:
        return sys.__stdout__ is not None and sys.__stdout__.isatty()


@contextmanager
def usage_line(usage: str) -> Iterator[None]:
    """Inside, the help that tyro prints begins with this line instead of its own."""
    printed = _LikeStdout()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        _, blank, rest = printed.getvalue().partition("\n\n")
        print(f"usage: {usage}" + blank + rest, end="")


def as_flag(name: str) -> str:
    """Returns a field's flag."""
    return "--" + name.replace("_", "-")
