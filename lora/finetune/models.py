"""Base model and tokenizer, from the embedded default, a local folder, or the hub."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import safetensors
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora import card, nf4
from lora.errors import ConfigError, DataError, LoraError, ModelError
from lora.finetune import demo
from lora.finetune.demo import language
from lora.interop.pretrained import auto_class, base_config, not_loaded, read_tokenizer, skeleton_of
from lora.layers import backbone, inside, kind, views
from lora.methods.lora import LoRAConfig
from lora.nf4 import NF4Linear
from lora.targets import targets_of

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # of safetensors
EMBEDDED = ("demo", "demo-lm")  # bases that need no files
LARGEST_NEW = 2**27  # parameters that a base's weights may lack: a head, a pooler

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A base model ready for one task, and what belongs to it."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    new: tuple[str, ...]  # modules with fresh weights: the head
    pieces: dict[str, Tensor] = field(default_factory=dict)
    """By name what one rank holds of the base: those parameters are on the meta device."""
    stored: torch.dtype | None = None
    """Of its files, as config.json says, or else their first weight; None if embedded."""
    added: dict[str, list[int]] = field(default_factory=dict)
    """Ids of the tokens that were added to it, by the layers whose rows have to train for them."""


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
    """The base with a head of `labels` outputs for `task`; fresh weights are a function of seed.

    Parameters are float32. With quantize="nf4" the backbone's linear layers are NF4Linear, but for
    those that `dense` names; of files each is packed as it is read, so that the whole is never
    there unpacked, and `packed` is told how many are so far, of how many. What bitsandbytes saved
    in NF4 is held as it is saved, whatever `quantize`: in the backbone as NF4Linear, in the head
    dense.

    `part` = (rank, size) keeps of all matrices in files, dense or packed, that rank's piece alone,
    each cut as it is read: what distributed.shard() puts together. Biases, norms, fresh weights and
    the demo base are whole.

    Raises ModelError if the base is not to be had, is packed in another way, its weights do not
    fill the backbone or are not finite, or its tokenizer has a token past the embedding.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if base in EMBEDDED:
            found = _demo_base(base, labels, task)
            if quantize == "nf4":
                nf4.quantize_layers(found.model, packable(found.model, dense))
            return found
        _Quantize.packed, _Quantize.done = packed, 0
        _Quantize.cut = None if part is None else _Cut(*part)
        return _transformers_base(base, labels, task, quantize, dense)


@register_quantization_config("lora-nf4")
class _NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """What from_pretrained is told: whether to pack layers, and which stay dense, by name or dotted
    ending."""

    quant_method: Any = "lora-nf4"

    def __init__(self, packs: bool = True, dense: tuple[str, ...] = (), **given: Any) -> None:
        self.packs, self.dense = packs, dense


@register_quantizer("lora-nf4")
class _NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises each weight as from_pretrained reads it, tensor by tensor, from its files.

    pre_quantized, where the files are bitsandbytes', it takes what they hold. Where one rank's part
    is asked for, it cuts what is read, packed or not.
    """

    is_trainable = True

    def is_serializable(self, **given: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **given: Any) -> None:
        self.stated = model.state_dict()  # on the meta device: shapes and dtypes
        self.names: tuple[str, ...] = ()
        self.as_saved = self.pre_quantized or not self.quantization_config.packs
        if self.as_saved:  # each tensor is read in the dtype that it is saved in
            model._get_dtype_plan = lambda dtype: {"*": None}
        else:
            self.names = packable(model, self.quantization_config.dense)

    def _process_model_after_weight_loading(self, model: Any, **given: Any) -> None:
        self.remove_quantization_config(model)  # an NF4Linear needs none of it
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            packed = leaf == "weight" and isinstance(model.get_submodule(path), NF4Linear)
            stated = tensor if packed else self.stated.get(name, tensor)
            if tensor.shape != stated.shape:
                raise _another_shape(name, tensor.shape, stated.shape)
        if _Quantize.cut is not None:
            _Quantize.cut.leave(model)
        if self.as_saved:
            del model._get_dtype_plan
        if self.pre_quantized:
            # save_pretrained would go back over what was done to the keys.
            model._weight_conversions = [
                one
                for one in model._weight_conversions
                if not any(isinstance(op, _Take | _Fit) for op in getattr(one, "operations", ()))
            ]

    def param_needs_quantization(self, model: Any, param_name: str, **given: Any) -> bool:
        # The op sees to the shape of all others too, but for those in a dtype of their own: what
        # goes through it is cast to the model's.
        if self.pre_quantized or param_name not in self.stated:
            return False
        path, _, leaf = param_name.rpartition(".")
        packed = leaf == "weight" and path in self.names
        return packed or bool(self.stated[param_name].dtype == model.config.dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.names)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        take = WeightConverter(list(_Take.KEYS), "weight", [_Take()])
        return [take, WeightConverter("bias$", "bias", [_Fit()])]


class _Cut:
    """One rank's pieces of what is read, and what stands in for the whole until all is read."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}  # by the stand-in's memory
        self.pieces: dict[str, Tensor] = {}

    def take(self, tensor: Tensor) -> Tensor:
        """Keep this rank's piece, as FSDP2 cuts, and give a stand-in: zeros in no memory."""
        step = -(-len(tensor) // self.size)
        piece = tensor.detach()[self.rank * step :][:step].clone()
        stand_in = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        self.taken[stand_in.data_ptr()] = stand_in, piece
        return stand_in

    def leave(self, model: Any) -> None:
        """The model with each stand-in on the meta device, ties as they are; the pieces by name."""
        fresh: dict[int, Any] = {}
        for name, parameter in model.named_parameters():
            if parameter.data_ptr() in self.taken:
                _, self.pieces[name] = self.taken[parameter.data_ptr()]
                empty = torch.empty_like(
                    parameter, device="meta", memory_format=torch.contiguous_format
                )
                fresh[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                module._parameters[leaf] = fresh.get(id(parameter), parameter)
        self.taken.clear()


def _kept(found: dict[str, Any], least: int) -> dict[str, Any]:
    """What is put into the model of tensors that were read, or packed: where one rank's part is
    asked for, a stand-in for each of at least so many dimensions."""
    cut = _Quantize.cut
    if cut is None:
        return found
    return {key: cut.take(t) if t.dim() >= least else t for key, t in found.items()}


def _fitting(model: Any, name: str, tensor: Any) -> dict[str, Any]:
    """What to put in place of a tensor that was read: itself, or nothing where the model has
    another shape, so that it counts as missing. Under a quantiser transformers 5.17 asks no such
    question, and a head of another size would pass."""
    path, _, leaf = name.rpartition(".")
    stated = getattr(model.get_submodule(path), leaf)
    if stated is None or tensor.shape == stated.shape:
        return {name: tensor}
    _Quantize.shapes[name] = tensor.shape, stated.shape
    return {}


def _another_shape(name: str, found: Any, stated: Any) -> ModelError:
    return ModelError(
        f"{name} is {tuple(found)} in its files and {tuple(stated)} in the model that config.json"
        " states. Pass the config.json that belongs to the weights."
    )


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Packs the weights of the named layers; each is dense and without values until then, since
    transformers 5.17 casts what it reads to the dtype of what it finds."""

    refused: ClassVar[LoraError | None] = None  # from_pretrained reports an error and drops it
    packed: ClassVar[Callable[[int, int], None]]
    done: ClassVar[int]  # from_pretrained makes an op for each weight
    cut: ClassVar[_Cut | None] = None
    shapes: ClassVar[dict[str, tuple[Any, Any]]] = {}  # left out: in the files, and in the model

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        self.names = names

    def convert(self, input_dict: dict[str, Any], model: Any, **given: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            read = _fitting(model, name, value[0] if isinstance(value, list) else value)
            path, _, leaf = name.rpartition(".")
            if not read or leaf != "weight" or path not in self.names:
                found |= _kept(read, 2)
                continue
            layer = model.get_submodule(path)
            weight = read[name].T if kind(layer) == "Conv1D" else read[name]
            try:
                q = nf4.quantize(weight, double_quant=True, name=name)
            except LoraError as error:
                finite = not weight.is_floating_point() or bool(weight.isfinite().all())
                base = model.name_or_path
                _Quantize.refused = error if finite else _not_finite(base, name, weight)
                raise
            found |= _put(model, path, NF4Linear.over(layer, q), q)
            _Quantize.done += 1
            _Quantize.packed(_Quantize.done, len(self.names))
        return found


def _put(model: Any, path: str, fresh: NF4Linear, q: nf4.NF4) -> dict[str, Any]:
    """Puts it in the layer's place; its tensors by their names in the model."""
    nf4.put(model, {id(model.get_submodule(path)): fresh})
    return _kept({f"{path}.{leaf}": p for leaf, p in nf4.parameters_of(q).items()}, 1)


class _Fit(ConversionOps):  # type: ignore[misc]
    """Takes a tensor of the stated shape, and leaves any other out."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **given: Any
    ) -> dict[str, Any]:
        ((tensor,),) = input_dict.values()
        return _fitting(model, full_layer_name, tensor)


class _Take(ConversionOps):  # type: ignore[misc]
    """Puts what bitsandbytes saved of a layer in its place, as it is read."""

    KEYS = tuple(
        f"weight{rest}$"
        for rest in (
            ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax",
            ".quant_map", ".nested_absmax", ".nested_quant_map", "",
        )
    )  # fmt: skip

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **given: Any
    ) -> dict[str, Any]:
        tensors = {key.removesuffix("$"): values[0] for key, values in input_dict.items()}
        if tensors.keys() == {"weight"} and tensors["weight"].is_floating_point():
            return _kept(_fitting(model, full_layer_name, tensors["weight"]), 2)
        path = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(path)
        try:
            q = nf4.from_bitsandbytes(tensors, full_layer_name)
            if kind(layer) not in ("Linear", "Conv1D"):
                raise ModelError(
                    f"{path} is {type(layer).__name__}, in NF4 in its files; only linear layers are"
                    " held so. Pass the weights as they were before, with --quantize nf4."
                )
            if not inside(path, backbone(model)):  # a head of another size is a new head
                W = nf4.dequantize(q, torch.float32)
                W = W.T if kind(layer) == "Conv1D" else W
                return _kept(_fitting(model, full_layer_name, W), 2)
            fresh = NF4Linear.over(layer, q)
            if q.shape != (fresh.out_features, fresh.in_features):
                stated = (fresh.out_features, fresh.in_features)
                raise _another_shape(full_layer_name, q.shape, stated)
        except LoraError as error:
            _Quantize.refused = error
            raise
        return _put(model, path, fresh, q)


def packable(model: Any, dense: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The layers that --quantize packs: linear ones of the backbone, but the named, and but those
    whose dtype the model goes by: T5 casts the input of its `wo` to what `wo` holds."""
    kept = [f".{name}." for name in getattr(model, "_keep_in_fp32_modules", None) or ()]
    found = targets_of(model, LoRAConfig(exclude_modules=dense or None), ())
    return tuple(name for name in found if not any(part in f".{name}." for part in kept))


def _head(labels: int, task: str) -> dict[str, Any]:
    if task == "text":
        return {}
    problem = "regression" if task == "regression" else "single_label_classification"
    return {"num_labels": labels, "problem_type": problem}


def writing_parts(base: str) -> tuple[Any, Any]:
    """The tokenizer and the generation config of a base that writes. No weights are read."""
    made = load_skeleton(base, 1, "text")
    try:
        return made.tokenizer, transformers.GenerationConfig.from_pretrained(base)
    except OSError:  # it has none
        return made.tokenizer, made.model.generation_config


def _check_weights(base: str, config: Any, task: str) -> None:
    """Raise ModelError if the config states a model that is far larger than the files beside it:
    what they lack would be made in memory, to be told afterwards that it is missing."""
    there = transformers.utils.cached_file(base, "config.json", local_files_only=True)
    kinds = (".safetensors", ".bin")
    held = sum(path.stat().st_size for path in Path(there).parent.iterdir() if path.suffix in kinds)
    stated = sum(parameter.numel() for parameter in skeleton_of(config, task).parameters())
    if held and stated > LARGEST_NEW + 4 * held:  # in four bits a parameter is half a byte
        raise ModelError(
            f"--base {base}: its config.json states {stated:,} parameters, and its weights are"
            f" {held:,} bytes. Pass the config.json that belongs to the weights."
        )


def _demo_base(base: str, labels: int, task: str) -> Base:
    found = _demo_skeleton(base, labels, task)
    if base == "demo":
        found.model.distilbert.load_state_dict(demo.state_dict())
    return found


def _demo_skeleton(base: str, labels: int, task: str) -> Base:
    if (task == "text") != (base == "demo-lm"):
        raise ModelError(
            f"--base {base} is {'no' if task == 'text' else 'a'} language model, found --task"
            f" {task}. Pass --base {'demo-lm or another' if task == 'text' else 'demo'}."
        )
    if base == "demo-lm":
        return _language()
    config = transformers.DistilBertConfig(**demo.ARCHITECTURE, **_head(labels, task))
    model = transformers.DistilBertForSequenceClassification(config)
    model.config._name_or_path = f"{card.EMBEDDED}demo"
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
    return Base(model.eval(), tokenizer, ("pre_classifier", "classifier"))


def _language() -> Base:
    """lora.finetune.demo.language's."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**language.ARCHITECTURE))
    model.config._name_or_path = f"{card.EMBEDDED}demo-lm"
    pad, start, end = language.SPECIAL
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(language.tokenizer_json()),
        pad_token=pad, bos_token=start, eos_token=end,
        model_max_length=language.ARCHITECTURE["max_position_embeddings"],
        clean_up_tokenization_spaces=False, chat_template=language.TEMPLATE,
    )  # fmt: skip
    return Base(model.eval(), tokenizer, ())


def _bitsandbytes(base: str, config: Any, dense: tuple[str, ...]) -> bool:
    """Whether config.json says that bitsandbytes packed the weights. Raises ModelError where it did
    so in 8 bits, or `dense` asks for layers as they were before."""
    said = getattr(config, "quantization_config", None) or {}
    bits = [n for n in (4, 8) if said.get(f"load_in_{n}bit")]
    if not bits and said.get("quant_method") != "bitsandbytes":
        return False
    before = "the weights as they were before bitsandbytes, with --quantize nf4"
    if 8 in bits:
        raise ModelError(
            f"--base {base} was saved by bitsandbytes in 8 bits; what loads is its 4 bits in NF4."
            f" Pass {before}."
        )
    if dense:
        raise ModelError(
            f"--dense {dense[0]}: --base {base} was saved in 4 bits, its layers with it. Leave"
            f" --dense out, or pass {before}."
        )
    return True


def load_tokenizer(place: str, model: Any, task: str) -> Any:
    """The tokenizer of a folder or of a name on the hub, whose padding the model then goes by.
    Raises ModelError if it does not fit the model or the task."""
    tokenizer = read_tokenizer(place)
    _check_tokenizer(place, tokenizer, model, task)
    model.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer


def _check_tokenizer(base: str, tokenizer: Any, model: Any, task: str) -> None:
    """Raise ModelError if the tokenizer lacks a token that the task needs, or has one past the
    model's embedding. Many that write text have no pad token: theirs for the end serves.

    A special token of no use here may lie past it, like Gemma 3's for images in the model without
    any: check_ids() refuses the text that holds it.
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
    for token, said in tokenizer.added_tokens_decoder.items():
        if said.special and said.content not in _named_tokens(tokenizer).values():
            used.pop(said.content, token)
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
    """The tokens that are used whatever the text, by what the tokenizer's config calls them."""
    kinds = ("pad_token", "eos_token", "bos_token", "cls_token", "sep_token", "unk_token")
    return {kind: str(found) for kind in kinds if (found := getattr(tokenizer, kind)) is not None}


def _check_finite(base: str, model: Any, pieces: dict[str, Tensor]) -> None:
    """Raise ModelError if a weight that was read is not finite, or a buffer is NaN; of what is cut
    among ranks this rank's pieces are looked at."""
    weights = {**dict(model.named_parameters()), **pieces}
    for name, tensor in (*weights.items(), *model.named_buffers()):
        if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
            continue
        ends = torch.stack(tensor.detach().aminmax())  # NaN if any value is
        if bool((ends.isfinite() if name in weights else ~ends.isnan()).all()):
            continue
        raise _not_finite(base, name, tensor)


def _not_finite(base: str, name: str, tensor: Tensor) -> ModelError:
    off = int((~tensor.detach().isfinite()).sum())
    return ModelError(
        f"--base {base}: {name} holds NaN or infinity, {off:,} of {tensor.numel():,} values"
        f"{_damaged_file(base)}. Copy or download its files again, or pass another base."
    )


def _damaged_file(base: str) -> str:
    """Which of a base's files holds values that are not finite, and under which key, to be put
    behind a message."""
    try:
        found = transformers.utils.cached_file(base, "config.json", local_files_only=True)
        for path in sorted(Path(str(found)).parent.glob("*.safetensors")):
            with safetensors.safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (no iteration over the file itself)
                    tensor = file.get_tensor(key)
                    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                        return f" ({key} in {path})"
    except (OSError, safetensors.SafetensorError):  # files of another kind, which say no more
        pass
    return ""


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


def _transformers_base(
    base: str, labels: int, task: str, quantize: str, dense: tuple[str, ...]
) -> Base:
    how: dict[str, Any] = {"dtype": torch.float32}
    _Quantize.refused, _Quantize.shapes = None, {}
    config = base_config(base, **_head(labels, task))
    said = config.dtype  # before a skeleton is made of it, which states float32 there
    packed = _bitsandbytes(base, config, dense)
    _check_weights(base, config, task)
    try:
        stored = said or _dtype_of_files(base)
        if packed:
            config.quantization_config = {"quant_method": "lora-nf4"}
        elif quantize == "nf4":
            how = {"dtype": "auto", "quantization_config": _NF4Config(True, dense)}
        elif _Quantize.cut is not None:
            how |= {"quantization_config": _NF4Config(False)}
        if _Quantize.cut is not None:  # or threads read more of the files than is cut by then
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        model, loading = auto_class(config, task).from_pretrained(
            base, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
        model.float()  # what is not packed
        tokenizer = load_tokenizer(base, model, task)
    except LoraError:
        raise
    except Exception as error:  # a damaged folder raises whatever its reader meets first
        raise _Quantize.refused or not_loaded(base, error) from error
    odd = [key for key in loading["unexpected_keys"] if ".weight." in key]
    if packed and (odd or not any(isinstance(module, NF4Linear) for module in model.modules())):
        found = f"hold {odd[0]}, which is not of its format" if odd else "hold no layer in 4 bits"
        raise ModelError(
            f"--base {base} was saved by bitsandbytes, says its config.json, but its files {found}."
            " Take quantization_config out of a config.json that is not theirs, or pass the weights"
            " as they were before."
        )
    trunk = backbone(model)
    # A head of another size is a new head.
    shapes = {key: (there, here) for key, there, here in loading["mismatched_keys"]}
    shapes |= _Quantize.shapes
    missing = sorted({*loading["missing_keys"], *shapes})
    lost = [key for key in missing if key.startswith(trunk + ".")] if trunk else []
    # A pooler is part of the backbone in BERT, yet absent from masked-language checkpoints.
    lost = [key for key in lost if ".pooler." not in key]
    for key in lost or (missing if task == "text" else ()):
        if key in shapes:
            raise _another_shape(key, *shapes[key])
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
    new = tuple(dict.fromkeys(key.rpartition(".")[0] for key in missing))
    pieces = {} if _Quantize.cut is None else _Quantize.cut.pieces
    _check_finite(base, model, pieces)
    return Base(model.eval(), tokenizer, new, pieces, stored)


def _dtype_of_files(base: str) -> torch.dtype:
    """The dtype of the first floating weight in a model's files; float32 if none says it."""
    for name in ("model.safetensors", "model.safetensors.index.json"):
        path = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
        if path is not None and name.endswith(".json"):
            first = next(iter(json.loads(Path(path).read_bytes())["weight_map"].values()))
            path = cached_file(base, first)
        if path is not None:
            with safetensors.safe_open(path, framework="pt") as file:
                found = (file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118
                return next((FLOATS[dtype] for dtype in found if dtype in FLOATS), torch.float32)
    return torch.float32


def load_skeleton(
    base: str,
    labels: int,
    task: str,
    quantize: str = "none",
    dense: tuple[str, ...] = (),
    device: torch.device | str = "meta",
) -> Base:
    """What load_base would give, its values aside: no weights are read, config.json and the
    tokenizer are. To be called for the meta device, or under FakeTensorMode.

    Whether the head is new is not asked of the files, but told by the config: it is where that
    names another class, or another number of labels. A pooler is, where it names a model of masked
    tokens. Raises ModelError as load_base does where there is no such base.
    """
    packs = quantize == "nf4"
    if base in EMBEDDED:
        with torch.device(device):
            found = _demo_skeleton(base, labels, task)
    else:
        said, config = base_config(base), base_config(base, **_head(labels, task))
        packs = _bitsandbytes(base, config, dense) or packs
        model = skeleton_of(config, task, device)
        tokenizer = load_tokenizer(base, model, task)
        stored = said.dtype or torch.float32
        found = Base(model.eval(), tokenizer, _fresh(model, said, labels), stored=stored)
    if packs:
        nf4.put(found.model, unfilled(found.model, packable(found.model, dense), device))
    return found


def _fresh(model: Any, said: Any, labels: int) -> tuple[str, ...]:
    """The modules that files with this config hold no weights for, or such of another size."""
    named, trunk = (said.architectures or ("",))[0], backbone(model)
    same, poolers = named == type(model).__name__, named.endswith("ForMaskedLM")
    new = [
        name.rpartition(".")[0]
        for name, parameter in sorted(model.named_parameters())
        if (".pooler." in name and poolers)
        or (not inside(name, trunk) and (not same or len(parameter) == labels != said.num_labels))
    ]
    return tuple(dict.fromkeys(new))


def unfilled(
    model: Any, names: tuple[str, ...], device: torch.device | str
) -> dict[int, nn.Module]:
    """An NF4Linear without values for each named layer, by the ids of those."""
    found: dict[int, nn.Module] = {}
    for name in names:
        layer = model.get_submodule(name)
        (view,) = views(layer)
        bias = view.parameters()[1] is not None
        shape = view.in_features, view.out_features
        found[id(layer)] = NF4Linear(*shape, bias, view.dtype, device=device).train(layer.training)
    return found


def bfloat16_here(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 itself: AVX512-BF16 or AMX, CUDA from 8.0 on.

    LORA_BFLOAT16=1 or 0 in the environment overrules what the device says. Raises ConfigError if it
    is anything else.
    """
    forced = os.environ.get("LORA_BFLOAT16", "")
    if forced:
        if forced not in ("0", "1"):
            raise ConfigError(
                f"LORA_BFLOAT16 is {forced!r} in the environment. Set it to 1 or 0, or unset it."
            )
        return forced == "1"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def pick_dtype(device: torch.device) -> Literal["float32", "bfloat16"]:
    """What --dtype auto means on the device."""
    return "bfloat16" if bfloat16_here(device) else "float32"


def hold(model: Any, dtype: str) -> None:
    """Hold the frozen weights of linear layers in `dtype`, and let the model compute in it whoever
    calls it; what trains stays as it is.

    Embeddings, norms and biases are few, and stay in float32: each forward runs under autocast.
    Those of its parts too that generate(), or a user, calls by themselves: a backbone, an encoder.
    """
    if dtype != "bfloat16":
        return
    for module in model.modules():
        if kind(module) in ("Linear", "Conv1D") and not module.weight.requires_grad:
            module.weight.data = module.weight.data.to(torch.bfloat16)
        if isinstance(module, transformers.PreTrainedModel):
            # A partial, which deepcopy binds to the copy, as it would not a closure.
            forward = functools.partial(_in_bfloat16, module.forward)
            module.forward = functools.update_wrapper(forward, module.forward)
    model.lora_dtype = torch.bfloat16


def _in_bfloat16(forward: Callable[..., Any], *args: Any, **named: Any) -> Any:
    given = (value for value in (*args, *named.values()) if isinstance(value, Tensor))
    with torch.autocast(next(given, torch.empty(0)).device.type, torch.bfloat16):
        return forward(*args, **named)


def checkpoint_activations(model: Any) -> None:
    """Let each block keep what it is given alone, and compute the rest again for the backward pass.

    The masks are drawn again as they were, so that nothing is lost but time. A run without it drops
    by other masks where layers of one input share theirs (siblings). Raises ModelError where
    transformers knows no such blocks in the architecture.
    """
    # transformers 5.17 has the older name alone, and 5.23 warns of it.
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError:
        raise ModelError(
            f"--activation-checkpointing: transformers has none for {type(model).__name__}. Leave"
            " it out, and lower --batch-size or --max-length."
        ) from None
    model.disable_input_require_grads()  # on for reentrant checkpointing, which needs it
