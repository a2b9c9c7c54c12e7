"""Loads a base model and its tokenizer: built in, from a folder, a GGUF file, or the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lora import nf4
from lora.card import BUILT_IN, BUILT_IN_PREFIX
from lora.errors import DataError, LoraError, ModelError
from lora.finetune.demo import bases, fetch
from lora.finetune.quantized import (
    BaseReading,
    Cut,
    packable,
    quantization,
    saved_by_bitsandbytes,
    unfilled,
)
from lora.finetune.weights import (
    another_shape,
    check_config_size,
    check_size,
    check_weights_finite,
    dtype_of_files,
)
from lora.interop.gguf_base import check_tensors_used, gguf_model
from lora.interop.gguf_file import gguf_in, read_header
from lora.interop.pretrained import (
    auto_class,
    base_config,
    head_settings,
    not_loaded,
    read_tokenizer,
    skeleton_of,
)
from lora.layers import backbone, inside
from lora.nf4 import NF4Linear

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A base model ready for one task, and what belongs to it."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    new: tuple[str, ...]  # modules with fresh weights: the head
    pieces: dict[str, Tensor] = field(default_factory=dict)
    """This rank's pieces of a sharded base, by name. Those parameters are on the meta device."""
    stored: torch.dtype | None = None
    """The dtype of its files, by config.json or else by their first weight; None without files."""
    added: dict[str, list[int]] = field(default_factory=dict)
    """Ids of the tokens that were added to it, by the layers whose rows are trained for them."""
    gguf: str = ""
    """Of a GGUF file: the type of its weights and its path. All are in memory as float32 before the
    first layer is packed."""

    @property
    def note(self) -> str:
        """What to tell the user about the base, "" if nothing."""
        return f"base: {self.gguf}, dequantized to float32" if self.gguf else ""


def load_base(
    base: str,
    labels: int,
    task: str,
    seed: int,
    quantize: str = "none",
    dense: tuple[str, ...] = (),
    packed: Callable[[int, int], None] = lambda done, layers: None,
    part: tuple[int, int] | None = None,
) -> Base:
    """Returns the base with a head of `labels` outputs for `task`. New weights follow from `seed`.

    Parameters are float32. With quantize="nf4" the backbone's linear layers become NF4Linear,
    except those that `dense` names. Each is packed as its file is read, so that the whole base is
    never in memory unpacked, and `packed` is called with the number of layers so far and of all.
    What bitsandbytes saved in NF4 stays as it is saved, whatever `quantize`: as NF4Linear in the
    backbone, dense in the head.

    With part = (rank, size) each matrix of the files, dense or packed, is cut as it is read, and
    only that rank's piece is kept, for distributed.shard(). Biases, norms, new weights, the demo
    bases and those of GGUF files stay whole.

    Raises ModelError if the base is not there, is packed in another way, if its weights do not
    fill the backbone or are not finite, or if its tokenizer has a token past the embedding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base in bases.BUILT:
            built = Base(*bases.build_demo(base, labels, task, weights=True))
            if quantize == "nf4":
                nf4.quantize_layers(built.model, packable(built.model, dense))
            return built
        place = place_of(base)
        file = gguf_in(place)
        if file is not None:
            whole = _named(_from_gguf(file, labels, task), base)
            if quantize == "nf4":
                nf4.quantize_layers(whole.model, packable(whole.model, dense))
            return whole
        cut = None if part is None else Cut(*part)
        reading = BaseReading(quantize == "nf4", dense, packed, cut)
        return _from_files(base, labels, task, reading)


def place_of(base: str) -> str:
    """Returns where a base is read from: the file of one that was fetched, else --base itself.

    Raises ModelError if it has not been fetched.
    """
    return str(fetch.path(base)) if base in BUILT_IN and base not in bases.BUILT else base


def _named(base: Base, name: str) -> Base:
    """Returns a base whose model names itself as --base does, if it is built in."""
    if name in BUILT_IN:
        base.model.config._name_or_path = f"{BUILT_IN_PREFIX}{name}"
    return base


def writing_parts(base: str) -> tuple[Any, Any]:
    """Returns the tokenizer and the generation config of a language model. Reads no weights."""
    skeleton = load_skeleton(base, 1, "text")
    if skeleton.gguf:
        return skeleton.tokenizer, skeleton.model.generation_config
    try:
        return skeleton.tokenizer, transformers.GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        return skeleton.tokenizer, skeleton.model.generation_config


def load_tokenizer(place: str, model: Any, task: str) -> Any:
    """Returns the tokenizer of a folder or of a name on the hub, and gives the model its pad token.

    Raises ModelError if it does not fit the model or the task.
    """
    tokenizer = read_tokenizer(place)
    _check_tokenizer_fits(place, tokenizer, model, task)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _check_tokenizer_fits(base: str, tokenizer: Any, model: Any, task: str) -> None:
    """Raise ModelError if the tokenizer lacks a token that the task needs, or has one past the
    model's embedding. Many language models have no pad token: their end token serves.

    A special token that we never use may lie past the embedding, like Gemma 3's for images in the
    model without any: check_ids() refuses a text that holds it.
    """
    if task == "text" and tokenizer.eos_token_id is None:
        raise ModelError(
            f"--base {base}: its tokenizer has no end token, so that an answer would never end. Set"
            " eos_token in its tokenizer_config.json."
        )
    if task == "text" and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"--base {base}: its tokenizer has no pad token. Set pad_token in its"
            " tokenizer_config.json."
        )
    rows, used = model.get_input_embeddings().weight.shape[0], {**tokenizer.get_vocab()}
    for added in tokenizer.added_tokens_decoder.values():
        if added.special and added.content not in _named_tokens(tokenizer).values():
            used.pop(added.content, None)
    most = max(used, key=used.__getitem__)
    if used[most] >= rows:
        named = [kind for kind, token in _named_tokens(tokenizer).items() if token == most]
        which = f"its {' and '.join(named)}" if named else "its last token"
        raise ModelError(
            f"--base {base}: its tokenizer has ids up to {used[most]} ({which}, {most!r}), its"
            f" embedding {rows} rows. Pass the tokenizer that belongs to the weights."
        )
    start = getattr(model.config, "decoder_start_token_id", None)
    if model.config.is_encoder_decoder and start is not None and not 0 <= start < rows:
        raise ModelError(
            f"--base {base}: decoder_start_token_id {start} in its config.json, its embedding"
            f" {rows} rows. Set the id that its decoder starts by."
        )


def _named_tokens(tokenizer: Any) -> dict[str, str]:
    """Returns the tokens that any text may get, by their names in the tokenizer's config."""
    kinds = ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token", "unk_token")
    return {kind: str(token) for kind in kinds if (token := getattr(tokenizer, kind)) is not None}


def check_ids(model: Any, tokenizer: Any, ids: Sequence[int] | Tensor, what: str) -> None:
    """Raise DataError if a text holds a token past the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    most = int(torch.as_tensor(ids).max()) if len(ids) else 0
    if most >= rows:
        token = tokenizer.convert_ids_to_tokens(most)
        raise DataError(
            f"{what} holds the token {token!r}, id {most}, and the base's embedding has {rows}"
            " rows: it never learned it. Take it out of the text or of the template, or pass the"
            " tokenizer that belongs to the weights."
        )


def _from_files(base: str, labels: int, task: str, reading: BaseReading) -> Base:
    config = base_config(base, **head_settings(labels, task))
    dtype = config.dtype  # read before a skeleton is made of the config, which sets float32 there
    packed = saved_by_bitsandbytes(base, config, reading.dense)
    check_config_size(base, config, task)
    try:
        stored = dtype or dtype_of_files(base)
        options = quantization(config, reading, packed)
        if reading.cut is not None:  # or threads read more of the files than is cut by then
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        model, loading = auto_class(config, task).from_pretrained(
            base, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model.float()  # what is not packed
        tokenizer = load_tokenizer(base, model, task)
    except LoraError:
        raise
    except Exception as error:  # a damaged folder raises whatever its reader meets first
        raise reading.refused or not_loaded(base, error) from error
    if packed:
        _check_packed(base, model, loading["unexpected_keys"])
    shapes = {key: (filed, ours) for key, filed, ours in loading["mismatched_keys"]}
    shapes |= reading.shapes
    missing = sorted({*loading["missing_keys"], *shapes})
    _check_missing(base, backbone(model), task, missing, shapes)
    new = tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
    check_weights_finite(base, model, reading.pieces)
    return Base(model.eval(), tokenizer, new, reading.pieces, stored)


def _from_gguf(file: Path, labels: int, task: str) -> Base:
    """Returns the base of a GGUF file, with all its weights dequantized to float32.

    transformers dequantizes the file as a whole, so that its layers can be packed only afterwards.
    """
    skeleton = _skeleton_of_gguf(file, labels, task, "meta")  # checks the sizes
    config = skeleton.model.config
    try:
        model, loading = gguf_model(file, config, auto_class(config, task))
    except LoraError:
        raise
    except Exception as error:  # a damaged file raises whatever its reader meets first
        raise not_loaded(str(file), error) from error
    shapes = {key: (filed, ours) for key, filed, ours in loading["mismatched_keys"]}
    missing = sorted({*loading["missing_keys"], *shapes})
    _check_missing(str(file), backbone(model), task, missing, shapes)
    check_weights_finite(str(file), model, {})
    new = tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
    return replace(skeleton, model=model.eval(), new=new)


def _skeleton_of_gguf(file: Path, labels: int, task: str, device: torch.device | str) -> Base:
    """Returns the base of a GGUF file without values. Raises ModelError if the file does not hold
    the model that its metadata states."""
    filed, header = base_config(str(file)), read_header(file)
    config = base_config(str(file), **head_settings(labels, task))
    check_size(str(file), config, task, 4 * sum(tensor.size for tensor in header.tensors))
    check_tensors_used(file, skeleton_of(filed, "text"))
    model = skeleton_of(config, task, device)
    tokenizer = load_tokenizer(str(file), model, task)
    stored = {"F16": torch.float16, "BF16": torch.bfloat16}.get(header.weight_type, torch.float32)
    gguf = f"{header.weight_type} weights of {file}"
    new = _new_modules(model, filed, labels)
    return Base(model.eval(), tokenizer, new, stored=stored, gguf=gguf)


def _check_packed(base: str, model: Any, unexpected: Sequence[str]) -> None:
    """Raise ModelError unless files that state bitsandbytes hold layers in its 4 bits."""
    odd = [key for key in unexpected if ".weight." in key]
    if odd or not any(isinstance(module, NF4Linear) for module in model.modules()):
        problem = f"hold {odd[0]}, which is not of its format" if odd else "hold no layer in 4 bits"
        raise ModelError(
            f"--base {base} was saved by bitsandbytes, says its config.json, but its files"
            f" {problem}. Take quantization_config out of a config.json that is not theirs, or pass"
            " the weights as they were before."
        )


def _check_missing(
    base: str, trunk: str, task: str, missing: Sequence[str], shapes: Mapping[str, tuple[Any, Any]]
) -> None:
    """Raise ModelError if tensors of the backbone, or of a language model's head, are missing.

    A classifier's head may be missing, or have another shape: it is then a new head.
    """
    lost = [key for key in missing if key.startswith(trunk + ".")] if trunk else []
    # A pooler is part of the backbone in BERT, yet absent from masked-language checkpoints.
    lost = [key for key in lost if ".pooler." not in key]
    for key in lost or (missing if task == "text" else ()):
        if key in shapes:
            raise another_shape(key, *shapes[key])
    if task == "text" and missing and not lost:
        raise ModelError(
            f"--base {base}: {missing[0]} is not in its files, which are of no language model. Pass"
            " one, or --task classification."
        )
    if lost:
        raise ModelError(
            f"--base {base}: {len(lost)} tensors of the backbone are not in its files"
            f" ({lost[0]}, ...). The weights are of another model, or incomplete."
        )


def load_skeleton(
    base: str,
    labels: int,
    task: str,
    quantize: str = "none",
    dense: tuple[str, ...] = (),
    device: torch.device | str = "meta",
) -> Base:
    """Returns what load_base would, without values: reads config.json, or the header of a GGUF
    file, and the tokenizer, but no weights. Call it for the meta device, or under FakeTensorMode.

    The config, not the files, says if the head is new: it is if the config names another class or
    another number of labels. A pooler is new if the config names a masked language model. Raises
    ModelError as load_base does if there is no such base.
    """
    packs = quantize == "nf4"
    if base in bases.BUILT:
        with torch.device(device):
            skeleton = Base(*bases.build_demo(base, labels, task, weights=False))
    elif (file := gguf_in(place_of(base))) is not None:
        skeleton = _named(_skeleton_of_gguf(file, labels, task, device), base)
    else:
        filed, config = base_config(base), base_config(base, **head_settings(labels, task))
        packs = saved_by_bitsandbytes(base, config, dense) or packs
        model = skeleton_of(config, task, device)
        tokenizer = load_tokenizer(base, model, task)
        stored = filed.dtype or torch.float32
        skeleton = Base(model.eval(), tokenizer, _new_modules(model, filed, labels), stored=stored)
    if packs:
        nf4.put(skeleton.model, unfilled(skeleton.model, packable(skeleton.model, dense), device))
    return skeleton


def _new_modules(model: Any, config: Any, labels: int) -> tuple[str, ...]:
    """Returns the modules that files with this config do not hold, or hold in another size."""
    named, trunk = (config.architectures or ("",))[0], backbone(model)
    same, poolers = named == type(model).__name__, named.endswith("ForMaskedLM")
    new = [
        name.rpartition(".")[0]
        for name, parameter in sorted(model.named_parameters())
        if (".pooler." in name and poolers)
        or (not inside(name, trunk) and (not same or len(parameter) == labels != config.num_labels))
    ]
    return tuple(dict.fromkeys(new))
