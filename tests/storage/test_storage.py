"""Directories: what is refused, and what survives a crash."""

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, outputs, randomise
from modules import Regression
from safetensors.torch import load_file, save_file
from strangers import unsealed
from torch import nn
from unchanged import assert_unchanged, snapshot

from lightning_peft import (
    LayerNormTuning,
    LoRA,
    PEFTError,
    adapter_state_dict,
    inject,
    load_adapter,
    merge,
    save_adapter,
)
from lightning_peft.core.view import ModelView
from lightning_peft.files import writing
from lightning_peft.files.contents import MARKER
from lightning_peft.storage.state import load_adapter_state_dict
from lightning_peft.strategy.optimizers.param_groups import learning_rate_ratios

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted() -> nn.Module:
    model, _ = build("llama")
    inject(model, LoRA(r=2))
    randomise(model)
    return model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_adapter(adapted(), tmp_path / "adapter")
    return tmp_path / "adapter"


def with_nan(directory: Path) -> None:
    state = load_file(directory / TENSORS)
    next(iter(state.values()))[0, 0] = float("nan")
    save_file(state, directory / TENSORS)


def without_a_tensor(directory: Path) -> None:
    state = load_file(directory / TENSORS)
    state.pop(next(iter(state)))
    save_file(state, directory / TENSORS)


def of_another_width(directory: Path) -> None:
    state = load_file(directory / TENSORS)
    name = next(name for name in state if "lora_B" in name)
    state[name] = torch.cat([state[name], state[name]])
    save_file(state, directory / TENSORS)


def truncated(directory: Path) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes(data[: len(data) // 2])


def absurd_header(directory: Path) -> None:
    data = (directory / TENSORS).read_bytes()
    (directory / TENSORS).write_bytes((2**60).to_bytes(8, "little") + data[8:])


def changed_config(**changes: Any) -> Any:
    def change(directory: Path) -> None:
        config = json.loads((directory / CONFIG).read_text())
        (directory / CONFIG).write_text(json.dumps({**config, **changes}))

    return change


DAMAGE = {
    "NaN": (with_nan, "NaN or infinity"),
    "missing tensor": (without_a_tensor, "alone; lora_A.weight, lora_B.weight were expected"),
    "tensor of another width": (of_another_width, "shape"),
    "truncated": (truncated, "damaged or truncated"),
    "absurd header": (absurd_header, "damaged or truncated"),
    "no tensors": (lambda d: (d / TENSORS).unlink(), "does not exist"),
    "no configuration": (lambda d: (d / CONFIG).unlink(), "does not exist"),
    "broken JSON": (lambda d: (d / CONFIG).write_text("{"), "not valid JSON"),
    "wrong method": (changed_config(peft_type="BOFT"), "type 'BOFT'"),
    "no method": (changed_config(peft_type="TELEPATHY"), "type 'TELEPATHY'; ADALORA, .* can be read"),
    "a pattern that is none": (changed_config(target_modules="("), r"regular expression '\(' is malformed"),
    "not plain LoRA": (changed_config(use_qalora=True), "use_qalora=True"),
    "LoftQ": (changed_config(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "other rank": (changed_config(r=4), "rank 4"),
    "no rank": (changed_config(r=None), "r=None"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_directories_are_refused(case: str, directory: Path) -> None:
    damage, message = DAMAGE[case]
    damage(unsealed(directory))
    model, inputs = build("llama")
    before, keys = outputs(model, inputs), list(model.state_dict())
    with pytest.raises(PEFTError, match=message):
        load_adapter(model, directory)
    assert list(model.state_dict()) == keys
    assert torch.equal(outputs(model, inputs), before)


def test_a_tensor_that_nothing_explains_is_refused(tmp_path: Path) -> None:
    model, _ = build("llama")
    inject(model, LayerNormTuning())
    save_adapter(model, tmp_path / "norms")
    state = load_file(tmp_path / "norms" / TENSORS)
    state["base_model.model.model.norm.ln_tuning_layers.bias"] = torch.zeros(32)
    save_file(state, unsealed(tmp_path / "norms") / TENSORS)
    with pytest.raises(PEFTError, match=r"model\.norm\.ln_tuning_layers\.bias.*does not explain"):
        load_adapter(build("llama")[0], tmp_path / "norms")


def test_another_base_of_equal_shapes_is_refused(directory: Path) -> None:
    other, _ = build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    with pytest.raises(PEFTError, match=r"another base model: LlamaForCausalLM.*This is LlamaForCausalLM"):
        load_adapter(other, directory)
    with pytest.raises(PEFTError, match=r"does not have|another base"):
        load_adapter(build("gpt2")[0], directory)


def test_a_base_in_bfloat16_is_the_same_base(directory: Path) -> None:
    model, _ = build("llama")
    load_adapter(model.to(torch.bfloat16), directory)


def test_loading_into_an_injected_model_replaces_its_values(directory: Path) -> None:
    model, inputs = build("llama")
    inject(model, LoRA(r=2))
    load_adapter(model, directory)
    assert torch.equal(outputs(model, inputs), outputs(adapted(), inputs))


def test_state_is_not_copied_beside_a_merge() -> None:
    model = adapted()
    state = {name: 2 * tensor for name, tensor in adapter_state_dict(model).items()}
    merge(model)
    before = snapshot(model)
    with pytest.raises(PEFTError, match="are merged into the weights"):
        load_adapter_state_dict(ModelView(model), state)
    assert_unchanged(model, before)


def test_foreign_directories_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(PEFTError, match="not written by lightning_peft"):
        save_adapter(adapted(), tmp_path / "mine")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PEFTError, match="not written by lightning_peft"):
        save_adapter(adapted(), tmp_path / "file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_our_own_are_replaced(directory: Path) -> None:
    model = adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if not parameter.requires_grad else 2.0)
    save_adapter(model, directory)
    fresh, inputs = build("llama")
    load_adapter(fresh, directory)
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))
    assert [p.name for p in directory.parent.iterdir()] == ["adapter"]


def test_an_interrupted_save_leaves_the_old_one(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = {p.name: p.read_bytes() for p in directory.iterdir()}

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_move", crash)
    with pytest.raises(KeyboardInterrupt):
        save_adapter(adapted(), directory)
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == old
    assert [p.name for p in directory.parent.iterdir()] == ["adapter"]


def test_a_crash_between_the_two_renames_is_mended(directory: Path) -> None:
    directory.rename(directory.with_name(".adapter.old"))
    model, inputs = build("llama")
    load_adapter(model, directory)
    assert torch.equal(outputs(model, inputs), outputs(adapted(), inputs))


def test_several_write_one_directory_at_once(tmp_path: Path) -> None:
    """As the processes of a run do that all call save_adapter."""

    def write(number: int) -> None:
        with writing.atomic_directory(tmp_path / "adapter") as directory:
            (directory / MARKER).write_text("{}")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(write, range(400)))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


MODES = {"read-only": 0o555, "closed": 0o000}


@pytest.fixture(scope="module")
def without_permission(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of each mode, and what a process printed that tried to save into them."""
    root = tmp_path_factory.mktemp("permissions")
    for name, mode in MODES.items():
        (root / name).mkdir()
        (root / name).chmod(mode)
    for parent in [root, *root.parents]:
        if parent.stat().st_uid == os.getuid() and parent.name.startswith(("pytest-", "popen-", root.name)):
            parent.chmod(parent.stat().st_mode | 0o055)
    # Permissions do not bind root: the attempts are made as nobody.
    program = f"""
        import os, torch
        from lightning_peft import LayerNormTuning, LoRA, PEFTError, inject, save_adapter
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        inject(model, LoRA(r=1))
        if os.getuid() == 0:
            os.setuid(65534)
        for mode in {list(MODES)}:
            try:
                save_adapter(model, f"{root}/{{mode}}/adapter")
            except PEFTError as error:
                print(mode, "refused:", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    return root, done.stdout + done.stderr


@pytest.mark.parametrize("mode", MODES)
def test_a_directory_without_permission(mode: str, without_permission: tuple[Path, str]) -> None:
    root, printed = without_permission
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{mode} refused: ")] or [printed]
    assert "Cannot write" in line
    assert "Permission denied" in line
    (root / mode).chmod(0o755)
    assert not list((root / mode).iterdir())


def test_what_is_adapted_around_a_transformers_model_is_loaded_with_it(tmp_path: Path) -> None:
    def model() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.ModuleDict({"body": build("llama")[0], "head": nn.Linear(8, 3)})

    adapted, fresh, x, ids = model(), model(), torch.ones(2, 8), build("llama")[1]
    inject(adapted, LoRA(r=2))
    randomise(adapted)
    save_adapter(adapted, tmp_path / "adapter")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(fresh["head"](x), adapted["head"](x))
    torch.testing.assert_close(outputs(fresh["body"], ids), outputs(adapted["body"], ids), rtol=0, atol=0)
    # It is trained further, with the learning rates of its methods.
    assert learning_rate_ratios(ModelView(fresh)) == {}


def test_a_part_whose_adapters_are_those_of_the_whole_gets_no_others(tmp_path: Path) -> None:
    module = Regression()
    inject(module.net, LoRA(r=2))
    save_adapter(module, tmp_path / "saved")
    whole = Regression()
    inject(whole, LoRA(r=2))
    with pytest.raises(PEFTError, match=r"for 'net', which has adapters already .* into the Regression around it"):
        load_adapter(whole, tmp_path / "saved", name="other")
    plain = Regression()
    for name in ("first", "other"):
        load_adapter(plain, tmp_path / "saved", name=name)
