"""What users of release 0.1 wrote down goes on working: imports, class paths in configurations, pickles."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_peft import LoRA, PEFTStrategy, eject, inject, merge
from lightning_peft.callbacks import AdapterCheckpoint

# Every module that release 0.1 had: `git ls-tree -r be1aacd --name-only lightning_peft callbacks`.
MODULES = {
    "": """
        adapter base_weights blocks bottleneck bottleneck_rows calls checkpoint cli cli_errors combine commands disable
        eject errors fingerprint fold fused_parts infix initial_tokens inject inner_models merge method optim
        param_groups parts per_sample prefix_cache prefixes prepare prompt registry residual restore rows schedule
        seeding select shadow sharding stand_in state storage strategy tap virtual_tokens weights
        bases callbacks formats low_rank methods planning tasks
        """,
    "bases": "auto deepspeed fsdp model_parallel plain sharded spawn zero",
    "callbacks": "checkpoint summary",
    "formats": """
        content counterpart counterparts deepspeed distributed files hf own own_weights pieces serving
        """,
    "formats.counterparts": """
        adalora dora ia3 layer_norm_tuning loha lokr lora lora_from_weight new_tokens prefix_tuning prompt_learning
        prompt_tuning vera
        """,
    "low_rank": """
        combination conv dropout embedding fused linear own_weights principal products rows shared_input
        """,
    "methods": """
        adalora bitfit compacter dora full_finetuning ia3 layer_norm_tuning loha lokr lora new_tokens parallel_adapter
        prefix_tuning prompt_tuning series_adapter vera
        """,
    "planning": "activations command layout memory report",
    "tasks": """
        answer_loss causal_lm classification_data generation instruction_data pretrained records resumable sampling
        schedule sequence_classification
        """,
}
OLD = sorted(f"{package}.{name}".strip(".") for package, names in MODULES.items() for name in names.split())
OTHERWISE_CALLED = {
    "disable": "contexts",
    "bottleneck_rows": "rows",
    "cli_errors": "method_errors",
    "commands": "inspect",
    "formats.files": "contents",
    "planning.command": "plan",
}
PICKLE = Path(__file__).parent / "data" / "release_0_1.pickle"


def run(code: str, *arguments: str) -> str:
    """Run ``code`` in a process in which nothing is imported yet; return the last line that it printed."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_every_module_is_the_one_of_today() -> None:
    """The judge is where the file of a module lies: a second copy would have that of the first."""
    code = """
import importlib, json, sys
from pathlib import Path
import lightning_peft
root, found, copies = Path(lightning_peft.__file__).parent, {}, []
for old in sys.argv[1:]:
    module = importlib.import_module(f"lightning_peft.{old}")
    file = Path(module.__file__)
    inside = ("callbacks", file.name) if file.parent.name == "callbacks" else file.relative_to(root).parts
    name = ".".join(inside).removesuffix(".py").removesuffix(".__init__")
    found[old] = name
    if importlib.import_module(f"lightning_peft.{name}") is not module:
        copies.append(old)
print(json.dumps([found, copies]))
"""
    found, copies = json.loads(run(code, *OLD))
    assert not copies
    assert {old: today.rpartition(".")[2] for old, today in found.items()} == {
        old: OTHERWISE_CALLED.get(old, old.rpartition(".")[2]) for old in OLD
    }


def test_functions_stay_what_their_names_mean() -> None:
    """Python puts a module that it imports into its package by its name, which is the function's as well."""
    code = """
import sys
for name in sys.argv[1:]:
    exec(f"import lightning_peft.{name}")
    exec(f"from lightning_peft.{name} import {name} as function")
    assert getattr(sys.modules["lightning_peft"], name) is function and callable(function), name
print("the same")
"""
    assert run(code, "combine", "disable", "eject", "inject", "merge") == "the same"


def test_class_paths_in_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    parser.add_argument("--callback", type=Callback)
    parser.add_argument("--model", type=LightningModule)
    method = {"class_path": "lightning_peft.methods.lora.LoRA", "init_args": {"r": 3}}
    written = {
        "strategy": {
            "class_path": "lightning_peft.strategy.PEFTStrategy",
            "init_args": {"method": method, "base": "ddp", "merge_on_train_end": False},
        },
        "callback": {"class_path": "lightning_peft.callbacks.checkpoint.AdapterCheckpoint"},
        "model": {"class_path": "lightning_peft.tasks.causal_lm.CausalLM", "init_args": {"model": "gpt2"}},
    }
    config = parser.parse_object(written)
    assert config.model.class_path.rpartition(".")[2] == "CausalLM"
    del config.model  # a model to be found by its name on a hub
    made = parser.instantiate_classes(config)
    assert type(made.callback) is AdapterCheckpoint
    assert isinstance(made.strategy, PEFTStrategy)
    assert made.strategy.methods == (LoRA(r=3),)


def loaded() -> tuple[LoRA, torch.nn.Module]:
    # Written with release 0.1 (a worktree of be1aacd) by
    #     model, method = nn.Sequential(nn.Linear(2, 2)), LoRA(r=1, alpha=2, target_modules=["0"])
    #     inject(model, method)
    #     for number, tensor in enumerate(model.state_dict().values(), 1):
    #         tensor.fill_(number)
    #     pickle.dump((method, model), file)
    method, model = pickle.loads(PICKLE.read_bytes())
    return method, model


def output(model: torch.nn.Module) -> Tensor:
    return model(torch.tensor([[1.0, -3.0]])).detach()


def test_a_pickled_model_and_its_method_load() -> None:
    method, model = loaded()
    assert method == LoRA(r=1, alpha=2, target_modules=["0"])
    # W x + b + (alpha / r) · B A x with W = 1, b = 2, A = 3, B = 4 throughout: -2 + 2 + 2 · 4 · 3 · -2
    assert output(model).tolist() == [[-48.0, -48.0]]
    merge(model)
    assert model[0].weight.tolist() == [[25.0, 25.0], [25.0, 25.0]]  # type: ignore[index]
    eject(model)
    assert output(model).tolist() == [[0.0, 0.0]]
    assert sorted(model.state_dict()) == ["0.bias", "0.weight"]


def test_a_pickled_model_takes_another_adapter() -> None:
    _, model = loaded()
    inject(model, LoRA(r=1, target_modules=["0"]), name="second")
    assert output(model).tolist() == [[-48.0, -48.0]]
