"""Loads a base's config, class and tokenizer, but no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from lora.errors import LoraError, ModelError
from lora.files import readable
from lora.interop import documents
from lora.interop.basefile import BASE_FILE
from lora.interop.gguf_base import gguf_config, gguf_tokenizer
from lora.interop.gguf_file import gguf_in
from lora.interop.hub import hub_answers


def auto_class(config: Any, task: str) -> Any:
    """Returns transformers' Auto class for the task."""
    if task != "text":
        return transformers.AutoModelForSequenceClassification
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    return transformers.AutoModelForCausalLM


def base_config(base: str, **head: Any) -> Any:
    """Returns the transformers config of a folder, a GGUF file or a name on the hub. Raises
    ModelError.

    head: settings of the head, from head_settings().
    """
    file = gguf_in(base)
    if file is not None:
        return gguf_config(file, **head)
    _check_place(base)
    try:
        stated, _ = transformers.PretrainedConfig.get_config_dict(base)
        name, then = f"--base {base}: its config.json", "Pass the one that belongs to the weights."
        documents.validate(stated, BASE_FILE, name, ModelError, then)
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run
        # code from the hub.
        return transformers.AutoConfig.from_pretrained(base, trust_remote_code=False, **head)
    except LoraError:
        raise
    except Exception as error:  # a damaged folder may raise any error
        raise not_loaded(base, error) from error


def skeleton_of(config: Any, task: str, device: torch.device | str = "meta") -> Any:
    """Builds the model of a config in float32; on the meta device it has no values.

    Raises ModelError if the config is not that of a model.
    """
    try:
        with torch.device(device):
            return auto_class(config, task).from_config(config, dtype=torch.float32)
    except Exception as error:  # an invalid config may raise any error
        raise not_loaded(config._name_or_path, error) from error


def _check_place(base: str) -> None:
    """Raises ModelError if the folder does not exist, or the hub is needed and does not answer."""
    with readable(base, ModelError, "Pass a folder with config.json, or a name on the hub."):
        local = Path(base).is_dir()
    if not local and (base.startswith((".", "/", "~")) or base.count("/") > 1):
        raise ModelError(
            f"--base {base}: no such folder or file. Pass a folder with config.json, or a GGUF"
            " file."
        )
    if not local and not hub_answers() and not cached(base):
        raise ModelError(
            f"--base {base}: no such folder here, and the hub, where it may be a name, does not"
            " answer. Run lora train --base demo, or pass the folder of a downloaded model."
        )


def read_tokenizer(place: str) -> Any:
    """Returns the tokenizer of a folder, a GGUF file or a name on the hub. Raises ModelError."""
    file = gguf_in(place)
    if file is not None:
        return gguf_tokenizer(file)
    try:
        return transformers.AutoTokenizer.from_pretrained(place)
    except Exception as error:  # a damaged folder may raise any error
        raise not_loaded(place, error) from error


def not_loaded(base: str, error: Exception) -> ModelError:
    """Returns the error for a base that cannot be loaded, with the first line of its cause."""
    return ModelError(
        f"--base {base} cannot be loaded: {str(error).strip().partition(chr(10))[0]}"
        " Pass --base demo, a folder with config.json and weights, a GGUF file, or a name on the"
        " hub."
    )


def cached(name: str) -> bool:
    """True if the hub's local cache has the config.json of this name."""
    import huggingface_hub

    try:
        path = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid name on the hub
        return False
    return isinstance(path, str)


def head_settings(labels: int, task: str) -> dict[str, Any]:
    """Returns the settings of a transformers config for a head with this many outputs."""
    if task == "text":
        return {}
    problem = "regression" if task == "regression" else "single_label_classification"
    return {"num_labels": labels, "problem_type": problem}
