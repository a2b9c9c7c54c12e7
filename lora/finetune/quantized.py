"""Reads a base in NF4: packs each weight as from_pretrained reads it, or takes what bitsandbytes
saved. It can also cut each tensor as it is read, so that a rank of a sharded base never holds it
whole.

transformers has a door for this, a quantizer that it finds by name ("lora-nf4"). Of each tensor it
asks for an operation, and the operations write what they did into the Reading of that one load:

    load_base -> from_pretrained -> _NF4Quantizer -> _Pack, _Take, _Fit, each with the Reading
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lora import nf4
from lora.errors import LoraError, ModelError
from lora.finetune.weights import another_shape, not_finite
from lora.layers import backbone, inside, kind, views
from lora.methods.lora import LoRAConfig
from lora.nf4 import NF4Linear
from lora.targets import targets_of, uncalled


class Cut:
    """Keeps one rank's pieces of the tensors, and gives placeholders until all are read."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}  # stand-in and piece, by its memory
        self.pieces: dict[str, Tensor] = {}

    def take(self, tensor: Tensor) -> Tensor:
        """Keep this rank's piece, as FSDP2 cuts, and return a stand-in: zeros in no memory."""
        step = -(-len(tensor) // self.size)
        piece = tensor.detach()[self.rank * step :][:step].clone()
        stand_in = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
        self.taken[stand_in.data_ptr()] = stand_in, piece
        return stand_in

    def finish(self, model: Any) -> None:
        """Put each stand-in on the meta device, ties as they are, and name the pieces."""
        empty: dict[int, Any] = {}
        for name, parameter in model.named_parameters():
            if parameter.data_ptr() in self.taken:
                _, self.pieces[name] = self.taken[parameter.data_ptr()]
                values = torch.empty_like(
                    parameter, device="meta", memory_format=torch.contiguous_format
                )
                empty[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
        for module in model.modules():
            for leaf, parameter in module._parameters.items():
                module._parameters[leaf] = empty.get(id(parameter), parameter)
        self.taken.clear()


@dataclass(eq=False)
class BaseReading:
    """One load of a base: what is to happen to each tensor, and what has happened so far."""

    packs: bool = True  # the linear layers of the backbone
    dense: tuple[str, ...] = ()  # but for these, by name or dotted ending
    progress: Callable[[int, int], None] = lambda done, layers: None
    cut: Cut | None = None
    done: int = 0  # layers packed
    refused: LoraError | None = None  # from_pretrained logs an error of an operation and drops it
    shapes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Of tensors that do not fit: the shape in the files, and the model's."""

    def __deepcopy__(self, memo: object) -> BaseReading:
        return self  # transformers copies its configs, and a copy would learn what this is to know

    @property
    def pieces(self) -> dict[str, Tensor]:
        return {} if self.cut is None else self.cut.pieces

    def fitting(self, model: Any, name: str, tensor: Any) -> dict[str, Any]:
        """Returns the tensor by its name, or nothing if the model's has another shape.

        It then counts as missing. Under a quantizer transformers 5.17 compares no shapes, and a
        head of another size would pass.
        """
        path, _, leaf = name.rpartition(".")
        parameter = getattr(model.get_submodule(path), leaf)
        if parameter is None or tensor.shape == parameter.shape:
            return {name: tensor}
        self.shapes[name] = tensor.shape, parameter.shape
        return {}

    def cut_down(self, tensors: dict[str, Any], least: int) -> dict[str, Any]:
        """Returns the tensors, those of at least `least` dimensions cut if this load cuts."""
        if self.cut is None:
            return tensors
        return {key: self.cut.take(t) if t.dim() >= least else t for key, t in tensors.items()}

    def put(self, model: Any, path: str, layer: NF4Linear, q: nf4.NF4) -> dict[str, Any]:
        """Put the layer at the path. Returns its tensors by their names in the model."""
        nf4.put(model, {id(model.get_submodule(path)): layer})
        parameters = nf4.parameters_of(q)
        return self.cut_down({f"{path}.{leaf}": p for leaf, p in parameters.items()}, 1)


@register_quantization_config("lora-nf4")
class _NF4Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Carries a Reading through from_pretrained."""

    quant_method: Any = "lora-nf4"

    def __init__(self, reading: BaseReading, **options: Any) -> None:
        self.reading = reading

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}  # a Reading is no JSON


@register_quantizer("lora-nf4")
class _NF4Quantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes each weight as from_pretrained reads it, tensor by tensor, from its files.

    pre_quantized: the files are bitsandbytes', and it takes what they hold.
    """

    is_trainable = True

    def is_serializable(self, **options: Any) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        self.reading: BaseReading = self.quantization_config.reading
        self.expected = model.state_dict()  # on the meta device: shapes and dtypes
        self.names: tuple[str, ...] = ()
        self.as_saved = self.pre_quantized or not self.reading.packs
        if self.as_saved:  # each tensor is read in the dtype that it is saved in
            model._get_dtype_plan = lambda dtype: {"*": None}
        else:
            self.names = packable(model, self.reading.dense)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> None:
        self.remove_quantization_config(model)  # an NF4Linear needs none of it
        for name, tensor in model.state_dict().items():
            path, _, leaf = name.rpartition(".")
            packed = leaf == "weight" and isinstance(model.get_submodule(path), NF4Linear)
            expected = tensor if packed else self.expected.get(name, tensor)
            if tensor.shape != expected.shape:
                raise another_shape(name, tensor.shape, expected.shape)
        if self.reading.cut is not None:
            self.reading.cut.finish(model)
        if self.as_saved:
            del model._get_dtype_plan
        if self.pre_quantized:
            # save_pretrained would undo our conversions of the keys.
            model._weight_conversions = [
                conversion
                for conversion in model._weight_conversions
                if not any(
                    isinstance(op, _Operation) for op in getattr(conversion, "operations", ())
                )
            ]

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        # The operation checks the shapes of all tensors. It leaves out those in a dtype of their
        # own, since what goes through an operation is cast to the model's.
        if self.pre_quantized or param_name not in self.expected:
            return False
        path, _, leaf = param_name.rpartition(".")
        packed = leaf == "weight" and path in self.names
        return packed or bool(self.expected[param_name].dtype == model.config.dtype)

    def get_quantize_ops(self) -> ConversionOps:
        return _Pack(self.reading, self.names)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        reading: BaseReading = self.quantization_config.reading
        return [
            WeightConverter(list(_Take.KEYS), "weight", [_Take(reading)]),
            WeightConverter("bias$", "bias", [_Fit(reading)]),
        ]


class _Operation(ConversionOps):  # type: ignore[misc]
    def __init__(self, reading: BaseReading) -> None:
        self.reading = reading


class _Pack(_Operation):
    """Packs the weights of the named layers. Each layer is dense and without values until then:
    transformers 5.17 casts what it reads to the dtype of the parameter that it replaces."""

    def __init__(self, reading: BaseReading, names: tuple[str, ...]) -> None:
        super().__init__(reading)
        self.names = names

    def convert(self, input_dict: dict[str, Any], model: Any, **options: Any) -> dict[str, Any]:
        reading, result = self.reading, dict[str, Any]()
        for name, value in input_dict.items():
            read = reading.fitting(model, name, value[0] if isinstance(value, list) else value)
            path, _, leaf = name.rpartition(".")
            if not read or leaf != "weight" or path not in self.names:
                result |= reading.cut_down(read, 2)
                continue
            layer = model.get_submodule(path)
            weight = read[name].T if kind(layer) == "Conv1D" else read[name]
            try:
                q = nf4.quantize(weight, double_quant=True, name=name)
            except LoraError as error:
                finite = not weight.is_floating_point() or bool(weight.isfinite().all())
                base = model.name_or_path
                reading.refused = error if finite else not_finite(base, name, weight)
                raise
            result |= reading.put(model, path, NF4Linear.over(layer, q), q)
            reading.done += 1
            reading.progress(reading.done, len(self.names))
        return result


class _Fit(_Operation):
    """Takes a tensor if it has the model's shape."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **options: Any
    ) -> dict[str, Any]:
        ((tensor,),) = input_dict.values()
        return self.reading.fitting(model, full_layer_name, tensor)


class _Take(_Operation):
    """Makes an NF4Linear of what bitsandbytes saved of a layer."""

    KEYS = tuple(
        f"weight{rest}$"
        for rest in (
            ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", ".absmax",
            ".quant_map", ".nested_absmax", ".nested_quant_map", "",
        )
    )  # fmt: skip

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str, model: Any, **options: Any
    ) -> dict[str, Any]:
        reading = self.reading
        tensors = {key.removesuffix("$"): values[0] for key, values in input_dict.items()}
        if tensors.keys() == {"weight"} and tensors["weight"].is_floating_point():
            return reading.cut_down(reading.fitting(model, full_layer_name, tensors["weight"]), 2)
        path = full_layer_name.rpartition(".")[0]
        layer = model.get_submodule(path)
        try:
            q = nf4.from_bitsandbytes(tensors, full_layer_name)
            if kind(layer) not in ("Linear", "Conv1D"):
                raise ModelError(
                    f"{path} is {type(layer).__name__}, in NF4 in its files; only linear layers are"
                    " held so. Pass the weights as they were before, with --quantize nf4."
                )
            if not inside(path, backbone(model)):  # the head: another size means a new head
                W = nf4.dequantize(q, torch.float32)
                W = W.T if kind(layer) == "Conv1D" else W
                return reading.cut_down(reading.fitting(model, full_layer_name, W), 2)
            fresh = NF4Linear.over(layer, q)
            shape = (fresh.out_features, fresh.in_features)
            if q.shape != shape:
                raise another_shape(full_layer_name, q.shape, shape)
        except LoraError as error:
            reading.refused = error
            raise
        return reading.put(model, path, fresh, q)


def quantization(config: Any, reading: BaseReading, saved_packed: bool) -> dict[str, Any]:
    """Returns what to pass to from_pretrained so that the Reading sees each tensor.

    saved_packed: bitsandbytes packed the files, which the config then says in our words.
    """
    if saved_packed:
        config.quantization_config = {"quant_method": "lora-nf4", "reading": reading}
    elif reading.packs:
        return {"dtype": "auto", "quantization_config": _NF4Config(reading)}
    elif reading.cut is not None:
        return {"dtype": torch.float32, "quantization_config": _NF4Config(reading)}
    return {"dtype": torch.float32}


def saved_by_bitsandbytes(base: str, config: Any, dense: tuple[str, ...]) -> bool:
    """True if config.json says that bitsandbytes packed the weights.

    Raises ModelError if it packed them in 8 bits, or if `dense` asks for layers that it packed.
    """
    stated = getattr(config, "quantization_config", None) or {}
    bits = [n for n in (4, 8) if stated.get(f"load_in_{n}bit")]
    if not bits and stated.get("quant_method") != "bitsandbytes":
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


def packable(model: Any, dense: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Returns the layers that --quantize packs: the linear ones of the backbone.

    Those that `dense` names stay dense, and those whose dtype the model reads: T5 casts the input
    of its `wo` to the dtype of its weight.
    """
    dtype_read = [f".{name}." for name in getattr(model, "_keep_in_fp32_modules", None) or ()]
    names = targets_of(model, LoRAConfig(exclude_modules=dense or None), (), uncalled(model))
    return tuple(name for name in names if not any(part in f".{name}." for part in dtype_read))


def unfilled(
    model: Any, names: tuple[str, ...], device: torch.device | str
) -> dict[int, nn.Module]:
    """Returns an NF4Linear without values for each named layer, by the layer's id."""
    empty: dict[int, nn.Module] = {}
    for name in names:
        layer = model.get_submodule(name)
        (view,) = views(layer)
        bias = view.parameters()[1] is not None
        shape = view.in_features, view.out_features
        empty[id(layer)] = NF4Linear(*shape, bias, view.dtype, device=device).train(layer.training)
    return empty
