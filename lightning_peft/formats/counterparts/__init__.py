"""One file per method that HF PEFT has too. Importing this package registers them all.

Imports tensors, core, targets, adapters.low_rank, adapters.virtual_tokens, methods and formats.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
