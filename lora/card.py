"""Describes an adapter in its folder: its task, its base, and a README that says how to load it.

PEFT's AutoPeftModelFor... classes read task_type and base_model_name_or_path. AutoPeftModel, which
takes any task, reads auto_mapping. If task_type is a classifier's, PEFT wraps every module whose
name ends in `classifier` or `score`, and expects its weights in the file. So a task_type is written
only if the adapter saves those modules. Otherwise auto_mapping is, as PEFT does without a
task_type.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lora.targets import walk

BUILT_IN = {"demo": "SEQ_CLS", "demo-lm-tiny": "CAUSAL_LM", "smollm2": "CAUSAL_LM"}
"""The bases that this package builds or fetches by their names, with PEFT's task_type."""
FORMER_NAMES = {"demo-lm": "demo-lm-tiny"}
"""The name that older adapters and run folders give a built-in base -> its name."""
BUILT_IN_PREFIX = "lora-from-scratch:"
"""The prefix of their names in adapter_config.json, which no model on a hub can have."""

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""The ending of a transformers class's name -> PEFT's task_type."""
AUTO = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
}
"""task_type -> the ending of PEFT's AutoPeftModelFor... class."""
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""task_type -> the name endings of the modules that PEFT expects in the file."""


def task_of(name: str) -> str | None:
    """Returns the task_type for the name of a model's class, None if PEFT has none."""
    return next((task for end, task in TASK_TYPES.items() if name.endswith(end)), None)


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the modules that PEFT saves for the model's task_type, even if modules_to_save does
    not list them."""
    ends = HEADS.get(task_of(type(model).__name__) or "", ())
    return tuple(
        name for name, module in walk(model) if name.endswith(ends) and module.state_dict()
    )


def stated(model: nn.Module, saved: tuple[str, ...]) -> dict[str, Any]:
    """Returns task_type, auto_mapping and base_model_name_or_path of an adapter.

    `saved` are its modules_to_save. A base in a local folder or GGUF file is written as an absolute
    path, so that it can be loaded from any working directory.
    """
    kind = type(model)
    config: Any = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", None) or None
    if base and (os.path.isdir(base) or (base.endswith(".gguf") and os.path.isfile(base))):
        base = str(Path(base).resolve())
    task = task_of(kind.__name__)
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        task = None  # vision-language models end in ForConditionalGeneration too
    if task == "SEQ_2_SEQ_LM" and getattr(model, "main_input_name", "input_ids") != "input_ids":
        task = None  # Whisper: PEFT's class for the task passes input_ids
    if not set(heads_of(model)) <= set(saved):
        task = None
    mapping = None
    if task is None and kind.__module__.startswith("transformers."):
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"task_type": task, "auto_mapping": mapping, "base_model_name_or_path": base}


def base_in(settings: Mapping[str, Any]) -> str | None:
    """Returns the base that a file states, in the form that --base takes; None if there is none."""
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str):
        return None
    if base.startswith(BUILT_IN_PREFIX):
        base = base.removeprefix(BUILT_IN_PREFIX)
        base = FORMER_NAMES.get(base, base)
    return base or None


def name_classes(model: Any, labels: Sequence[str], names: Sequence[str] = ()) -> None:
    """Writes the classes into a classifier's config, where transformers' pipelines look for them.

    labels: the values in the data, in the order of the head's outputs. names: what to show for
    them, if it is something else; labels_of() then still returns the labels.
    """
    shown = names or labels
    model.config.id2label = dict(enumerate(shown))
    model.config.label2id = {name: number for number, name in enumerate(shown)}
    if names:
        model.config.data_labels = list(labels)
    elif hasattr(model.config, "data_labels"):  # of an earlier training of this base
        del model.config.data_labels


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the labels of a classifier's classes, as in its data; () if it records none."""
    labels = getattr(getattr(model, "config", None), "data_labels", None)
    return tuple(labels) if labels else class_names_of(model)


def class_names_of(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of a classifier's classes, () if they have only transformers' defaults."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = tuple(str(names[key]) for key in sorted(names))
    # LABEL_0, LABEL_1: transformers fills them in if nobody named the classes.
    numbered = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    sequences = task_of(type(model).__name__) == "SEQ_CLS"
    return () if numbered or not sequences or len(labels) < 2 else labels


def arguments_of(model: nn.Module, saved: tuple[str, ...]) -> dict[str, Any]:
    """Returns the arguments with which from_pretrained makes this classifier from the base.

    They are the number of labels, which may differ from the base's, and the padding token, by which
    some models find the end of a text. {} for other models.
    """
    if task_of(type(model).__name__) != "SEQ_CLS":
        return {}
    config: Any = getattr(model, "config", None)
    names = ("num_labels", "pad_token_id")
    arguments = {n: value for n in names if (value := getattr(config, n, None)) is not None}
    # The base's head may have another number of labels. The adapter's file replaces it.
    return arguments | (
        {"ignore_mismatched_sizes": True} if set(heads_of(model)) <= set(saved) else {}
    )


def card(method: str, peft: bool, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """Returns the README of an adapter's folder. `peft` is True if PEFT has the method."""
    base, task = settings["base_model_name_or_path"], settings["task_type"]
    lines = [
        "---",
        # YAML reads a JSON string as it is; a path may hold a colon or a quote.
        f"base_model: {json.dumps(base or 'its base model')}",
        "library_name: peft",
        "---",
        f"# A {method} adapter for {base or 'its base model'}",
        "",
        "Written by lora-from-scratch in PEFT's format. Load it with",
        "",
        '    lora.load(model, "this folder")                       # lora-from-scratch',
    ]
    if peft:
        lines.append('    peft.PeftModel.from_pretrained(model, "this folder")  # PEFT')
    listed = "".join(f", {name}={value!r}" for name, value in arguments.items())
    if base is not None and base.startswith(BUILT_IN_PREFIX):
        name, labels = base.removeprefix(BUILT_IN_PREFIX), arguments.get("num_labels")
        kind = {None: "text", 1: "regression"}.get(labels, "classification")
        lines += [
            "",
            "Its base is built into lora-from-scratch: no folder and no hub has it. It is",
            "",
            f'    lora.finetune.models.load_base("{name}", {labels or 1}, "{kind}", seed=0).model',
        ]
    elif base is not None and base.endswith(".gguf"):
        auto = f"AutoModelFor{AUTO[task]}" if task else "AutoModelForSequenceClassification"
        lines += [
            "",
            "Its base is a GGUF file:",
            "",
            f"    transformers.{auto}.from_pretrained(FOLDER, gguf_file=NAME{listed})",
        ]
    elif peft and base is not None and (task or settings["auto_mapping"]):
        kind = f"For{AUTO[task]}" if task else ""
        lines += [
            "",
            "or together with its base:",
            "",
            f'    peft.AutoPeftModel{kind}.from_pretrained("this folder"{listed})',
        ]
    return "\n".join(lines) + "\n"
