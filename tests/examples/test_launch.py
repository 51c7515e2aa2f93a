"""The files in examples/launch/: against the schemas of the clusters that read them, and their commands parsed.

The scripts for torchrun and SLURM are run by ``test_multinode.py`` and ``test_slurm.py``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemas
import yaml
from cluster import config, model_and_data
from launch import clean_environment
from read_config import CONFIGS, Read

LAUNCH = CONFIGS.with_name("launch")
SCHEMAS = {
    "kubeflow_pytorchjob": schemas.PYTORCH_JOB,
    "kubeflow_trainjob": schemas.TRAIN_JOB,
    "skypilot": schemas.SKYPILOT_TASK,
    "skypilot_volume": schemas.SKYPILOT_VOLUME,
}


def content(name: str) -> Any:
    return yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())


def pod() -> Any:
    return content("kubeflow_pytorchjob")["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]


def parsed(command: str, **variables: str) -> Any:
    """Return what the command's parser makes of the options after ``lightning_peft fit``."""
    for name, value in variables.items():
        command = command.replace(f'"${name}"', value)
    words = shlex.split(command.replace("\\\n", " ").partition("lightning_peft fit ")[2])
    given = re.fullmatch(r"--config=(?:examples/configs/)?(\w+\.yaml)", words[0])
    assert given
    return Read(["fit", f"--config={CONFIGS / given[1]}", *words[1:]]).config.fit


def assert_two_nodes_of_eight(run: Any) -> None:
    assert (run.trainer.num_nodes, run.trainer.devices) in [(2, 8), (2, "8")]
    assert run.ckpt_path == "last"
    assert run.trainer.callbacks[0].init_args.every_n_train_steps


def test_every_file_has_a_schema() -> None:
    assert {file.stem for file in LAUNCH.glob("*.yaml")} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_file_keeps_to_its_schema(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    jsonschema.validate(content(name), SCHEMAS[name], jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_refuses_a_misspelt_key(name: str) -> None:
    wrong = content(name)
    deepest = wrong
    while isinstance(inner := list(deepest.values())[-1], dict):
        deepest = inner
    deepest["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        jsonschema.validate(wrong, SCHEMAS[name], jsonschema.Draft202012Validator)


def test_the_pytorchjob_agrees_with_itself() -> None:
    job = content("kubeflow_pytorchjob")["spec"]
    (container,) = pod()["containers"]
    assert_two_nodes_of_eight(parsed(shlex.join(container["command"])))
    assert "--nproc-per-node=8" in container["command"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    elastic = job["elasticPolicy"]
    assert elastic["minReplicas"] == elastic["maxReplicas"] == job["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod()["volumes"]}


def test_the_trainjob_agrees_with_itself() -> None:
    job = content("kubeflow_trainjob")["spec"]
    assert_two_nodes_of_eight(parsed(job["trainer"]["command"][-1]))
    assert (job["trainer"]["numNodes"], job["trainer"]["numProcPerNode"]) == (2, 8)
    assert job["trainer"]["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 8}
    (patch,) = job["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_the_skypilot_task_agrees_with_itself() -> None:
    task = content("skypilot")
    run = parsed(task["run"], SKYPILOT_NUM_NODES="2", SKYPILOT_NUM_GPUS_PER_NODE="8")
    assert_two_nodes_of_eight(run)
    assert task["num_nodes"] == 2
    assert task["resources"]["accelerators"].endswith(":8")
    ((path, volume),) = task["volumes"].items()
    assert str(run.trainer.callbacks[0].init_args.dirpath).startswith(f"{path}/")
    assert volume == content("skypilot_volume")["name"]
    assert content("skypilot_volume")["config"]["access_mode"] == "ReadWriteMany"


def scripts() -> dict[str, str]:
    shell = {file.name: file.read_text() for file in LAUNCH.iterdir() if file.suffix in (".sh", ".sbatch")}
    sky = {f"skypilot.yaml {key}": f"#!/bin/bash\n{content('skypilot')[key]}" for key in ("setup", "run")}
    return {**shell, **sky, "kubeflow_trainjob.yaml": content("kubeflow_trainjob")["spec"]["trainer"]["command"][-1]}


@pytest.mark.parametrize("name", scripts())
def test_shell_code_is_sound(name: str) -> None:
    subprocess.run(["bash", "-n"], input=scripts()[name], text=True, check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", "--shell=bash", "-"], input=scripts()[name], text=True, capture_output=True
        )
        assert checked.returncode == 0, checked.stdout


def test_torchrun_needs_to_know_where_to_meet() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "HEAD"}
    done = subprocess.run([str(LAUNCH / "torchrun.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "give HEAD=HOST:PORT" in done.stderr


RAY = """
from lightning.pytorch.plugins.environments import LightningEnvironment as RayLightningEnvironment
from lightning.pytorch.strategies import DDPStrategy as RayDDPStrategy
"""
RAY_TRAIN = """
from dataclasses import dataclass

@dataclass
class FailureConfig:
    max_failures: int = 0

@dataclass
class RunConfig:
    failure_config: FailureConfig

@dataclass
class ScalingConfig:
    num_workers: int
    use_gpu: bool
"""
RAY_TORCH = """
class TorchTrainer:
    def __init__(self, function, *, train_loop_config, scaling_config, run_config):
        assert scaling_config.num_workers == 1 and not scaling_config.use_gpu
        assert run_config.failure_config.max_failures == 3
        self.function, self.config = function, train_loop_config

    def fit(self):
        self.function(self.config)
"""


@pytest.mark.slow
def test_the_ray_script_runs_on_a_stand_in(tmp_path: Path) -> None:
    """Ray is too large to install for a test; these are the parts of its interface that the script uses."""
    parts = {"__init__": "", "train/__init__": RAY_TRAIN, "train/torch": RAY_TORCH, "train/lightning": RAY}
    for name, source in parts.items():
        file = tmp_path / "path" / "ray" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    model_and_data(tmp_path)
    run = config(tmp_path, nodes=2, batch=4, out=tmp_path / "out")
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{tmp_path / 'path'}:{environment['PYTHONPATH']}"
    strategy = "--trainer.strategy=lightning_peft.PEFTStrategy"
    command = [sys.executable, str(LAUNCH / "ray_train.py"), "--workers=1", "--cpu", f"--config={run}", strategy]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PEFTDDPStrategy" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / "last" / "adapter_model.safetensors").is_file()
    wrong = subprocess.run([*command, "--trainer.nonsense=1"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "lightning-peft ended with status 2" in wrong.stderr
