"""LoRA From Scratch: low-rank adapters for PyTorch models, exact and readable.

    report = lora.inject(model, lora.LoRAConfig(r=8, target_modules="all-linear"))
    ...                                   # train
    lora.save(model, "adapter/")          # PEFT's format
    lora.merge(model); lora.eject(model)  # a plain model again

The names below are the public interface; they load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora import errors as errors
    from lora import nf4 as nf4
    from lora import testing as testing
    from lora.adapter import METHODS as METHODS
    from lora.adapter import Adapter as Adapter
    from lora.adapter import AdapterConfig as AdapterConfig
    from lora.adapter import Selection as Selection
    from lora.checkpoint import load as load
    from lora.checkpoint import save as save
    from lora.errors import CheckpointError as CheckpointError
    from lora.errors import ConfigError as ConfigError
    from lora.errors import LoraError as LoraError
    from lora.errors import MergeError as MergeError
    from lora.errors import TargetError as TargetError
    from lora.injection import Certificate as Certificate
    from lora.injection import Report as Report
    from lora.injection import activate as activate
    from lora.injection import disabled as disabled
    from lora.injection import eject as eject
    from lora.injection import init as init
    from lora.injection import inject as inject
    from lora.injection import merge as merge
    from lora.injection import restore as restore
    from lora.methods.full import FullConfig as FullConfig
    from lora.methods.lora import LoRAConfig as LoRAConfig

_HOMES = {
    "lora.adapter": "Adapter AdapterConfig Selection",
    "lora.checkpoint": "load save",
    "lora.errors": "CheckpointError ConfigError LoraError MergeError TargetError",
    "lora.injection": "Certificate Report activate disabled eject init inject merge restore",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in ("errors", "nf4", "testing"):
        return importlib.import_module(f"lora.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "METHODS" or name.endswith("Config"):
        importlib.import_module("lora.methods")
        methods = importlib.import_module("lora.adapter").METHODS
        if name == "METHODS":
            return methods
        for method in methods.values():
            if method.Config.__name__ == name:
                return method.Config
    raise AttributeError(f"module 'lora' has no attribute {name!r}")


def __dir__() -> list[str]:
    importlib.import_module("lora.methods")
    methods = importlib.import_module("lora.adapter").METHODS.values()
    configs = {method.Config.__name__ for method in methods}
    return sorted({*_HOME, *configs, "METHODS", "errors", "nf4", "testing", "__version__"})
