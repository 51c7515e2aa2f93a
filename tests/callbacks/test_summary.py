import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from modules import Regression, loader, trainer
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from lightning_peft import FullFinetuning, LoRA, PEFTStrategy, adapter_summary, inject, merge
from lightning_peft.callbacks import PEFTSummary
from lightning_peft.callbacks.summary import _STATE_ELEMENTS, state_elements


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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in _STATE_ELEMENTS),
        *((kind, {"amsgrad": True}) for kind in (optim.Adam, optim.AdamW)),
        (optim.RMSprop, {"momentum": 0.9, "centered": True}),
        (optim.SGD, {"momentum": 0.9}),
    ],
)
def test_state_elements_are_those_that_torch_keeps(kind: type[Optimizer], options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.ones(3, 5))
    optimizer = kind([parameter], lr=0.1, **options)  # type: ignore[call-arg]
    parameter.grad = torch.ones(3, 5)
    if kind is optim.SparseAdam:
        parameter.grad = parameter.grad.to_sparse()
    counted = state_elements(optimizer)
    optimizer.step()
    assert (
        counted == sum(v.numel() for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.dim()) / 15
    )


def test_every_optimizer_of_torch_is_known() -> None:
    found = {kind for kind in vars(optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)}
    unknown = {kind.__name__ for kind in found - _STATE_ELEMENTS.keys()}
    assert unknown - {"Muon"} == {"Optimizer", "Adafactor", "LBFGS"}


def test_no_optimizer_of_the_users_is_made_or_stepped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, stepped = [], []

    class Own(optim.SGD):
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **options)

        def step(self, closure: Any = None) -> Any:
            stepped.append(self)
            return super().step(closure)

    class Module(Regression):
        def configure_optimizers(self) -> Any:
            return Own(self.parameters(), lr=0.1)

    logging.getLogger("lightning.pytorch").propagate = True
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, enable_model_summary=True, max_steps=2).fit(Module(), loader())
    assert len(made) == 1
    assert stepped == made * 2
    # Nothing is claimed of what it keeps.
    assert "trained of" in caplog.text
    assert "optimizer state" not in caplog.text


def test_a_model_is_summed_up_without_a_trainer() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    assert (adapter_summary(model).trained, adapter_summary(model).total) == (44, 44)
    inject(model, LoRA(r=2, target_modules=["0"]), train_also=["1"])
    found = adapter_summary(model)
    # LoRA of rank 2 on a layer of 4 x 6, and the layer that is trained whole.
    assert (found.trained, found.total) == (20 + 14, 44 + 20)
    assert found.modules == {"default": {"0": 20}}
    assert (found.active, found.merged) == (("default",), False)
    assert "34 trained of 64 (53.12%)" in str(found)
    assert "trained whole  1" in str(found)
    assert found._repr_html_().startswith("<pre>")
    merge(model)
    assert adapter_summary(model).merged
    assert "active         default, merged into the weights" in str(adapter_summary(model))


def test_several_adapters_are_summed_up() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    inject(model, LoRA(r=2, target_modules=["0"]))
    inject(model, LoRA(r=1, target_modules=["0", "1"]), name="other")
    assert adapter_summary(model).modules == {"default": {"0": 20}, "other": {"0": 10, "1": 8}}
    assert adapter_summary(model).active == ("default",)


class Named(Regression):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_loggers_are_given_the_hyper_parameters(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, PEFTStrategy(LoRA(r=2, target_modules="net.0")), logger=logger).fit(Named(), loader())
    logged = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert logged["width"] == 3
    assert {"r": 2, "alpha": 16, "target_modules": "net.0"}.items() <= logged["peft"]["LoRA"].items()


def test_loggers_are_given_nothing_of_a_method_without_any(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(tmp_path, PEFTStrategy(FullFinetuning()), logger=logger).fit(Named(), loader())
    assert yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text()) == {"width": 3}
