"""One file per method that HF PEFT has as a key of another's configuration. Importing this package registers them all.

Imports core, structure, targets, adapters.low_rank, methods, formats and formats.counterparts.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
