"""Metrics that say of each answer whether it is right."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torchmetrics import MeanMetric


class ShareRight(MeanMetric):
    """The share of answers that are right."""

    @abstractmethod
    def right(self, answer: str, expected: str) -> bool:
        """Whether an answer is right: what was generated, and what should have been."""

    def update(self, answers: Sequence[str], expected: Sequence[str]) -> None:  # type: ignore[override]
        """Count answers: what was generated, and what should have been."""
        right = [float(self.right(a, b)) for a, b in zip(answers, expected, strict=True)]
        super().update(torch.tensor(right, device=self.device))


class ExactMatch(ShareRight):
    """The share of answers that are the expected ones, character by character but for white space around them."""

    def right(self, answer: str, expected: str) -> bool:
        """Whether two texts are the same."""
        return answer.strip() == expected.strip()
