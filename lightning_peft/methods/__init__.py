"""One file per method. Importing this package registers them all; ``__all__`` is what the package exports.

Imports tensors, core, structure, targets, adapters, adapters.bottleneck, adapters.low_rank and adapters.virtual_tokens.
"""

import pkgutil
from importlib import import_module

from lightning_peft.methods.adalora import AdaLoRA
from lightning_peft.methods.beft import BEFT
from lightning_peft.methods.bitfit import BitFit
from lightning_peft.methods.compacter import Compacter
from lightning_peft.methods.dora import DoRA
from lightning_peft.methods.full_finetuning import FullFinetuning
from lightning_peft.methods.ia3 import IA3
from lightning_peft.methods.layer_norm_tuning import LayerNormTuning
from lightning_peft.methods.loha import LoHa
from lightning_peft.methods.lokr import LoKr
from lightning_peft.methods.lora import LoRA
from lightning_peft.methods.loreft import LoReFT
from lightning_peft.methods.miss import MiSS
from lightning_peft.methods.new_tokens import NewTokens
from lightning_peft.methods.oft import OFT
from lightning_peft.methods.parallel_adapter import ParallelAdapter
from lightning_peft.methods.prefix_tuning import PrefixTuning
from lightning_peft.methods.prompt_tuning import PromptTuning
from lightning_peft.methods.series_adapter import SeriesAdapter
from lightning_peft.methods.vera import VeRA

__all__ = [
    "BEFT",
    "IA3",
    "OFT",
    "AdaLoRA",
    "BitFit",
    "Compacter",
    "DoRA",
    "FullFinetuning",
    "LayerNormTuning",
    "LoHa",
    "LoKr",
    "LoRA",
    "LoReFT",
    "MiSS",
    "NewTokens",
    "ParallelAdapter",
    "PrefixTuning",
    "PromptTuning",
    "SeriesAdapter",
    "VeRA",
]

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
