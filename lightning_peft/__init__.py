"""Parameter-efficient fine-tuning for any LightningModule, as one Trainer flag."""

from importlib.metadata import version

from lightning_peft.callbacks.other_lightning import replace_pytorch_lightning
from lightning_peft.callbacks.summary import AdapterSummary, adapter_summary
from lightning_peft.core.contexts import disable
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.moved import keep_old_names
from lightning_peft.errors import PEFTError
from lightning_peft.formats.peft_config.reading import from_peft_config
from lightning_peft.methods import *  # noqa: F403 (one export line per method, in that package)
from lightning_peft.methods import __all__ as _methods
from lightning_peft.operations.combine import combine
from lightning_peft.operations.eject import eject
from lightning_peft.operations.inject import inject, set_adapter
from lightning_peft.operations.merge import MergeReport, merge, unmerge
from lightning_peft.operations.per_sample import adapter_names
from lightning_peft.operations.to_lora import difference_to_lora, to_lora
from lightning_peft.parsing.constructor_errors import install as explain_constructors
from lightning_peft.parsing.method_errors import install as explain_configs
from lightning_peft.storage.base_weights import load_base_weights
from lightning_peft.storage.loading import load_adapter
from lightning_peft.storage.saving import save_adapter
from lightning_peft.storage.state import adapter_state_dict
from lightning_peft.strategy import PEFTStrategy, register_strategies
from lightning_peft.strategy.restore import install

__version__ = version("lightning_peft")

__all__ = [
    "AdapterSummary",
    "MergeReport",
    "PEFTError",
    "PEFTMethod",
    "PEFTStrategy",
    "adapter_names",
    "adapter_state_dict",
    "adapter_summary",
    "combine",
    "difference_to_lora",
    "disable",
    "eject",
    "from_peft_config",
    "inject",
    "load_adapter",
    "load_base_weights",
    "merge",
    "replace_pytorch_lightning",
    "save_adapter",
    "set_adapter",
    "to_lora",
    "unmerge",
]
__all__ += _methods

register_strategies()
install()
explain_configs()
explain_constructors()
keep_old_names()
