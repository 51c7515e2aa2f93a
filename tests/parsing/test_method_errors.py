"""A user's own LightningCLI, whose parser knows nothing of this package."""

from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_peft  # noqa: F401 (what a user's program does)

STRATEGY = "--trainer.strategy=lightning_peft.PEFTStrategy"


def said(capsys: Any, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        LightningCLI(BoringModel, save_config_callback=None, args=["fit", STRATEGY, *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.strategy.method=LoRA", "--trainer.strategy.method.rnk=8"], "LoRA has no 'rnk'"),
        (["--trainer.strategy.method=LoRA", "--trainer.strategy.method.r=x"], "LoRA: r=x was given; int was expected"),
        (["--trainer.strategy.mthod=LoRA"], "PEFTStrategy has no 'mthod'. Did you mean 'method'?"),
        (["--trainer.strategy.checkpoint=ful"], "checkpoint=ful was given; one of 'adapter', 'full' was expected"),
        (["--trainer.strategy.method=LoRRA", "--trainer.strategy.method.r=8"], "There is no method 'LoRRA'"),
        (["--trainer.strategy.method=LoRRA"], "Unknown method 'LoRRA'. Did you mean 'lora'?"),
        (["--trainer.strategy.method=LoRA", "--trainer.strategy.method.r=-1"], "LoRA: rank r=-1 was given"),
        (["--trainer.strategy.method=LoRA", "--trainer.strategy.base=dpp"], "Unknown base strategy 'dpp'"),
    ],
)
def test_a_mistake_in_a_method_or_the_strategy_is_one_line(arguments: list[str], expected: str, capsys: Any) -> None:
    (line,) = (line for line in said(capsys, *arguments) if "Seed set" not in line)
    assert expected in line


def test_other_mistakes_are_lightnings(capsys: Any) -> None:
    lines = said(capsys, "--trainer.max_steps=x")
    assert lines[0].startswith("usage: ")
    assert 'Parser key "trainer.max_steps"' in "".join(lines)
