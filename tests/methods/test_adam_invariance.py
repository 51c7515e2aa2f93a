"""LoRA under Adam has fewer knobs than it seems: LoRA Without Regret (Schulman and others, 2025), on parametrization.

W0 + (alpha / r) B A with B = 0 at first, trained with Adam. Take alpha / (p q) for alpha, p A for the initial A, and
p η_A and q η_B for the rates. Then at every step A is p times and B q times what it was, and the change of the weight
is the same:

* the gradient of A is (alpha / r) Bᵀ G, which has become (alpha / (p q r)) q Bᵀ G, so 1 / p of it; that of B is 1 / q;
* Adam's step is η m / (√v + ε), where m and √v have both become 1 / p (or 1 / q). So with ε / p (or ε / q), or an ε far
  below √v, the quotient is the same, and the rate makes the step p (or q) times as large.

Where p and q are powers of two, no rounding changes either: losses are equal to the last bit.
"""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from families import build
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy

STEPS, RANK, ALPHA, RATE = 12, 4, 8.0, 3e-3
Groups = Callable[[dict[str, Tensor]], list[dict[str, Any]]]


class Run(L.LightningModule):
    """A language model that learns random texts; its initial A is multiplied by p."""

    def __init__(self, p: float, groups: Groups) -> None:
        super().__init__()
        self.model = build("llama")[0].double().train()
        self.p, self.groups = p, groups
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        adapters = {name: p for name, p in self.named_parameters() if "lora_" in name}
        with torch.no_grad():
            for name, parameter in adapters.items():
                if name.endswith("lora_A"):
                    parameter.mul_(self.p)
        return torch.optim.AdamW(self.groups(adapters), weight_decay=0.0)


def losses(alpha: float, p: float, groups: Groups, **lora: Any) -> list[float]:
    draw = torch.Generator().manual_seed(3)
    data = [torch.randint(3, 50, (4, 9), generator=draw) for _ in range(STEPS)]
    module = Run(p, groups)
    L.seed_everything(0, verbose=False)
    L.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        strategy=PEFTStrategy(LoRA(r=RANK, alpha=alpha, **lora)),
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return module.losses


def apart(rate_a: float, rate_b: float, eps_a: float, eps_b: float) -> Groups:
    """A and B in groups of their own."""

    def groups(adapters: dict[str, Tensor]) -> list[dict[str, Any]]:
        parts = (("lora_A", rate_a, eps_a), ("lora_B", rate_b, eps_b))
        return [
            {"params": [v for name, v in adapters.items() if name.endswith(part)], "lr": rate, "eps": eps}
            for part, rate, eps in parts
        ]

    return groups


def together(rate: float, eps: float) -> Groups:
    return lambda adapters: [{"params": list(adapters.values()), "lr": rate, "eps": eps}]


def transformed(p: float, q: float, eps: float = 1e-8, own_eps: bool = True) -> list[float]:
    scaled = (eps / p, eps / q) if own_eps else (eps, eps)
    return losses(ALPHA / (p * q), p, apart(p * RATE, q * 2 * RATE, *scaled))


@pytest.fixture(scope="module")
def plain() -> list[float]:
    found = losses(ALPHA, 1.0, apart(RATE, 2 * RATE, 1e-8, 1e-8))
    assert found[-1] < found[0] - 0.01  # something has been learned
    return found


def test_powers_of_two_change_no_bit(plain: list[float]) -> None:
    assert transformed(4.0, 0.125) == plain
    assert transformed(0.5, 16.0) == plain


def test_any_numbers_change_nothing_but_rounding(plain: list[float]) -> None:
    assert transformed(3.0, 0.7) == pytest.approx(plain, rel=1e-11)


@pytest.mark.parametrize("broken", ["alpha", "rate of A", "rate of B"])
def test_each_part_of_it_is_needed(plain: list[float], broken: str) -> None:
    p, q = 4.0, 0.125
    groups = apart(
        RATE if broken == "rate of A" else p * RATE, (2 if broken == "rate of B" else 2 * q) * RATE, 2e-9, 8e-8
    )
    found = losses(ALPHA if broken == "alpha" else ALPHA / (p * q), p, groups)
    assert found[0] == plain[0]  # B is zero
    assert max(abs(a - b) for a, b in zip(found, plain, strict=True)) > 1e-4


def test_an_epsilon_that_is_felt_has_to_be_scaled() -> None:
    felt = 1e-3
    expected = losses(ALPHA, 1.0, apart(RATE, 2 * RATE, felt, felt))
    assert transformed(4.0, 0.125, felt) == expected
    assert transformed(4.0, 0.125, felt, own_eps=False) != pytest.approx(expected, rel=1e-5)


def test_lora_plus_gives_the_ratio_of_the_rates(plain: list[float]) -> None:
    """One group, as users have it: the ratio is LoRA+'s, and an epsilon that is nothing needs no scaling."""
    p, q = 3.0, 5.0
    one = losses(ALPHA, 1.0, together(RATE, 1e-30), loraplus_lr_ratio=2.0)
    other = losses(ALPHA / (p * q), p, together(p * RATE, 1e-30), loraplus_lr_ratio=2.0 * q / p)
    assert other == pytest.approx(one, rel=1e-10)
    assert one == pytest.approx(plain, rel=1e-2)
