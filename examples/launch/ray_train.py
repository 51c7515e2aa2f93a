"""Any config of this package on the workers of a Ray cluster, by Ray Train's TorchTrainer.

    pip install "ray[train]"
    python examples/launch/ray_train.py --workers=16 --config=examples/configs/multi_node.yaml --trainer.max_steps=2000

Given on a machine of the cluster, in a directory that all its nodes see. What Ray's own integration brings is used as
it is: `RayDDPStrategy` (the device of each worker) as the base of `PEFTStrategy`, and `RayLightningEnvironment` (ranks)
as a plugin. A worker that is lost makes Ray start all of them anew, and they go on from the last adapter checkpoint.

Not used: `prepare_trainer`, which only checks these two classes, and `RayTrainReportCallback`, which copies a
checkpoint to Ray's storage after each epoch. Add it to the config's callbacks to have Ray keep checkpoints: they hold
adapter state only, like all others. `RayFSDPStrategy` and `RayDeepSpeedStrategy` go in the same place as
`RayDDPStrategy`; untested.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

UNDER_RAY = [
    "--trainer.strategy.init_args.base=ray.train.lightning.RayDDPStrategy",
    "--trainer.plugins=ray.train.lightning.RayLightningEnvironment",
    # Of each worker: those that Ray gave it. How many workers there are, Ray tells through the plugin.
    "--trainer.devices=auto",
    "--trainer.num_nodes=1",
    "--ckpt_path=last",
]


def train(run: dict[str, Any]) -> None:
    """Run `lightning-peft fit` in a worker."""
    from lightning_peft.cli import PEFTCLI

    os.chdir(run["directory"])
    try:
        PEFTCLI(["fit", *run["arguments"], *UNDER_RAY])
    except SystemExit as stop:  # a wrong option; it would end the worker's thread without a word
        raise RuntimeError(f"lightning-peft ended with status {stop.code}") from stop


def main() -> None:
    """Read the command line and start the workers; what this does not know goes to `lightning-peft fit`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="processes, one for each GPU")
    parser.add_argument("--cpu", action="store_true", help="workers without GPUs")
    options, arguments = parser.parse_known_args()
    TorchTrainer(
        train,
        train_loop_config={"arguments": arguments, "directory": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
    ).fit()


if __name__ == "__main__":
    main()
