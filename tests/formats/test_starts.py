"""Where HF PEFT lets a LoRA start: what is plain LoRA in its file is read, what changed the base is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import build, outputs, strongly
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

from lightning_peft import PEFTError, load_adapter

TARGETS = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
Inputs = dict[str, Tensor]


def config(init: Any, **keys: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**TARGETS, init_lora_weights=init, **keys)


def eva(model: nn.Module, inputs: Inputs) -> peft.PeftModel:
    adapted = peft.get_peft_model(model, config("eva", eva_config=EvaConfig(rho=1.0)))
    peft.initialize_lora_eva_weights(adapted, [inputs] * 2, show_progress_bar=False)
    return adapted


def corda(model: nn.Module, inputs: Inputs) -> peft.PeftModel:
    wanted = config("corda", corda_config=CordaConfig())
    samples = torch.arange(160).view(8, 1, 20) * 7 % 47  # one at a time

    def run() -> None:
        for sample in samples:
            model(input_ids=sample)

    preprocess_corda(model, wanted, run_model=run)
    return peft.get_peft_model(model, wanted)


def lora_ga(model: nn.Module, inputs: Inputs) -> peft.PeftModel:
    wanted = config("lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(model, wanted, train_step=lambda: outputs(model, inputs).square().mean().backward())
    return peft.get_peft_model(model, wanted)


def plainly(init: Any) -> Callable[[nn.Module, Inputs], peft.PeftModel]:
    return lambda model, inputs: peft.get_peft_model(model, config(init))


BASE_UNCHANGED = {"eva": eva, **{str(init): plainly(init) for init in ("orthogonal", "mica", "gaussian", False)}}
BASE_CHANGED = {"corda": corda, "lora_ga": lora_ga}


@pytest.mark.parametrize("start", BASE_UNCHANGED)
def test_beside_an_unchanged_base_it_is_plain_lora(start: str, tmp_path: Path) -> None:
    model, inputs = build("llama")
    judge = BASE_UNCHANGED[start](model, inputs).eval()
    strongly(judge)
    judge.save_pretrained(tmp_path)
    expected, loaded = outputs(judge, inputs), build("llama")[0]
    load_adapter(loaded, tmp_path)
    assert (outputs(loaded, inputs) - expected).abs().max() <= 2e-5
    assert (outputs(build("llama")[0], inputs) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("start", BASE_CHANGED)
def test_beside_a_changed_base_it_is_read_when_it_was_converted(start: str, tmp_path: Path) -> None:
    model, inputs = build("llama")
    adapted = BASE_CHANGED[start](model, inputs)
    adapted.peft_config["default"].init_lora_weights = True  # for the start alone
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    expected = outputs(adapted.eval(), inputs)

    adapted.save_pretrained(tmp_path / "as it is")
    with pytest.raises(PEFTError, match=rf"init_lora_weights='{start}'.*path_initial_model_for_weight_conversion"):
        load_adapter(build("llama")[0], tmp_path / "as it is")

    where = str(tmp_path / "start")
    adapted.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=where)
    loaded = build("llama")[0]
    load_adapter(loaded, tmp_path / "converted")
    assert (outputs(loaded, inputs) - expected).abs().max() <= 2e-5
    assert (outputs(build("llama")[0], inputs) - expected).abs().max() > 1e-3


def test_beside_weights_that_were_quantised_it_is_refused(tmp_path: Path) -> None:
    peft.get_peft_model(build("llama")[0], config(True)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": "loftq"}))
    with pytest.raises(PEFTError, match=r"init_lora_weights='loftq'.*merge_and_unload"):
        load_adapter(build("llama")[0], tmp_path)
