"""Builds the two built-in bases: `demo`, a classifier, and `demo-lm-tiny`, a language model."""

from __future__ import annotations

from typing import Any

import tokenizers
import transformers

from lora.card import BUILT_IN_PREFIX
from lora.errors import ModelError
from lora.finetune import demo
from lora.finetune.demo import language
from lora.interop.pretrained import head_settings

BUILT = ("demo", "demo-lm-tiny")
"""The names of --base that build_demo() takes."""


def build_demo(
    base: str, labels: int, task: str, weights: bool
) -> tuple[Any, Any, tuple[str, ...]]:
    """Returns the model, its tokenizer, and the modules with fresh weights: the head.

    weights: read MiniLM's weights for `demo`. The weights of `demo-lm-tiny` are always random.
    Raises ModelError if the base cannot do the task.
    """
    if (task == "text") != (base == "demo-lm-tiny"):
        if task == "text":  # often not asked for: the keys of the data's rows imply it
            raise ModelError(
                f"--base {base} is no language model, which prompts, conversations and plain texts"
                " (--task text) need. Pass --base demo-lm-tiny, smollm2, or a language model's"
                " folder."
            )
        raise ModelError(
            f"--base {base} is a language model, so it cannot do --task {task}. Pass --base demo."
        )
    if base == "demo-lm-tiny":
        model, tokenizer = _language_model()
        return model.eval(), tokenizer, ()
    model, tokenizer = _classifier(labels, task)
    if weights:
        model.distilbert.load_state_dict(demo.state_dict())
    return model.eval(), tokenizer, ("pre_classifier", "classifier")


def _classifier(labels: int, task: str) -> tuple[Any, Any]:
    """Returns DistilBERT with random weights, and MiniLM's tokenizer."""
    config = transformers.DistilBertConfig(**demo.MINILM, **head_settings(labels, task))
    model = transformers.DistilBertForSequenceClassification(config)
    model.config._name_or_path = f"{BUILT_IN_PREFIX}demo"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(demo.file("tokenizer.json")),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
    return model, tokenizer


def _language_model() -> tuple[Any, Any]:
    """Returns a small LLaMA with random weights, and its tokenizer of bytes."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**language.LLAMA))
    model.config._name_or_path = f"{BUILT_IN_PREFIX}demo-lm-tiny"
    pad, start, end = language.SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(language.tokenizer_json()),
        pad_token=pad, bos_token=start, eos_token=end,
        model_max_length=language.LLAMA["max_position_embeddings"],
        clean_up_tokenization_spaces=False, chat_template=language.TEMPLATE,
    )  # fmt: skip
    return model, tokenizer
