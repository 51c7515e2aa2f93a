"""Where a pretrained model comes from, and how it is loaded.

Imports no other package.
"""

from lightning_peft.tasks.pretrained.loading import Dtype, load_model, load_tokenizer, meta_model
from lightning_peft.tasks.pretrained.source import locate

__all__ = ["Dtype", "load_model", "load_tokenizer", "locate", "meta_model"]
