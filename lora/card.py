"""What an adapter's folder says of itself: its task, its base, and how to load both.

PEFT's AutoPeftModelFor... classes go by task_type and base_model_name_or_path; AutoPeftModel, which
takes any task, by auto_mapping. For a classifier PEFT wraps every module whose name ends in
`classifier` or `score`, and asks the file for its weights. A task_type is therefore stated only if
the adapter saves them; if not, auto_mapping is, as PEFT itself writes it without a task_type.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lora.targets import walk

BUILT_IN = {"demo": "SEQ_CLS", "demo-lm": "CAUSAL_LM"}
"""The bases that are part of this package and need no files, with PEFT's task_type."""
BUILT_IN_PREFIX = "lora-from-scratch:"
"""Comes before their names in adapter_config.json: no hub can have such a name."""

TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""How a transformers class is named -> PEFT's task_type."""
AUTO = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
    "CAUSAL_LM": "CausalLM",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
}
"""task_type -> what AutoPeftModelFor goes on with."""
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""task_type -> the endings of the modules that PEFT asks the file for."""


def task_of(name: str) -> str | None:
    """The task_type of a model by the name of its class, None if PEFT has none for it."""
    return next((task for end, task in TASK_TYPES.items() if name.endswith(end)), None)


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """The modules that PEFT trains and saves whole for the model's task_type, whatever the file's
    modules_to_save."""
    ends = HEADS.get(task_of(type(model).__name__) or "", ())
    return tuple(
        name for name, module in walk(model) if name.endswith(ends) and module.state_dict()
    )


def stated(model: nn.Module, saved: tuple[str, ...]) -> dict[str, Any]:
    """task_type, auto_mapping and base_model_name_or_path of an adapter that saves these modules
    whole. A local folder is stated by its absolute path, so that it is found from anywhere."""
    kind = type(model)
    config: Any = getattr(model, "config", None)
    base = getattr(config, "_name_or_path", None) or None
    if base and os.path.isdir(base):
        base = str(Path(base).resolve())
    task = task_of(kind.__name__)
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        task = None  # a model of images and texts bears the same name
    if not set(heads_of(model)) <= set(saved):
        task = None
    mapping = None
    if task is None and kind.__module__.startswith("transformers."):
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {"task_type": task, "auto_mapping": mapping, "base_model_name_or_path": base}


def base_in(settings: Mapping[str, Any]) -> str | None:
    """The base that an adapter's file states, by what --base calls it; None if it states none."""
    base = settings.get("base_model_name_or_path")
    return base.removeprefix(BUILT_IN_PREFIX) or None if isinstance(base, str) else None


def labels_of(model: nn.Module) -> tuple[str, ...]:
    """The names of a classifier's classes, () if nobody gave them any."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = tuple(str(names[key]) for key in sorted(names))
    numbered = all(label == f"LABEL_{number}" for number, label in enumerate(labels))
    sequences = task_of(type(model).__name__) == "SEQ_CLS"
    return () if numbered or not sequences or len(labels) < 2 else labels


def arguments_of(model: nn.Module, saved: tuple[str, ...]) -> dict[str, Any]:
    """What from_pretrained has to be told of a base to be this classifier: the size of its head,
    whatever that of the base, and the token of its padding, by which some find a text's end."""
    if task_of(type(model).__name__) != "SEQ_CLS":
        return {}
    config: Any = getattr(model, "config", None)
    names = ("num_labels", "pad_token_id")
    found = {n: value for n in names if (value := getattr(config, n, None)) is not None}
    return found | ({"ignore_mismatched_sizes": True} if set(heads_of(model)) <= set(saved) else {})


def card(method: str, peft: bool, settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> str:
    """The README of an adapter's folder; `peft`: whether PEFT has the method."""
    base, task = settings["base_model_name_or_path"], settings["task_type"]
    lines = [
        "---",
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
    given = "".join(f", {name}={value!r}" for name, value in arguments.items())
    if base is not None and base.startswith(BUILT_IN_PREFIX):
        name, labels = base.removeprefix(BUILT_IN_PREFIX), arguments.get("num_labels")
        kind = {None: "text", 1: "regression"}.get(labels, "classification")
        lines += [
            "",
            "Its base is built into lora-from-scratch: no folder and no hub has it. It is",
            "",
            f'    lora.finetune.models.load_base("{name}", {labels or 1}, "{kind}", seed=0).model',
        ]
    elif peft and base is not None and (task or settings["auto_mapping"]):
        kind = f"For{AUTO[task]}" if task else ""
        lines += [
            "",
            "or together with its base:",
            "",
            f'    peft.AutoPeftModel{kind}.from_pretrained("this folder"{given})',
        ]
    return "\n".join(lines) + "\n"
