"""LoRA From Scratch: low-rank adapters for PyTorch models, exact and readable.

    report = lora.inject(model, lora.LoRAConfig(r=8, target_modules="all-linear"))
    ...                                   # train
    lora.save(model, "adapter/")          # PEFT's format
    lora.merge(model); lora.eject(model)  # a plain model again

The names imported below are the public interface. A name loads on first use, so that `import lora`
is instant: a type checker reads the imports, Python reads the table beneath them.

A method that you add yourself brings a config that has no name here. It is
`lora.METHODS["name"].Config`, or the class that you wrote.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lora import errors as errors
    from lora import nf4 as nf4
    from lora import testing as testing
    from lora.adapter import Adapter as Adapter
    from lora.checkpoint import load as load
    from lora.checkpoint import save as save
    from lora.errors import CheckpointError as CheckpointError
    from lora.errors import ConfigError as ConfigError
    from lora.errors import LoraError as LoraError
    from lora.errors import MergeError as MergeError
    from lora.errors import TargetError as TargetError
    from lora.injection import activate as activate
    from lora.injection import disabled as disabled
    from lora.injection import eject as eject
    from lora.injection import init as init
    from lora.injection import inject as inject
    from lora.interop.trainer import AdapterCallback as AdapterCallback
    from lora.merging import Certificate as Certificate
    from lora.merging import merge as merge
    from lora.merging import restore as restore
    from lora.method import METHODS as METHODS
    from lora.method import Selection as Selection
    from lora.methods.adalora import AdaLoRAConfig as AdaLoRAConfig
    from lora.methods.bitfit import BitFitConfig as BitFitConfig
    from lora.methods.dora import DoRAConfig as DoRAConfig
    from lora.methods.full import FullConfig as FullConfig
    from lora.methods.head import HeadConfig as HeadConfig
    from lora.methods.hira import HiRAConfig as HiRAConfig
    from lora.methods.ia3 import IA3Config as IA3Config
    from lora.methods.lntuning import LNTuningConfig as LNTuningConfig
    from lora.methods.lora import LoRAConfig as LoRAConfig
    from lora.methods.tokens import TokensConfig as TokensConfig
    from lora.methods.topk import TopKConfig as TopKConfig
    from lora.methods.vera import VeRAConfig as VeRAConfig
    from lora.report import Report as Report
    from lora.settings import AdapterConfig as AdapterConfig
else:
    # Hidden from the type checker, which would take any name for one that __getattr__ knows.
    _NAMES = {
        "lora": "errors nf4 testing",
        "lora.adapter": "Adapter",
        "lora.checkpoint": "load save",
        "lora.errors": "CheckpointError ConfigError LoraError MergeError TargetError",
        "lora.injection": "activate disabled eject init inject",
        "lora.merging": "Certificate merge restore",
        "lora.method": "METHODS Selection",
        "lora.report": "Report",
        "lora.settings": "AdapterConfig",
        "lora.interop.trainer": "AdapterCallback",
        "lora.methods.adalora": "AdaLoRAConfig",
        "lora.methods.bitfit": "BitFitConfig",
        "lora.methods.dora": "DoRAConfig",
        "lora.methods.full": "FullConfig",
        "lora.methods.head": "HeadConfig",
        "lora.methods.hira": "HiRAConfig",
        "lora.methods.ia3": "IA3Config",
        "lora.methods.lntuning": "LNTuningConfig",
        "lora.methods.lora": "LoRAConfig",
        "lora.methods.tokens": "TokensConfig",
        "lora.methods.topk": "TopKConfig",
        "lora.methods.vera": "VeRAConfig",
    }
    _MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}

    def __getattr__(name):
        if name not in _MODULE:
            raise AttributeError(f"module 'lora' has no attribute {name!r}")
        module = _MODULE[name]
        if module == "lora":
            return importlib.import_module(f"lora.{name}")
        if name == "METHODS":
            importlib.import_module("lora.methods")  # fills it
        return getattr(importlib.import_module(module), name)

    def __dir__():
        return sorted([*_MODULE, "__version__"])
