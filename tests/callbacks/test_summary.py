import logging
from pathlib import Path

import pytest
import torch
from modules import Regression, loader, trainer
from torch import nn
from torch.optim import SGD, AdamW

from lightning_peft import LoRA, PEFTStrategy
from lightning_peft.callbacks import PEFTSummary
from lightning_peft.callbacks.summary import state_elements


def fit(tmp_path: Path, caplog: pytest.LogCaptureFixture, **options: object) -> str:
    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        strategy = PEFTStrategy(LoRA(r=2, target_modules="net.0"), train_also="net.2")
        trainer(tmp_path, strategy, **options).fit(Regression(), loader())
    return caplog.text


def test_printed_by_default_with_the_right_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = fit(tmp_path, caplog, enable_model_summary=True)
    # 8 → 16 → 4 with biases, and r = 2 on the first layer; the second one is trained whole.
    base, adapter, whole = 8 * 16 + 16 + 16 * 4 + 4, 2 * (8 + 16), 16 * 4 + 4
    share = (adapter + whole) / (base + adapter)
    assert f"{adapter + whole} trained of {base + adapter} ({share:.2%})" in text
    assert "PEFTSingleDeviceStrategy" in text
    assert "LoRA, adapter 'default'" in text
    assert "1 modules: 0" in text
    assert "net.2" in text
    assert text.count("trained whole") == 1


def test_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from torch import nn

    class Wide(Regression):
        def build(self) -> nn.Module:
            return nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 512), nn.Linear(512, 4))

    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, PEFTStrategy(LoRA(r=8, target_modules="net.2")), enable_model_summary=True).fit(
            Wide(), loader()
        )
    base = 4 * (8 * 4096 + 4096 + 4096 * 512 + 512 + 512 * 4 + 4)
    adapter = 4 * 8 * (4096 + 512)
    # AdamW keeps two moments for what it trains.
    assert f"optimizer state  {2 * adapter / 1e6:.1f} MB" in caplog.text
    assert f"{3 * adapter / 1e6:.1f} MB; of the whole model {3 * base / 1e6:.1f} MB" in caplog.text


def test_silent_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "trained of" not in fit(tmp_path, caplog, enable_model_summary=False)


def test_a_summary_of_the_users_is_not_doubled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = fit(tmp_path, caplog, enable_model_summary=True, callbacks=[PEFTSummary()], enable_checkpointing=False)
    assert text.count("trained of") == 1


def test_state_elements() -> None:
    parameter = [nn.Parameter(torch.zeros(3))]
    assert state_elements(SGD(parameter, lr=0.1)) == 0
    assert state_elements(SGD(parameter, lr=0.1, momentum=0.9)) == 1
    assert state_elements(AdamW(parameter)) == 2
    assert state_elements(AdamW(parameter, amsgrad=True)) == 3
