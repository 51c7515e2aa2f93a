"""Running statistics that the processes of a run do not share."""

from pathlib import Path

import pytest
from launch import run_script
from torch import nn

from lightning_peft.core.view import ModelView
from lightning_peft.strategy.refusals import tell_of_own_statistics

SCRIPT = """
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from lightning_peft import LoRA, PEFTStrategy


class Net(L.LightningModule):
    def configure_model(self):
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.trainer.strategy.inject()
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters())


base = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
strategy = PEFTStrategy(LoRA(r=1), base=base, train_also="net.1", merge_on_train_end=False)
trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_steps=1, logger=False,
                    enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Net(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
from distributed_script import finish
finish()
"""


def test_a_sharded_run_says_whose_statistics_are_saved(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    printed = run_script(str(tmp_path / "script.py"))
    assert printed.count("net.1: each process keeps running statistics of its own") == 1


def test_what_keeps_none_or_shares_them_is_left_alone() -> None:
    quiet = nn.Sequential(
        nn.SyncBatchNorm(4), nn.BatchNorm1d(4, track_running_stats=False), nn.BatchNorm1d(4).eval(), nn.LayerNorm(4)
    )
    tell_of_own_statistics(ModelView(quiet))
    with pytest.warns(UserWarning, match=r"^0, 1: each process keeps"):
        tell_of_own_statistics(ModelView(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(4))))
