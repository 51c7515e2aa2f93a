"""Metrics of generated answers, by the names under which they are logged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.text import BLEUScore, CHRFScore, EditDistance, ROUGEScore, SacreBLEUScore, WordErrorRate

from lightning_peft.errors import PEFTError
from lightning_peft.tasks.answers.last_number import LastNumber
from lightning_peft.tasks.answers.logical_form import LogicalForm
from lightning_peft.tasks.answers.share_right import ExactMatch


class Rouge(ROUGEScore):
    """The F-measure of one kind of ROUGE.

    Args:
        key: `rouge1`, `rouge2` or `rougeL`.
    """

    def __init__(self, key: str) -> None:
        super().__init__(rouge_keys=key)
        self.key = key

    def __hash__(self) -> int:
        # torchmetrics' looks at the values alone, and torch takes modules of one hash for one module.
        return id(self)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean over answers."""
        return super().compute()[f"{self.key}_fmeasure"]


class _OneReference:
    """Takes one expected text for each answer where torchmetrics takes several."""

    def update(self, answers: Sequence[str], expected: Sequence[str]) -> None:
        """Count answers: what was generated, and what should have been."""
        super().update(answers, [[text] for text in expected])  # type: ignore[misc]


class Bleu(_OneReference, BLEUScore):  # type: ignore[misc]
    """BLEU over white space, of all answers together."""


class SacreBleu(_OneReference, SacreBLEUScore):  # type: ignore[misc]
    """BLEU over sacreBLEU's tokens, of all answers together."""


class Chrf(_OneReference, CHRFScore):  # type: ignore[misc]
    """chrF++: characters and words, of all answers together."""


METRICS: dict[str, Callable[[], Any]] = {
    "exact_match": ExactMatch,
    "last_number": LastNumber,
    "logical_form": LogicalForm,
    "rouge1": partial(Rouge, "rouge1"),
    "rouge2": partial(Rouge, "rouge2"),
    "rougeL": partial(Rouge, "rougeL"),
    "bleu": Bleu,
    "sacre_bleu": SacreBleu,
    "chrf": Chrf,
    "edit_distance": EditDistance,
    "word_error_rate": WordErrorRate,
}
"""Every metric by its name."""
GROUPS = {"rouge": ("rouge1", "rouge2", "rougeL")}


def text_metrics(names: Iterable[str]) -> nn.ModuleDict:
    """Make metrics of generated answers; each is updated with the answers and the expected texts.

    Args:
        names: Of `METRICS`, or `rouge` for its three.

    Raises:
        PEFTError: There is no metric of a name.
    """
    if isinstance(names, str):
        raise PEFTError(f"metrics={names!r}: expected a list of names, such as [{names}]")
    chosen: dict[str, Metric] = {}
    for name in names:
        for each in GROUPS.get(name, (name,)):
            if each not in METRICS:
                raise PEFTError(f"metrics: there is no {name!r}; expected some of {', '.join([*GROUPS, *METRICS])}")
            chosen[each] = METRICS[each]()
    return nn.ModuleDict(chosen)
