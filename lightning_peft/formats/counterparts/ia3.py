"""IA3 in HF PEFT's format. Which side a vector rescales is seen in its shape: ``[out, 1]`` or ``[1, in]``.

Beside a convolution it is ``[1, channels, 1, ...]`` for both, and the configuration says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import regex
from torch import nn

from lightning_peft.core.adapter import CHILD
from lightning_peft.core.method import PEFTMethod
from lightning_peft.core.view import ModelView
from lightning_peft.formats.counterpart import PREFIX, Counterpart, Shapes, targets_for_hf
from lightning_peft.methods.ia3 import IA3
from lightning_peft.targets.naming import suffixes, targets_from
from lightning_peft.targets.patterns import as_list, fullmatch, matches
from lightning_peft.tensors.weights import is_conv1d


class IA3InHF(Counterpart):
    """``IA3``."""

    method = IA3
    peft_type = "IA3"
    convolutions = (nn.Conv2d, nn.Conv3d)
    keys = frozenset({"feedforward_modules", "init_ia3_weights"})
    parameters: ClassVar[Mapping[str, str]] = {"ia3_l": "ia3_l"}

    def names(self, root: ModelView, method: IA3, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, str]:
        """Return the vectors; those of a convolution's input have another name here."""
        modules = {host: root.modules[host] for host in hosts}
        of_input = {host for host in method.inputs(root, modules) if isinstance(modules[host], self.convolutions)}
        return {
            f"{PREFIX}{host}.ia3_l": f"{host}.{CHILD}.{'ia3_l_input' if host in of_input else 'ia3_l'}"
            for host in modules
        }

    def config(self, root: ModelView, method: IA3, hosts: Iterable[str], chosen: Iterable[str]) -> dict[str, Any]:
        """Return the targets; HF PEFT wants those whose input is rescaled to be a subset, word for word."""
        modules = root.modules
        hosts = {host: modules[host] for host in hosts}
        inputs = method.inputs(root, hosts)
        targets = suffixes(hosts, modules) or sorted(hosts)
        feedforward: list[str] | str = [t for t in targets if any(matches(t, host) for host in inputs)]
        if {host for host in hosts if _is_named(feedforward, host)} != inputs:
            # Another module's name ends so too. A regular expression is matched with the whole name.
            feedforward = "|".join(map(regex.escape, sorted(inputs)))
        return {
            "target_modules": targets_for_hf(hosts, root) if targets is None else targets,
            "feedforward_modules": feedforward,
            "fan_in_fan_out": all(is_conv1d(module) for module in hosts.values()),
        }

    def read(self, root: ModelView, config: Mapping[str, Any], shapes: Shapes, source: str) -> PEFTMethod:
        """Return the IA3."""
        hosts = self.hosts(root, shapes, source)
        said = config.get("feedforward_modules") or ()
        inputs = [
            host
            for host in hosts
            if shapes[f"{PREFIX}{host}.ia3_l"][0] == 1
            and (not isinstance(root.modules[host], self.convolutions) or _is_named(said, host))
        ]
        return IA3(
            target_modules=targets_from(hosts, root),
            feedforward_modules=targets_from(inputs, root) if inputs else None,
        )


def _is_named(said: Any, host: str) -> bool:
    """Whether HF PEFT takes ``feedforward_modules``, a regular expression or endings, for naming ``host``."""
    return fullmatch(said, host) if isinstance(said, str) else any(host.endswith(str(end)) for end in as_list(said))
