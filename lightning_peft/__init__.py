"""Parameter-efficient fine-tuning for any LightningModule, as one Trainer flag."""

from lightning_peft.base_weights import load_base_weights
from lightning_peft.combine import combine
from lightning_peft.disable import disable
from lightning_peft.eject import eject
from lightning_peft.errors import PEFTError
from lightning_peft.inject import inject, set_adapter
from lightning_peft.merge import MergeReport, merge, unmerge
from lightning_peft.method import PEFTMethod
from lightning_peft.methods import *  # noqa: F403 (one export line per method, in that package)
from lightning_peft.methods import __all__ as _methods
from lightning_peft.per_sample import adapter_names
from lightning_peft.restore import install
from lightning_peft.state import adapter_state_dict
from lightning_peft.storage import load_adapter, save_adapter
from lightning_peft.strategy import PEFTStrategy, register_strategies

__all__ = [
    "MergeReport",
    "PEFTError",
    "PEFTMethod",
    "PEFTStrategy",
    "adapter_names",
    "adapter_state_dict",
    "combine",
    "disable",
    "eject",
    "inject",
    "load_adapter",
    "load_base_weights",
    "merge",
    "save_adapter",
    "set_adapter",
    "unmerge",
]
__all__ += _methods

register_strategies()
install()
